import pytest
import torch
from networks import Inverted, Residual, ZeroPadded
from quantized import adder_program, noise

from anncvt.passes.quantize import QuantizeConfig, quantize
from anncvt.quantization import accuracy_of
from anncvt.runtime import integer_torch, integer_tvm

pytestmark = pytest.mark.skipif(not integer_tvm.usable(), reason="TVM is not installed")


@pytest.mark.parametrize(
    ("cnn", "config"),
    [
        (Residual, QuantizeConfig(groups=3)),
        (ZeroPadded, QuantizeConfig(bits=4)),
        (Inverted, QuantizeConfig(bits=6)),
    ],
)
def test_compiled_kernels_give_the_same_bits(cnn, config):
    program = adder_program(cnn(), 8)
    network = quantize(program, noise(16, (3, 8, 8)), config)
    images = noise(5, (3, 8, 8), 1).pixels
    expected = {}
    integer_torch.run(network, images, lambda step, output, _: expected.update({step.name: output}))

    def compare(step, output, accumulators):
        assert torch.equal(output, expected[step.name]) and output.dtype == expected[step.name].dtype, step.name

    compiled = integer_tvm.Compiled(network)
    logits = compiled.run(images, compare)
    assert torch.equal(logits, integer_torch.run(network, images))
    # Other batches go on with the same kernels.
    assert torch.equal(compiled.run(images[:2]), logits[:2])


def test_accuracy_is_the_same_without_them(monkeypatch):
    program = adder_program(Residual(), 8)
    network = quantize(program, noise(16, (3, 8, 8)))
    images = noise(20, (3, 8, 8))
    labels = integer_torch.run(network, images.pixels).argmax(1)
    labelled = type(images)(images.pixels, labels.roll(1), None, "noise")
    with_kernels = accuracy_of(network, labelled)
    monkeypatch.setattr(integer_tvm, "usable", lambda: False)
    assert accuracy_of(network, labelled) == with_kernels
