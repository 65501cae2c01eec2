"""The tent table is checked against its definition, the map against what it promises."""

import numpy as np
import pytest
import torch

from anncvt.passes.quantile_map import quantile_map, tent_table


@pytest.fixture(scope="module")
def samples():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1, 4000, generator=generator)
    relu = torch.randn(1, 4000, generator=generator).clamp_min(0)
    return torch.cat([normal, relu, 3 + 0.1 * normal])


def test_slope_and_residual_are_the_regression_of_the_tent_on_the_input(samples):
    table = tent_table(samples)
    for channel in range(3):
        x = samples[channel].double().numpy()
        for at in (0, 40, 128, 200, 256):
            tent = -np.abs(x - float(table.weights[channel, at]))
            slope = np.cov(tent, x, bias=True)[0, 1] / x.var()
            residual = (tent - tent.mean() - slope * (x - x.mean())).var()
            assert float(table.slope[channel, at]) == pytest.approx(slope, abs=1e-4)
            assert float(table.residual[channel, at]) == pytest.approx(residual, abs=1e-4 * max(1, x.var()))


def test_slope_rises_from_minus_one_to_one(samples):
    table = tent_table(samples)
    assert (table.slope.diff(dim=1) >= 0).all()
    torch.testing.assert_close(table.slope[:, 0], torch.full((3,), -1.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(table.slope[:, -1], torch.full((3,), 1.0), atol=1e-3, rtol=0)


def test_a_constant_channel_gives_finite_weights():
    table = tent_table(torch.full((2, 50), 1.5))
    assert torch.isfinite(quantile_map(torch.randn(4, 2, 3, 3), table)).all()


def test_mapped_weights_keep_the_order_and_zero_splits_the_activations(samples):
    table = tent_table(samples[:1])
    weight = torch.tensor([0.1, -0.05, 0.02, 0.0]).view(1, 1, 2, 2)
    mapped = quantile_map(weight, table).flatten()
    assert (mapped[weight.flatten().argsort()].diff() > 0).all()
    share_below = float((samples[0] < mapped[3]).float().mean())
    assert share_below == pytest.approx(0.5, abs=0.05)


def test_the_output_of_mapped_weights_follows_the_convolution():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2000, 12, generator=generator).clamp_min(-0.5)
    weight = torch.randn(8, 12, 1, 1, generator=generator)
    mapped = quantile_map(weight, tent_table(x.T.contiguous()))
    wanted = x @ weight.flatten(1).T
    got = -(x[:, None] - mapped.flatten(1)).abs().sum(2)
    for o in range(8):
        assert np.corrcoef(wanted[:, o], got[:, o])[0, 1] > 0.7
    copied = -(x[:, None] - weight.flatten(1)).abs().sum(2)
    better = [
        np.corrcoef(wanted[:, o], got[:, o])[0, 1] > np.corrcoef(wanted[:, o], copied[:, o])[0, 1] for o in range(8)
    ]
    assert sum(better) >= 7


def test_groups_use_their_own_channels(samples):
    table = tent_table(samples[:2])
    weight = torch.randn(4, 1, 3, 3)
    mapped = quantile_map(weight, table, groups=2)
    alone = quantile_map(weight[2:], tent_table(samples[1:2]))
    torch.testing.assert_close(mapped[2:], alone)


def test_more_weights_an_input_follow_the_convolution_more_closely():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4000, 16, generator=generator).clamp_min(-0.5)
    weight = torch.randn(8, 16, 1, 1, generator=generator)
    wanted, table = x @ weight.flatten(1).T, tent_table(x.T.contiguous())
    closeness = []
    for copies in (1, 2, 3):
        mapped = quantile_map(weight, table, copies=copies)
        assert mapped.shape == (8, copies * 16, 1, 1)
        inputs = torch.cat([x, 2 * x, 4 * x][:copies], 1)
        got = -(inputs[:, None] - mapped.flatten(1)).abs().sum(2)
        closeness.append(np.array([np.corrcoef(wanted[:, o], got[:, o])[0, 1] for o in range(8)]))
    missed = [(1 - close**2).mean() for close in closeness]
    assert missed[1] < 0.5 * missed[0] and missed[2] < 0.5 * missed[1]


def test_weights_of_larger_copies_lie_beyond_all_activations(samples):
    table = tent_table(samples)
    mapped = quantile_map(torch.tensor([[0.5, -0.5, 0.1]])[..., None, None], table, copies=2).flatten()
    low, high = 2 * samples.amin(1), 2 * samples.amax(1)
    assert mapped[3] >= high[0] and mapped[4] <= low[1] and mapped[5] >= high[2]
