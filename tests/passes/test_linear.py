"""Linear layers as adders: planned, rewritten, fitted, exported."""

import pytest
import torch
from networks import Mobile, Residual
from torch import Tensor, nn

from anncvt.images import Images
from anncvt.loading import load
from anncvt.nn import AdderLinear, LastNorm
from anncvt.passes.calibrate import CalibrationConfig, calibrate
from anncvt.passes.choice import Choice
from anncvt.passes.fit_blocks import BlockFit
from anncvt.passes.fit_jointly import JointFit
from anncvt.passes.fit_layers import LayerFit
from anncvt.passes.pairing import pairs
from anncvt.passes.plan import plan
from anncvt.passes.rewrite import rewrite
from anncvt.pkkd import DistillConfig, distill


class Mixer(nn.Module):
    """A small ConvNeXt: depthwise convolution, LayerNorm and two Linear layers on the last dimension."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 2, 2)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.widen, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.hidden = nn.Sequential(nn.Linear(width, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        x = x + self.narrow(self.widen(y).relu()).permute(0, 3, 1, 2)
        return self.head(self.hidden(x.mean((2, 3))))


def converted(network=None, size=8):
    torch.manual_seed(0)
    return rewrite(plan(load(network or Mixer(), input_size=size), Choice(linear=True)))


def test_plan():
    layers = {layer.name: layer for layer in converted().plan.layers}
    assert list(layers) == ["stem", "depthwise", "widen", "narrow", "hidden.0", "head"], "in execution order"
    assert {name for name, layer in layers.items() if layer.swapped} == {"widen", "narrow", "hidden.0"}
    widen = layers["widen"]
    assert widen.kind == "Linear" and widen.kernel == () and widen.macs == 16 * 6 * 12 and widen.insert_bn
    assert layers["hidden.0"].bn == "hidden.1" and layers["head"].reason.startswith("classifier")


def test_totals_leave_nothing_out():
    with_linear = converted().plan
    assert with_linear.other_macs == 0
    totals = with_linear.totals()
    assert (totals["convolutions"], totals["linears"], totals["swapped_linears"]) == (2, 4, 3)
    assert totals["macs"] == sum(layer.macs for layer in with_linear.layers)


def test_gates_of_linear_layers_are_kept():
    class Gated(Residual):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(4, 4)

        def forward(self, x):
            x = self.bn(self.stem(x))
            x = x * self.gate(x.mean((2, 3)))[:, :, None, None].sigmoid()
            return self.head(self.bn2(self.conv2(self.bn1(self.conv1(x)))).mean((2, 3)))

    layers = {layer.name: layer for layer in plan(load(Gated(), input_size=8), Choice(linear=True)).plan.layers}
    assert layers["gate"].reason.startswith("gate") and layers["head"].reason.startswith("classifier")


@pytest.mark.parametrize("shape", [(3, 6), (3, 5, 6), (3, 5, 4, 6), (2, 3, 2, 5, 6)])
def test_values(shape):
    torch.manual_seed(0)
    linear = nn.Linear(6, 4)
    adder = AdderLinear.from_linear(linear)
    assert adder.weight is linear.weight and set(adder.state_dict()) == set(linear.state_dict())
    x = torch.randn(shape, requires_grad=True)
    y = adder(x)
    expected = -(x.unsqueeze(-2) - linear.weight).abs().sum(-1) + linear.bias
    assert y.shape == (*shape[:-1], 4) and torch.allclose(y, expected, atol=1e-5)
    y.sum().backward()
    assert x.grad.shape == x.shape and linear.weight.grad.shape == (4, 6)


@pytest.mark.parametrize("shape", [(5, 6), (4, 3, 6), (2, 3, 2, 6)])
def test_the_norm_is_over_the_last_dimension(shape):
    x = torch.randn(shape) * 3 + 1
    y = LastNorm(6)(x)
    assert y.shape == x.shape
    assert torch.allclose(y.flatten(0, -2).mean(0), torch.zeros(6), atol=1e-5)


def test_rewritten_layers_fit_their_teacher():
    program = converted()
    assert isinstance(program.student.widen, AdderLinear) and isinstance(program.student.widen.norm, LastNorm)
    assert isinstance(program.student.hidden[0], AdderLinear) and program.student.hidden[0].norm is None
    assert [pair.name for pair in pairs(program)] == ["widen", "narrow", "hidden.0"]
    images = Images(torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8), None, None, "noise")
    config = CalibrationConfig(LayerFit(steps=30), BlockFit(steps=5), JointFit(steps=5, batch_size=16))
    metrics = calibrate(program, images, config=config).history[-1].metrics
    assert set(metrics["layers"]) == {"widen", "narrow", "hidden.0"}
    assert min(row["r2"] for row in metrics["layers"].values()) > 0.3
    x = torch.randn(3, 3, 8, 8)
    assert program.student(x).shape == (3, 5) and bool(torch.isfinite(program.student(x)).all())


def test_distillation_compares_features_per_channel(tmp_path):
    program = converted()
    before = program.student.widen.weight.clone()
    images = Images(torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8), torch.arange(32) % 5, None, "noise")
    distill(program, images, None, DistillConfig(epochs=1, batch_size=8), folder=tmp_path)
    assert not torch.equal(program.student.widen.weight, before)
    assert all(bool(torch.isfinite(value).all()) for value in program.student.state_dict().values())


def test_convolutions_stay_planned_as_without_linear():
    program = load(Mobile(), input_size=16)
    with_linear, without = plan(program, Choice(linear=True)).plan, plan(program).plan
    assert with_linear.layers == without.layers
