import numpy as np
import pytest
import torch
from networks import Inverted, Joined, Residual, Same, Shuffled, ZeroPadded
from quantized import adder_program, noise
from torch import nn

from anncvt.errors import AnncvtError
from anncvt.passes.choice import Choice
from anncvt.passes.pieces_of import pieces_of
from anncvt.passes.quantize import QuantizeConfig, quantize
from anncvt.runtime import integer_torch

CALIBRATION, TEST = noise(48, (3, 8, 8)), noise(32, (3, 8, 8), 1)


def agreement(program, config):
    """Correlation of integer and float logits."""
    network = quantize(program, CALIBRATION, config)
    with torch.no_grad():
        expected = program.student(TEST.batch(torch.arange(len(TEST)), program.preprocess))
    found = network.steps[-1].grid.scale * integer_torch.run(network, TEST.pixels)
    return float(torch.corrcoef(torch.stack([expected.flatten(), found.flatten()]))[0, 1])


@pytest.mark.parametrize("cnn", [Residual, ZeroPadded, Inverted, Joined, Shuffled])
@pytest.mark.parametrize(
    ("config", "least"),
    [
        (QuantizeConfig(), 0.995),
        (QuantizeConfig(range="percentile"), 0.995),
        (QuantizeConfig(range="entropy"), 0.98),
        (QuantizeConfig(power_of_two=True), 0.99),
        (QuantizeConfig(fit=False), 0.99),
        (QuantizeConfig(groups=2), 0.99),
        (QuantizeConfig(bits=6), 0.98),
        (QuantizeConfig(bits=4), 0.9),
    ],
)
def test_the_integers_compute_what_the_student_does(cnn, config, least):
    torch.manual_seed(0)
    assert agreement(adder_program(cnn(), 8), config) > least


def test_fewer_bits_where_only_adders_read():
    network = quantize(adder_program(Residual(), 8), CALIBRATION, QuantizeConfig(bits=4))
    bits = {step.name: step.grid.bits for step in network.steps}
    assert bits == {"stem": 4, "conv1": 4, "conv2": 8, "down.0": 8, "mean": 8, "head": 32}
    mixed = quantize(adder_program(ZeroPadded(), 8), CALIBRATION, QuantizeConfig(bits=4))
    assert mixed.step("stem").grid.bits == 8 and mixed.step("conv1").inputs == ("stem@4",)
    for step in mixed.steps:
        if step.op == "adder":
            assert step.weight.max() <= 15


def test_layers_that_read_one_tensor_share_its_grid():
    network = quantize(adder_program(Residual(), 8), CALIBRATION)
    assert network.step("conv1").inputs == network.step("down.0").inputs == ("stem",)


def test_what_is_concatenated_is_on_one_grid():
    """Nothing is requantised for it, but the image, whose grid is that of its pixels."""
    network = quantize(adder_program(Joined(), 8), CALIBRATION, QuantizeConfig(bits=6))
    joined = [step for step in network.steps if step.op == "concatenate"]
    grids = {network.grid(name) for step in joined for name in (step.name, *step.inputs)}
    assert len(joined) == 3 and len(grids) == 1 and grids != {network.input_grid}
    rescaled = [step.name for step in network.steps if step.op == "rescale" and not step.name.endswith("@6")]
    assert rescaled == ["first.0", "second.0", "getitem.rescaled"]  # two of them are norms


def test_weights_outside_the_range_are_clamped_without_loss():
    """Far weights shift a filter by a constant; the integers must not see them differently from clamped ones."""
    program = adder_program(Residual(), 8)
    near = quantize(program, CALIBRATION, QuantizeConfig(fit=False))
    grid = near.step("stem").grid
    conv1, bn1 = program.student.conv1, program.student.bn1
    with torch.no_grad():
        conv1.weight[0, 0, 0, 0] = grid.high
        reference = quantize(program, CALIBRATION, QuantizeConfig(fit=False)).step("conv1")
        conv1.weight[0, 0, 0, 0] = grid.high + 7
        bn1.running_mean[0] -= 7  # what the constant is
    far = quantize(program, CALIBRATION, QuantizeConfig(fit=False)).step("conv1")
    assert np.array_equal(far.weight, reference.weight)
    assert np.array_equal(far.epilogue.multiplier, reference.epilogue.multiplier)
    # The stem's float32 activations, and with them the grid, may differ in their last bits from run to run.
    np.testing.assert_allclose(far.epilogue.bias, reference.epilogue.bias, rtol=1e-5, atol=1)


def test_padding_is_exactly_zero():
    network = quantize(adder_program(Inverted(), 8), CALIBRATION)
    for step in network.steps:
        for name, value in zip(step.inputs, step.pad_values, strict=False):
            grid = network.input_grid if name == "input" else network.step(name).grid
            assert grid.values(np.array(value)) == 0


