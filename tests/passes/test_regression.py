"""The regression is the least of the error that it says it minimises, for every group, and dead channels do no harm."""

import pytest
import torch

from anncvt.nn import AdderConv2d
from anncvt.passes import regression
from anncvt.passes.examples import Examples
from anncvt.passes.regression import KEPT, of_adders, regressions


def _regressions(x, z, prior, penalties):
    """Of maps ``x`` and ``z`` of single pixels."""
    layer = AdderConv2d(x.shape[1], z.shape[1], 1, groups=x.shape[1] // prior.shape[1])
    examples = Examples(x[..., None, None], z[..., None, None], None)
    generator = torch.Generator().manual_seed(0)
    return [
        (weight[..., 0, 0], bias)
        for weight, bias in regressions(layer, examples, prior[..., None, None], penalties, 1 << 24, generator)
    ]


def _problem(groups=1, outputs=5, taps=6, places=400):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(places, groups * taps, generator=generator)
    x = x @ torch.randn(groups * taps, groups * taps, generator=generator) + 2
    prior = torch.randn(groups * outputs, taps, generator=generator)
    z = [3 * x[:, g * taps :][:, :taps] @ prior[g * outputs :][:outputs].T for g in range(groups)]
    return x, torch.cat(z, 1) + torch.randn(places, groups * outputs, generator=generator) - 1, prior


@pytest.mark.parametrize("penalties", [KEPT, *map(of_adders, (1, 2, 3, 4))])
def test_each_is_the_least_of_its_own_error(penalties):
    x, z, prior = _problem(groups=2)
    found = _regressions(x, z, prior, penalties)
    assert len(found) == len(penalties)
    for (weight, bias), (shrink, pull) in zip(found, penalties, strict=True):
        torch.testing.assert_close(
            bias, z.mean(0) - torch.cat([x.mean(0).view(2, 6)[g] @ weight.view(2, 5, 6)[g].T for g in range(2)])
        )
        for group in range(2):
            a, b = (t.view(400, 2, -1)[:, group].double() for t in (x, z))
            a, b = a - a.mean(0), b - b.mean(0)
            deviation = a.square().mean(0).sqrt()
            own = prior.view(2, 5, 6)[group].double()
            like = a @ own.T
            scaled = own * ((like * b).mean(0) / like.square().mean(0))[:, None]
            rows = [a / 20, torch.diag(shrink**0.5 * deviation), torch.diag(pull**0.5 * deviation)]
            wanted = [b / 20, torch.zeros(6, 5), pull**0.5 * deviation[:, None] * scaled.T]
            expected = torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted).double()).solution.T
            torch.testing.assert_close(weight.view(2, 5, 6)[group].double(), expected, rtol=1e-4, atol=1e-4)


def test_what_arrives_with_errors_counts_less():
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(5000, 2, generator=generator)
    prior = torch.ones(1, 2)
    noisy = clean.clone()
    noisy[:, 1] += 2 * torch.randn(5000, generator=generator)
    ((weight, _),) = _regressions(noisy, clean @ prior.T, prior, [(0.01, 0.0)])
    assert 4 < float(weight[0, 0] / weight[0, 1]) < 6  # 5 by the variances


def test_channels_that_never_vary_do_no_harm():
    x, z, prior = _problem()
    x[:, 2] = 0
    for weight, bias in _regressions(x, z, prior, (*KEPT, *of_adders(1))):
        assert weight.isfinite().all() and bias.isfinite().all()
        assert float(weight[:, 2].abs().max()) < 10 * float(weight.abs().max())
    for weight, _ in _regressions(torch.zeros_like(x), z, prior, (*KEPT, *of_adders(1))):
        assert weight.isfinite().all()


def test_what_cannot_be_solved_is_left_out(monkeypatch):
    x, z, prior = _problem()
    for bad in (float("nan"), float("inf")):
        assert not _regressions(x.index_fill(0, torch.tensor([3]), bad), z, prior, KEPT)
    monkeypatch.setattr(regression, "MOST_WEIGHTS", 5)
    assert not _regressions(x, z, prior, KEPT)
