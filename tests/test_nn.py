"""The modules against a float64 sum over taps, and their likeness to torch's convolutions."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anncvt.nn import AdderConv1d, AdderConv2d, AdderConv3d, AdderLinear, adder_class

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: (9,), 2: (8, 7), 3: (5, 6, 7)}


def by_taps(module, x):
    """``-sum |x - w|`` in float64 over padded ``x``, for any number of spatial dimensions."""
    flat = [side for pair in reversed(module.padding) for side in pair]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x, weight = F.pad(x.double(), flat, mode=mode), module.weight.detach().double()
    dims = module.ndim
    reach = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    size = [(x.shape[2 + i] - reach[i]) // module.stride[i] + 1 for i in range(dims)]
    y = torch.zeros(x.shape[0], module.out_channels, *size, dtype=torch.float64)
    depth, per_group = weight.shape[1], module.out_channels // module.groups
    for tap in itertools.product(*map(range, module.kernel_size)):
        starts = [t * d for t, d in zip(tap, module.dilation, strict=True)]
        slices = [slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, size, module.stride, strict=True)]
        window = x[(..., *slices)]
        for o, c in itertools.product(range(module.out_channels), range(depth)):
            y[:, o] -= (window[:, o // per_group * depth + c] - weight[(o, c, *tap)]).abs()
    return y if module.bias is None else y + module.bias.detach().double().view(-1, *(1,) * dims)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 2, "padding": "same"},
        {"kernel_size": 3, "padding": "valid", "stride": 2, "bias": True},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "stride": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        {"kernel_size": 3, "padding": 2, "padding_mode": "replicate", "groups": 2},
        {"kernel_size": 1, "groups": 2, "bias": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_values_and_shape(dims, options):
    torch.manual_seed(0)
    module = adder_class(dims)(4, 6, **options)
    x = torch.randn(2, 4, *SIZES[dims])
    y = module(x)
    assert y.shape == CONVOLUTIONS[dims](4, 6, **options)(x).shape
    expected = by_taps(module, x)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-6 * expected.abs().max().item())


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_exact_gradients_are_autograds(dims):
    torch.manual_seed(0)
    module = adder_class(dims)(4, 4, 3, padding=1, stride=2, groups=2, gradient="exact")
    x = torch.randn(2, 4, *SIZES[dims], requires_grad=True)
    reference = adder_class(dims)(4, 4, 3, padding=1, stride=2, groups=2)
    reference.load_state_dict(module.state_dict())
    y = module(x)
    grad = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, module.weight), grad)
    # The op is piecewise linear: a central difference along a random direction gives the derivative.
    for tensor, derivative in ((x, dx), (module.weight, dw)):
        step = torch.randn_like(tensor).double() * 1e-6
        shifted = []
        for sign in (1, -1):
            a = x.detach().double() + (sign * step if tensor is x else 0)
            double = adder_class(dims)(4, 4, 3, padding=1, stride=2, groups=2).double()
            double.weight.data.copy_(module.weight.detach().double() + (0 if tensor is x else sign * step))
            shifted.append((double(a).detach() * grad.double()).sum())
        numeric = (shifted[0] - shifted[1]) / 2
        torch.testing.assert_close((derivative.double() * step).sum(), numeric, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("dims", "kind"), [(1, AdderConv1d), (2, AdderConv2d), (3, AdderConv3d)])
def test_from_conv_shares_the_parameters(dims, kind):
    conv = CONVOLUTIONS[dims](4, 8, 3, stride=2, padding=1, groups=2, padding_mode="circular").eval()
    adder = kind.from_conv(conv, norm=True)
    assert adder.weight is conv.weight
    assert adder.bias is conv.bias
    assert not adder.training
    x = torch.randn(2, 4, *SIZES[dims])
    assert adder(x).shape == conv(x).shape
    assert set(conv.state_dict()) < set(adder.state_dict())


def test_from_conv_understands_same_padding():
    conv = nn.Conv2d(3, 4, (2, 5), padding="same", dilation=(1, 2))
    assert AdderConv2d.from_conv(conv)(torch.randn(1, 3, 9, 9)).shape[2:] == (9, 9)


def test_bad_configurations():
    with pytest.raises(ValueError, match="groups=3"):
        AdderConv2d(4, 6, 3, groups=3)
    with pytest.raises(ValueError, match="needs stride 1"):
        AdderConv2d(4, 6, 3, padding="same", stride=2)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_copies_of_the_input_are_layers_added_up(dims):
    torch.manual_seed(0)
    module = adder_class(dims)(4, 6, 3, padding=1, copies=3)
    x = torch.randn(2, 4, *SIZES[dims])
    expected = torch.zeros(2, 6, *SIZES[dims], dtype=torch.float64)
    for size, weight in zip((1, 2, 4), module.weight.detach().chunk(3, 1), strict=True):
        plain = adder_class(dims)(4, 6, 3, padding=1)
        plain.weight.data.copy_(weight)
        expected += by_taps(plain, size * x)
    torch.testing.assert_close(module(x).double(), expected, rtol=0, atol=2e-6 * expected.abs().max().item())


def test_copies_of_a_linear_layers_input():
    torch.manual_seed(0)
    module, x = AdderLinear(5, 3, copies=2), torch.randn(2, 7, 5)
    first, second = module.weight.detach().chunk(2, 1)
    expected = -((x[..., None, :] - first).abs() + (2 * x[..., None, :] - second).abs()).sum(-1)
    torch.testing.assert_close(module(x).detach(), expected)


def test_weights_of_plain_copies_do_the_same():
    torch.manual_seed(0)
    module, x = AdderConv2d(4, 6, 3, copies=3), torch.randn(2, 4, 7, 7)
    plain = AdderConv2d(4 * module.repeats, 6, 3)
    plain.weight = nn.Parameter(module.repeated(module.weight))
    torch.testing.assert_close(plain(x.repeat(1, 7, 1, 1)), module(x))


def test_several_weights_per_input_begin_as_the_convolutions_and_need_one_group():
    conv = nn.Conv2d(4, 8, 3)
    adder = AdderConv2d.from_conv(conv, copies=2)
    assert torch.equal(adder.weight, torch.cat([conv.weight, 2 * conv.weight], 1))
    assert adder.bias is conv.bias and "copies=2" in repr(adder)
    with pytest.raises(ValueError, match="one group, not 2"):
        AdderConv2d(4, 6, 3, groups=2, copies=2)
    with pytest.raises(ValueError, match="copies=0"):
        AdderConv2d(4, 6, 3, copies=0)
