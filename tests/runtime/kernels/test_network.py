"""Whole networks lowered to blocked kernels, against torch in float64; and what is said about those that cannot be."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

tvm = pytest.importorskip("tvm")

from tvm import relax  # noqa: E402

from anncvt.errors import AnncvtError  # noqa: E402
from anncvt.nn import AdderConv2d  # noqa: E402
from anncvt.runtime.kernels.deployment import Deployment  # noqa: E402
from anncvt.runtime.kernels.network import export, lower  # noqa: E402
from anncvt.runtime.kernels.target import host  # noqa: E402


def kernels(module: tvm.IRModule) -> int:
    """How many kernel calls one run makes."""
    return module["main"].script().count("R.call_tir(")


def compare(network: nn.Module, x: Tensor, tolerance: float = 1e-5) -> tvm.IRModule:
    module, shape, _ = lower({"main": export(network, x.shape)}, Deployment.parse("cpu"))
    machine = relax.VirtualMachine(tvm.compile(module, host().target()), tvm.cpu())
    got = torch.from_numpy(machine["main"](tvm.runtime.tensor(x.numpy())).numpy())
    with torch.no_grad():
        expected = copy.deepcopy(network).eval().double()(x.double())
    assert got.shape == expected.shape == (len(x), *shape)
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()
    return module


def settle(network: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Random parameters everywhere, batch statistics that fit them."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, generator=generator)
            module.momentum = None
        elif isinstance(module, AdderConv2d | nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=0.5, generator=generator)
    with torch.no_grad():
        network.train()(torch.randn(shape, generator=generator))
    return network.eval()


class Block(nn.Module):
    """A residual block with the parameter-free shortcut: every second pixel, zero channels around."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = AdderConv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = AdderConv2d(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(x + y)


class Head(nn.Module):
    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


def test_residual_network_is_one_kernel_per_layer() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    network = nn.Sequential(stem, Block(16, 16, 1), Block(16, 32, 2), Head(32, 10))
    module = compare(settle(network, (4, 3, 12, 12)), torch.randn(2, 3, 12, 12))
    # five layers, one shortcut, mean, linear, and the logits back in torch's layout
    assert kernels(module) == 9


class Gated(nn.Module):
    """Inverted residual with squeeze-and-excitation: depthwise, 1x1, hard-swish, gate."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(AdderConv2d(channels, 40, 1), nn.BatchNorm2d(40), nn.Hardswish())
        self.depthwise = nn.Sequential(AdderConv2d(40, 40, 3, 1, 1, groups=40), nn.BatchNorm2d(40), nn.ReLU6())
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(40, 8, 1), nn.ReLU(), nn.Conv2d(8, 40, 1), nn.Hardsigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(40, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        return x + self.project(y * self.gate(y))


class Branches(nn.Module):
    """Concatenation, pre-activation, pooling of both kinds, a bias on the adder, groups."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.left = AdderConv2d(channels, 12, 3, padding=1, bias=True)
        self.right = AdderConv2d(channels, 10, (1, 3), padding=(0, 1), groups=2)
        self.after = nn.BatchNorm2d(12 + 10 + channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(x))
        joined = torch.cat([self.left(y), F.avg_pool2d(self.right(y), 3, 1, 1), x], 1)
        return F.max_pool2d(F.silu(self.after(joined)), 3, 2, 1)


def test_gates_branches_and_poolings() -> None:
    stem = nn.Sequential(nn.Conv2d(1, 12, 3, 2, "valid"), nn.BatchNorm2d(12), nn.LeakyReLU(0.1))
    tail = nn.Sequential(nn.Dropout(), nn.Flatten(), nn.Linear(34 * 9, 20), nn.Tanh(), nn.Linear(20, 3))
    network = nn.Sequential(stem, Gated(12), Branches(12), nn.AdaptiveAvgPool2d(3), tail)
    compare(settle(network, (4, 1, 15, 15)), torch.randn(2, 1, 15, 15))