def test_filter_groups_have_grids_of_their_own():
    network = quantize(adder_program(Residual(), 8), CALIBRATION, QuantizeConfig(groups=3))
    step = network.step("conv2")
    assert 1 < len(step.inputs) <= 3 and set(step.filter_group) == set(range(len(step.inputs)))
    assert all(network.step(name).op == "rescale" for name in step.inputs)


def test_totals_of_small_layers_fit_32_bits():
    network = quantize(adder_program(Residual(), 8), CALIBRATION)
    for step in network.steps:
        if step.op == "adder":
            largest = int(np.abs(step.epilogue.multiplier).max())
            assert 2 * 255 * step.weight[0].size * largest < 1 << 31
            assert largest >= 1 << 10 or step.residual is not None


def test_powers_of_two():
    network = quantize(adder_program(ZeroPadded(), 8), CALIBRATION, QuantizeConfig(power_of_two=True, bits=6))
    for step in network.steps:
        assert np.frexp(step.grid.scale)[0] == 0.5
        if step.residual is not None:
            assert bin(step.epilogue.residual_multiplier).count("1") == 1


def test_the_same_images_give_the_same_integers():
    program = adder_program(Inverted(), 8)
    first, second = (quantize(program, CALIBRATION, QuantizeConfig(bits=5)) for _ in range(2))
    for a, b in zip(first.steps, second.steps, strict=True):
        assert a.grid == b.grid and (a.weight is None or np.array_equal(a.weight, b.weight))
        assert a.epilogue is None or np.array_equal(a.epilogue.bias, b.epilogue.bias)


def test_an_adder_with_a_norm_and_a_bias_of_its_own():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.conv(self.stem(x).relu()).relu().mean((2, 3)))

    program = adder_program(Bare(), 8)
    assert program.student.conv.norm is not None and program.student.conv.bias is not None
    assert agreement(program, QuantizeConfig()) > 0.99
    assert [piece.op for piece in pieces_of(program).order] == ["convolution", "adder", "sum_pool", "convolution"]


class Classifier(nn.Module):
    """Linear layers with and without a BatchNorm behind, as of a VGG."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.conv = nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, bias=False)
        self.hidden = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 12))
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.conv(self.norm(self.stem(x)).relu())
        return self.head(self.hidden(x.flatten(1)).relu())


@pytest.mark.parametrize("config", [QuantizeConfig(), QuantizeConfig(bits=6, groups=2)])
def test_linear_adders(config):
    program = adder_program(Classifier(), 8, choice=Choice(linear=True))
    swapped = {layer.name for layer in program.plan.swapped}
    assert {"hidden.0", "hidden.4"} <= swapped
    assert agreement(program, config) > 0.97
    ops = {piece.name: piece.op for piece in pieces_of(program).order}
    assert all(ops[name] == "adder" for name in swapped)


@pytest.mark.parametrize("cnn", [Residual, Inverted, Classifier])
@pytest.mark.parametrize(("config", "least"), [(QuantizeConfig(), 0.995), (QuantizeConfig(bits=6, groups=2), 0.97)])
def test_several_weights_per_input(cnn, config, least):
    assert agreement(adder_program(cnn(), 8, choice=Choice.of(copies=2, linear=True)), config) > least


def test_linear_adders_over_more_than_rows_are_refused():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.mix, self.head = nn.Conv2d(3, 4, 4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.mix(self.stem(x).flatten(2).transpose(1, 2)).mean(1))

    with pytest.raises(AnncvtError, match=r"flatten|transpose|mix"):
        quantize(adder_program(Tokens(), 8, choice=Choice(linear=True)), CALIBRATION)


def test_padding_by_the_size_of_the_input():
    """TensorFlow's SAME pads this input on one side only."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.conv, self.bn, self.head = Same(4, 6, 3, 2), nn.BatchNorm2d(6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.bn(self.conv(self.norm(self.stem(x)).relu())).relu().mean((2, 3)))

    program = adder_program(Net(), 8)
    assert program.student.conv.same
    assert quantize(program, CALIBRATION).step("conv").window.padding == (0, 0, 1, 1)
    assert agreement(program, QuantizeConfig()) > 0.99


@pytest.mark.parametrize("config", [QuantizeConfig(bits=7), QuantizeConfig(groups=0), QuantizeConfig(range="all")])
def test_impossible_choices_are_told(config):
    with pytest.raises(AnncvtError, match="cannot quantize"):
        quantize(adder_program(Residual(), 8), CALIBRATION, config)


def test_nothing_to_quantize_or_to_calibrate_with_is_told():
    program = adder_program(Residual(), 8)
    with pytest.raises(AnncvtError, match="no images"):
        quantize(program, CALIBRATION.subset([]))
    program.student = None
    with pytest.raises(AnncvtError, match="no adder network"):
        quantize(program, CALIBRATION)
