"""Every sweep lowers the error, single taps get the best candidate, and what is kept beside the weights is true."""

import itertools

import pytest
import torch

from anncvt.passes.coordinate_descent import CoordinateDescent, candidates


def _problem(outputs=5, copies=1, taps=6, positions=400, seed=0):
    """Inputs and a convolution's answer to them."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(taps, taps, generator=generator)
    x = mixed @ torch.randn(taps, positions, generator=generator)
    targets = torch.randn(outputs, taps, generator=generator) @ x + 3
    weight = torch.randn(outputs, copies, taps, generator=generator)
    return weight, torch.ones(outputs), x, candidates(x, 16), targets


def _response(weight, x):
    return -sum((2**k * x - weight[:, k, :, None]).abs().sum(1) for k in range(weight.shape[1]))


@pytest.mark.parametrize("copies", [1, 2])
def test_every_sweep_explains_more(copies):
    descent = CoordinateDescent(*_problem(copies=copies))
    generator = torch.Generator().manual_seed(0)
    explained = [descent.r2()]
    for _ in range(5):
        descent.sweep(generator)
        explained.append(descent.r2())
    assert all(after >= before - 1e-5 for before, after in itertools.pairwise(explained))
    assert 1 - explained[-1] < 0.5 * (1 - explained[0])


@pytest.mark.parametrize("copies", [1, 3])
def test_weights_line_and_statistics_belong_together(copies):
    weight, scale, x, grids, targets = _problem(copies=copies)
    descent = CoordinateDescent(weight, scale, x, grids, targets)
    descent.sweep(torch.Generator().manual_seed(0))
    response = _response(weight, x)
    mean, variance = descent.statistics()
    torch.testing.assert_close(mean, response.mean(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(variance, response.var(1), rtol=1e-3, atol=1e-4)
    y = scale[:, None] * (response - mean[:, None]) + descent.mean[:, None]
    missed = (targets - y).square().mean() / targets.var()
    assert descent.r2() == pytest.approx(1 - float(missed), abs=1e-4)
    pairs = itertools.product(range(len(grids)), range(copies))
    assert all(torch.isin(weight[:, copy, tap], 2**copy * grids[tap]).all() for tap, copy in pairs)


def test_one_tap_gets_the_best_of_all_candidates():
    weight, scale, x, grids, _ = _problem(outputs=4, taps=1)
    wanted = grids[0, [2, 4, 9, 13]]
    targets = -2 * (x - wanted[:, None]).abs() + 1
    scale = 2 * scale
    descent = CoordinateDescent(weight, scale, x, grids, targets)
    for _ in range(3):
        descent.sweep(torch.Generator().manual_seed(0))
    assert torch.equal(weight.flatten(), wanted)
    assert descent.r2() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(scale, torch.full((4,), 2.0))
    assert descent.sweep(torch.Generator().manual_seed(0)) == 0  # nothing is left to change


def test_an_output_that_never_varies_does_no_harm():
    weight, scale, x, grids, targets = _problem()
    targets[1] = 7
    descent = CoordinateDescent(weight, scale, x, grids, targets)
    for _ in range(2):
        descent.sweep(torch.Generator().manual_seed(0))
    assert all(value.isfinite().all() for value in (scale, weight, *descent.statistics()))
    assert descent.r2() > 0.5 and abs(float(scale[1])) < 1e-3


def test_candidates_count_repeated_values_once_and_reach_beyond_all():
    values = torch.cat([torch.zeros(500), torch.arange(1, 11) / 10])[None]
    (row,) = candidates(values, 13)
    torch.testing.assert_close(row[1:-1], torch.arange(11) / 10)
    assert row[0] < 0 and row[-1] > 1 and (row.diff() > 0).all()
    (constant,) = candidates(torch.full((1, 20), 3.0), 6)
    assert constant[0] < 3 < constant[-1] and (constant[1:-1] == 3).all()
