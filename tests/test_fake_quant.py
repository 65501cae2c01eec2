import copy

import pytest
import torch
from networks import Inverted, Joined, Residual, ZeroPadded
from quantized import adder_program, noise

import anncvt
from anncvt.fake_quant import FakeQuant, fake_quantised, straight_through
from anncvt.measure import DataChoice
from anncvt.nn import AdderConv2d, AdderLinear
from anncvt.passes.choice import Choice
from anncvt.passes.quantize import QuantizeConfig, quantize
from anncvt.runtime import integer, integer_network, integer_torch
from anncvt.runtime.integer import Grid

GRID = Grid(0.25, 4, 4)


@pytest.mark.parametrize("groups", [1, 3])
def test_it_computes_what_the_integers_do(groups):
    """Inputs on the 8-bit grid: the fake adder is the integer one times the scale, plus what clamping left."""
    program = adder_program(Residual(), 8)
    network = quantize(program, noise(32, (3, 8, 8)), QuantizeConfig(groups=groups))
    step = next(step for step in network.steps if step.name == "conv2")
    adder = program.student.conv2
    with torch.no_grad():
        adder.weight[0] += 30  # outside the grid
    network = quantize(program, noise(32, (3, 8, 8)), QuantizeConfig(groups=groups))
    step = network.step("conv2")
    x = torch.rand(2, 8, 4, 4) * 2
    with fake_quantised(program.student, network), torch.no_grad():
        found = adder(x)
    scale = torch.tensor([network.grid(step.inputs[group]).scale for group in step.filter_group]).view(-1, 1, 1)
    integers = [network.grid(name).quantise(x.numpy()) for name in step.inputs]
    expected = torch.from_numpy(integer.accumulate(step, integers)) + torch.from_numpy(step.clamp).view(-1, 1, 1)
    torch.testing.assert_close(found, (expected * scale).float(), rtol=1e-5, atol=1e-3)
    assert adder.fake is None


def test_rounding_passes_the_gradient_through():
    x = torch.tensor([-1.0, 0.1, 0.13, 2.7], requires_grad=True)
    y = straight_through(x, GRID)
    assert y.tolist() == [-1.0, 0.0, 0.25, 2.75]
    y.sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 1]


def test_gradients_of_what_is_clamped():
    """Weights outside the grid keep the true subgradient, activations outside get none."""
    adder = AdderConv2d(1, 1, 1, gradient="exact")
    adder.fake = FakeQuant((GRID,), torch.zeros(1, dtype=torch.int64))
    with torch.no_grad():
        adder.weight.fill_(100.0)
    x = torch.tensor([0.5, 50.0]).view(1, 1, 1, 2).requires_grad_()
    y = adder(x)
    assert torch.allclose(y.flatten(), torch.tensor([-(100 - 0.5), -(100 - GRID.high)]))
    y.sum().backward()
    assert float(adder.weight.grad) == -2  # -|x - w| falls as w grows, at both pixels
    assert x.grad.flatten().tolist() == [1, 0]


@pytest.mark.parametrize("cnn", [Residual, ZeroPadded, Inverted])
def test_training_reaches_every_parameter(cnn):
    program = adder_program(cnn(), 8)
    network = quantize(program, noise(16, (3, 8, 8)), QuantizeConfig(bits=4, groups=2))
    before = copy.deepcopy(program.student.state_dict())
    with fake_quantised(program.student, network):
        program.student.train()(
            noise(4, (3, 8, 8)).batch(torch.arange(4), program.preprocess)
        ).square().sum().backward()
    for name, parameter in program.student.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name
    assert set(program.student.state_dict()) == set(before)


def test_an_error_leaves_the_network_as_it_was():
    program = adder_program(Residual(), 8)
    network = quantize(program, noise(16, (3, 8, 8)))
    with pytest.raises(RuntimeError, match="stop"), fake_quantised(program.student, network):
        assert program.student.conv1.fake is not None
        raise RuntimeError("stop")
    assert program.student.conv1.fake is None


def test_quantization_aware_distillation_of_a_folder(converted):
    before = anncvt.load(converted).student.state_dict()
    result = anncvt.quantize(converted, DataChoice("digits", limit=200), bits=4, qat=True, epochs=2, batch_size=32)
    assert result["settings"]["epochs"] == 2
    program = anncvt.load(converted)
    after = program.student.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert [record.stage for record in program.history][-3:] == ["distilled", "evaluated", "quantized"]
    assert integer_network.load(converted).settings["bits"] == 4
    assert not (converted / "train" / "checkpoint.pt").exists()


def test_training_options_without_qat_are_a_mistake(converted):
    from click.testing import CliRunner

    from anncvt.cli import cli

    shown = CliRunner().invoke(cli, ["quantize", str(converted), "--epochs", "3"])
    assert shown.exit_code == 2 and "--qat" in shown.output


@pytest.mark.parametrize(
    ("cnn", "groups", "copies", "layer"),
    [(ZeroPadded, 2, 1, "conv1"), (Residual, 1, 2, "conv1"), (Joined, 1, 1, "left.0")],
    ids=["groups", "copies", "concatenations"],
)
def test_integers_after_training_are_those_that_were_trained_for(cnn, groups, copies, layer):
    """Grids and groups stay although the weights have moved, and the line is fitted to what was trained."""
    program = adder_program(cnn(), 8, choice=Choice.of(copies=copies))
    images = noise(48, (3, 8, 8))
    config = QuantizeConfig(bits=4, groups=groups)
    before = quantize(program, images, config)
    torch.manual_seed(1)
    with torch.no_grad():
        weight = program.student.get_parameter(f"{layer}.weight")
        weight.add_(torch.randn_like(weight))
    x = images.batch(torch.arange(48), program.preprocess)
    with fake_quantised(program.student, before), torch.no_grad():
        wanted = program.student(x)
        after = quantize(program, images, config, trained_on=before)
    for step in before.steps:
        if step.op == "adder":
            twin = after.step(step.name)
            assert (twin.filter_group == step.filter_group).all() and twin.inputs == step.inputs
            assert [after.grid(name) for name in twin.inputs] == [before.grid(name) for name in step.inputs]
    got = after.steps[-1].grid.scale * integer_torch.run(after, images.pixels)
    assert float(torch.corrcoef(torch.stack([wanted.flatten(), got.flatten()]))[0, 1]) > 0.98


def test_linear_adders_are_faked_too():
    adder = AdderLinear(3, 2)
    x = torch.tensor([[0.6, -0.4, 2.0]])
    adder.fake = FakeQuant((GRID,), torch.zeros(2, dtype=torch.int64))
    with torch.no_grad():
        adder.weight.copy_(torch.tensor([[0.1, 0.0, 50.0], [0.9, 0.3, -0.1]]))
        found = adder(x)
    high = GRID.high
    expected = [-(0.5 - 0.0 + 0.5 + (high - 2.0) + (50 - high)), -(0.5 + 0.75 + 2.0)]
    torch.testing.assert_close(found, torch.tensor([expected]))
