import pytest
import torch
import torch.nn.functional as F
from networks import Awkward, Same
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from anncvt.convolution import NoForm, effective_weight, form_of
from anncvt.nn import adder_class


class Dynamic(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight * x.mean(), self.bias)


class Twice(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(self._conv_forward(x, self.weight, self.bias), self.weight, self.bias)


class Activated(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).relu()


class OwnPadding(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (1, 0, 1, 0)))


class OwnStride(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, 2)


class Fails(nn.Conv2d):
    def forward(self, x):
        raise KeyError("x")


def as_convolution(conv, form):
    """The layer again, from its form alone: geometry as the adder that takes its place has it."""
    adder = adder_class(len(conv.kernel_size)).from_conv(conv, weight=nn.Parameter(form.weight.clone()))
    adder.same = form.same
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[adder.ndim]

    def forward(x, padding):
        flat = [side for pair in reversed(padding) for side in pair]
        return convolve(F.pad(x, flat), form.weight, None, adder.stride, 0, adder.dilation, adder.groups)

    adder._adder = forward
    return adder


PLAIN = [nn.Conv1d(4, 6, 3, 2, 1), nn.Conv2d(4, 6, 3, groups=2), nn.Conv3d(4, 6, 2, padding="same")]
FOLDED = [
    lambda: weight_norm(nn.Conv2d(4, 6, 3, 2, 1)),
    lambda: weight_norm(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")),
    lambda: spectral_norm(nn.Conv1d(4, 6, 3)),
    lambda: weight_norm(nn.Conv3d(2, 4, 3, padding="same", bias=False)),
    lambda: torch.nn.utils.weight_norm(nn.Conv2d(4, 6, 3, dilation=2)),
    lambda: Awkward.Standardised(4, 6, 3, padding=(1, 0)),
]


@pytest.mark.parametrize("conv", PLAIN, ids=lambda conv: type(conv).__name__)
def test_plain_convolutions_keep_their_parameter(conv):
    form = form_of(conv)
    assert form.weight is conv.weight and not form.folded and not form.same


@pytest.mark.parametrize("make", FOLDED)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_computed_weights_are_found_and_exact(make):
    torch.manual_seed(0)
    conv = make().eval()
    form = form_of(conv)
    assert form.folded and not form.weight.requires_grad
    assert torch.equal(effective_weight(conv), form.weight)
    x = torch.randn(2, conv.in_channels, *(9, 8, 7)[: len(conv.kernel_size)])
    assert torch.allclose(as_convolution(conv, form)(x), conv(x), atol=1e-6)


@pytest.mark.parametrize("options", [{"stride": 2}, {"stride": (1, 3), "dilation": 2}, {"groups": 2, "bias": False}])
@pytest.mark.parametrize("size", [(7, 8), (9, 10), (12, 11)])
def test_padding_by_the_size_of_the_input(options, size):
    conv = Same(4, 6, 3, **options).eval()
    form = form_of(conv)
    assert form.same and form.weight is conv.weight
    x = torch.randn(2, 4, *size)
    assert torch.allclose(as_convolution(conv, form)(x), conv(x), atol=1e-6)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (Dynamic(4, 4, 3), "depend on its input"),
        (Twice(4, 4, 1), "more than a plain"),
        (Activated(4, 4, 3), "more than a plain"),
        (OwnPadding(4, 4, 3), "padding differs"),
        (OwnStride(4, 4, 3), "differs from a plain"),
        (Fails(4, 4, 3), "KeyError"),
        (nn.ConvTranspose2d(4, 4, 3), "transposed"),
        (nn.Conv2d(4, 4, 3, dtype=torch.complex64), "complex numbers"),
        (nn.Linear(4, 4), "not a convolution"),
    ],
)
def test_what_is_no_plain_convolution_says_why(conv, reason):
    with pytest.raises(NoForm, match=reason):
        form_of(conv)


def test_a_hook_keeps_a_layer():
    conv = nn.Conv2d(4, 4, 3)
    conv.register_forward_pre_hook(lambda module, inputs: None)
    with pytest.raises(NoForm, match="hooks"):
        form_of(conv)


def test_examining_changes_nothing():
    conv = spectral_norm(nn.Conv2d(4, 4, 3)).train()
    before = {name: value.clone() for name, value in conv.state_dict().items()}
    state = torch.get_rng_state()
    form_of(conv)
    assert conv.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in conv.state_dict().items())
