"""A layer fitted tap by tap answers with what was promised, whatever its geometry."""

import copy

import pytest
import torch
from torch import nn

from anncvt.nn import AdderConv1d, AdderConv2d, AdderLinear
from anncvt.passes.examples import collect
from anncvt.passes.fit_taps import fit_taps
from anncvt.passes.initialise import fit_line
from anncvt.passes.pairing import Pair

ADDERS = {
    "3x3": lambda: (AdderConv2d(6, 8, 3, padding=1), (40, 6, 9, 9)),
    "stride, dilation": lambda: (AdderConv2d(6, 8, 3, stride=2, padding=2, dilation=2), (40, 6, 12, 11)),
    "channels_last": lambda: (AdderConv2d(6, 8, 3).to(memory_format=torch.channels_last), (40, 6, 9, 9)),
    "groups": lambda: (AdderConv2d(6, 9, (3, 1), groups=3), (40, 6, 9, 9)),
    "copies": lambda: (AdderConv2d(6, 8, 1, copies=3), (40, 6, 9, 9)),
    "1-d": lambda: (AdderConv1d(6, 8, 3, padding=1), (40, 6, 30)),
    "linear": lambda: (AdderLinear(6, 8), (40, 20, 6)),
}


def _fitted(name, sweeps, memory=1 << 26):
    """A layer after ``sweeps``, and R^2 of it on all its examples before and after."""
    torch.manual_seed(0)
    adder, shape = ADDERS[name]()
    x = torch.randn(shape).relu()
    response = adder.response(x).detach()
    if adder.ndim == 0:
        target = x @ torch.randn(6, 8)
        norm: nn.Module = nn.BatchNorm1d(8)
    else:
        functional = nn.functional.conv1d if adder.ndim == 1 else nn.functional.conv2d
        weight = torch.randn(adder.out_channels, 6 // adder.groups, *adder.kernel_size)
        target = functional(
            x, weight, None, adder.stride, [side[0] for side in adder.padding], adder.dilation, adder.groups
        )
        norm = nn.BatchNorm1d(8) if adder.ndim == 1 else nn.BatchNorm2d(adder.out_channels)
        assert response.shape == target.shape
    norm.eval()
    train, _ = collect(adder, [(x, target, None)], len(x), 1 << 26, torch.Generator().manual_seed(0))
    fit_line(norm, adder.response(train.inputs, is_padded=True).detach(), train.targets)
    pair = Pair("layer", nn.Identity(), nn.Identity(), adder, norm)
    generator = torch.Generator().manual_seed(0)
    before = _r2(pair, train)
    said = []
    done = fit_taps(pair, train, sweeps, memory, generator, on_sweep=said.append)
    assert len(said) == done
    return pair, before, _r2(pair, train), said


@torch.no_grad()
def _r2(pair, examples):
    got = pair.norm(pair.adder.response(examples.inputs, is_padded=True))
    return 1 - float((got - examples.targets).square().mean() / examples.targets.var())


@pytest.mark.parametrize("name", ADDERS)
def test_the_layer_does_what_the_descent_says(name):
    pair, before, after, said = _fitted(name, 3)
    assert after > before + 0.2
    # R^2 is said of each group's places alone; with one group it is that of the layer in eval mode.
    if pair.adder.groups == 1:
        assert said[-1] == pytest.approx(after, abs=0.02)


def test_it_ends_by_itself_when_nothing_changes():
    _, _, after, said = _fitted("linear", 100)
    assert len(said) < 100 and after > 0.5


def test_little_memory_means_fewer_places():
    _, before, after, _ = _fitted("3x3", 3, memory=4 * (2 * 54 + 5 * 8) * 300)
    assert after > before
    pair, *_ = _fitted("3x3", 1, memory=1)  # two places say nothing, and do no harm
    assert all(value.isfinite().all() for value in copy.deepcopy(pair.norm).state_dict().values())


def test_time_is_kept_but_for_the_first_sweep():
    torch.manual_seed(0)
    adder = AdderConv2d(6, 8, 3, padding=1)
    x = torch.randn(40, 6, 9, 9)
    train, _ = collect(adder, [(x, torch.randn(40, 8, 9, 9), None)], 40, 1 << 26, torch.Generator().manual_seed(0))
    pair = Pair("layer", nn.Identity(), nn.Identity(), adder, nn.BatchNorm2d(8).eval())
    assert fit_taps(pair, train, 50, 1 << 26, torch.Generator().manual_seed(0), seconds=0.0) == 1