class Foreign(nn.Module):
    """Operators without a kernel of ours, between layers that have one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.adder = nn.Conv2d(4, 16, 3), AdderConv2d(16, 20, 3)
        self.norm, self.rows, self.linear = nn.BatchNorm2d(20), nn.BatchNorm1d(20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(torch.sin(self.conv(x)), scale_factor=2, mode="nearest")
        x = x.unflatten(1, (2, 8)).transpose(1, 2).flatten(1, 2)
        y = self.norm(self.adder(F.pad(x, (1, 1, 1, 1), mode="reflect")))
        return F.softmax(self.linear(self.rows(y.flatten(2)).amax(2) - 1), dim=1)


def test_other_operators_take_the_general_way() -> None:
    compare(settle(Foreign(), (4, 4, 8, 8)), torch.randn(1, 4, 8, 8))


class Arithmetic(nn.Module):
    """Everything an epilogue may or may not take: constants, products, differences, a value used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = AdderConv2d(3, 20, 3, padding=1), nn.Conv2d(20, 20, 1)
        self.scale = nn.Parameter(torch.randn(20, 1, 1))
        self.head = Head(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.b(y.clamp(-40, -2)) * self.scale - 0.5
        z = torch.maximum(z + z, y / 3) - y * 0.25
        z = (z * y.sigmoid() + y).relu() + z[:, :, :1, :1]
        return self.head(z + 2 * z.abs())


def test_arithmetic_between_layers() -> None:
    compare(settle(Arithmetic(), (4, 3, 5, 6)), torch.randn(2, 3, 5, 6))


def test_explicit_padding_joins_the_layer() -> None:
    network = nn.Sequential(
        nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 16, 3, 2), nn.ZeroPad2d(1), AdderConv2d(16, 16, 3), Head(16, 2)
    )
    module = compare(settle(network, (2, 3, 8, 8)), torch.randn(1, 3, 8, 8))
    # two layers, mean, linear, logits, and the image: its padding comes before it is blocked
    assert kernels(module) <= 7


class Standardised(nn.Conv2d):
    """A convolution whose weights are normalised in each call, by an operator of several results."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.flatten(1)[None], None, None, training=True)
        return F.conv2d(x, weight.view_as(self.weight), self.bias, self.stride, self.padding)


def test_weights_that_are_computed_from_parameters_are_constants() -> None:
    network = nn.Sequential(Standardised(3, 16, 3, 2, 1), nn.ReLU(), AdderConv2d(16, 16, 3), Head(16, 4))
    assert kernels(compare(settle(network, (2, 3, 9, 9)), torch.randn(2, 3, 9, 9))) <= 5


def test_exporting_leaves_the_mode_alone() -> None:
    network = nn.Sequential(AdderConv2d(3, 4, 1), Head(4, 2)).train()
    export(network, (1, 3, 4, 4))
    assert network.training and network[0].training


@pytest.mark.filterwarnings("ignore")
def test_unknown_operators_are_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.i0(x).mean((2, 3)) + torch.lgamma(x).mean((2, 3))

    with pytest.raises(AnncvtError, match=r"i0.*lgamma|lgamma.*i0"):
        lower({"main": export(Odd(), (1, 3, 4, 4))}, Deployment.parse("cpu"))


def test_data_dependent_control_flow_is_refused() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))

    with pytest.raises(AnncvtError, match=r"torch\.export cannot follow"):
        export(Branching(), (1, 3, 4, 4))


class Segmentation(nn.Module):
    """Scores of every pixel, from maxima of cells, enlarged to the image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), AdderConv2d(16, 20, 3), nn.BatchNorm2d(20))
        self.pool, self.head = nn.AdaptiveMaxPool2d((4, 3)), nn.Conv2d(20, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.head(self.pool(self.body(x))), x.shape[2:], mode="bilinear", align_corners=False)


def test_outputs_may_be_images() -> None:
    compare(settle(Segmentation(), (4, 3, 9, 8)), torch.randn(2, 3, 9, 8))


class Twice(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.relu(x), F.silu(x)


@pytest.mark.parametrize("network", [nn.Flatten(0), Twice()])
def test_output_must_be_one_tensor_of_a_row_for_each_image(network: nn.Module) -> None:
    with pytest.raises(AnncvtError, match="not one tensor of logits"):
        lower({"main": export(network, (2, 3, 4, 4))}, Deployment.parse("cpu"))


def test_places_of_maxima_are_refused_by_name() -> None:
    with pytest.raises(AnncvtError, match="getitem of adaptive_max_pool2d"):
        lower({"main": export(nn.AdaptiveMaxPool2d(1, return_indices=True), (2, 3, 4, 4))}, Deployment.parse("cpu"))
