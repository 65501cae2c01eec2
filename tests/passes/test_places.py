"""Places are the windows that a convolution would read, whatever its geometry."""

import pytest
import torch
from torch import nn

from anncvt.nn import AdderConv1d, AdderConv2d, AdderLinear
from anncvt.passes.examples import Examples
from anncvt.passes.places import Places

LAYERS = {
    "3x3": (AdderConv2d(6, 8, 3), nn.functional.conv2d, (5, 6, 9, 9)),
    "stride, dilation": (AdderConv2d(6, 8, 3, stride=2, dilation=2), nn.functional.conv2d, (5, 6, 12, 11)),
    "groups": (AdderConv2d(6, 9, (3, 1), groups=3), nn.functional.conv2d, (5, 6, 9, 9)),
    "1-d": (AdderConv1d(6, 8, 3), nn.functional.conv1d, (5, 6, 30)),
    "linear": (AdderLinear(6, 8), None, (50, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_weights_times_taps_are_the_convolution(name):
    torch.manual_seed(0)
    adder, convolution, shape = LAYERS[name]
    x, weight = torch.randn(shape), torch.randn_like(adder.weight)
    if convolution is None:
        targets = x @ weight.T
    else:
        targets = convolution(x, weight, None, adder.stride, 0, adder.dilation, adder.groups)
    at = Places(adder, Examples(x, targets, None), 40, 1 << 20, torch.Generator().manual_seed(0))
    assert at.taps.shape[2] == at.targets.shape[2] == 40
    flat = weight.reshape(adder.groups, adder.out_channels // adder.groups, -1)
    torch.testing.assert_close(flat @ at.taps, at.targets, rtol=1e-4, atol=1e-4)


def test_values_of_a_channel_come_from_all_its_taps():
    adder = AdderConv2d(2, 3, 3)
    x = torch.arange(9.0).view(1, 1, 3, 3) + torch.tensor([0.0, 100.0]).view(1, 2, 1, 1)
    at = Places(adder, Examples(x.repeat(4, 1, 1, 1), torch.zeros(4, 3, 1, 1), None), 4, 1 << 20, torch.Generator())
    values = at.channels(18)
    assert values.shape == (2, 18)
    for channel, first in enumerate((0, 100)):
        assert sorted(values[channel].tolist()) == sorted([first + float(n) for n in range(9)] * 2)


def test_memory_bounds_the_places():
    adder = AdderConv2d(6, 8, 1)
    examples = Examples(torch.randn(50, 6, 4, 4), torch.randn(50, 8, 4, 4), None)
    assert Places(adder, examples, 700, 4 * (2 * 6 + 5 * 8) * 100, torch.Generator()).taps.shape[2] == 100
    assert Places(adder, examples, 700, 1, torch.Generator()).taps.shape[2] == 2
