import json

import numpy as np
import pytest
import torch
from networks import Inverted, Residual, ZeroPadded
from quantized import adder_program, noise

from anncvt.errors import AnncvtError
from anncvt.passes.quantize import QuantizeConfig, quantize
from anncvt.runtime import integer_network, integer_torch
from anncvt.runtime.integer_network import accumulator_bits, accumulator_range, signed_bits


@pytest.fixture(scope="module")
def network():
    program = adder_program(Residual(), 8)
    return quantize(program, noise(32, (3, 8, 8)), QuantizeConfig(bits=6, groups=2))


@pytest.mark.parametrize("cnn", [Residual, ZeroPadded, Inverted])
@pytest.mark.parametrize("config", [QuantizeConfig(), QuantizeConfig(bits=4), QuantizeConfig(bits=5, groups=3)])
def test_whole_networks_run_alike_in_numpy_and_torch(cnn, config):
    program = adder_program(cnn(), 8)
    network = quantize(program, noise(16, (3, 8, 8)), config)
    images = noise(3, (3, 8, 8), 1).pixels
    seen = {}
    logits = integer_network.run(network, images.numpy(), lambda step, *values: seen.update({step.name: values}))

    def compare(step, output, accumulators):
        expected, sums = seen[step.name]
        assert np.array_equal(expected, output.numpy())
        assert (sums is None) == (accumulators is None)
        assert sums is None or np.array_equal(sums, accumulators.numpy())

    assert np.array_equal(logits, integer_torch.run(network, images, compare).numpy())
    assert logits.shape == (3, 5) and logits.dtype == np.int32 and len(seen) == len(network.steps)


def test_saving_and_loading_changes_nothing(network, tmp_path):
    integer_network.save(network, tmp_path)
    again = integer_network.load(tmp_path)
    assert integer_network.describe(again) == integer_network.describe(network)
    kept = integer_network.arrays(again)
    for name, value in integer_network.arrays(network).items():
        assert kept[name].dtype == value.dtype and np.array_equal(kept[name], value)
    pixels = noise(2, (3, 8, 8)).pixels.numpy()
    assert np.array_equal(integer_network.run(again, pixels), integer_network.run(network, pixels))


def test_accumulators_stay_within_what_is_proven(network):
    def inside(step, output, accumulators):
        if accumulators is None:
            return
        low, high = accumulator_range(network, step)
        assert np.all(accumulators >= low.reshape(1, -1, 1, 1)) and np.all(accumulators <= high.reshape(1, -1, 1, 1))
        assert signed_bits(int(accumulators.min())) <= accumulator_bits(network, step) <= 32
        assert output.max() <= step.epilogue.high and output.min() >= step.epilogue.low

    for seed in range(4):
        integer_network.run(network, noise(2, (3, 8, 8), seed).pixels.numpy(), inside)


def test_the_least_accumulator_of_an_adder_is_reached(network):
    step = next(step for step in network.steps if step.op == "adder")
    top = network.step(step.inputs[0]).grid.top
    low, _ = accumulator_range(network, step)
    for o in range(len(step.weight)):
        farthest = np.where(step.weight[o] > top / 2, 0, top).astype(np.int64)
        assert -np.abs(farthest - step.weight[o]).sum() == low[o]


@pytest.mark.parametrize(("number", "bits"), [(0, 1), (-1, 1), (1, 2), (127, 8), (-128, 8), (128, 9), (-129, 9)])
def test_bits_of_twos_complement(number, bits):
    assert signed_bits(number) == bits


def test_what_may_overflow_is_refused(network):
    import dataclasses

    last = network.steps[-1]
    huge = dataclasses.replace(last.epilogue, bias=np.full(last.shape[0], 2**62, np.int64), shift=31)
    huge = dataclasses.replace(huge, multiplier=np.full(last.shape[0], 2**31 - 1, np.int32))
    wide = dataclasses.replace(last, epilogue=huge, weight=np.full((5, 2**20, 1, 1), 127, np.int8))
    with pytest.raises(AnncvtError, match="accumulator"):
        integer_network.verify(dataclasses.replace(network, steps=(*network.steps[:-1], wide)))


def test_pixels_of_another_size_or_type_are_refused(network):
    for pixels in (np.zeros((1, 3, 9, 9), np.uint8), np.zeros((1, 3, 8, 8), np.float32)):
        with pytest.raises(AnncvtError, match="takes uint8 pixels"):
            integer_network.run(network, pixels)


def test_the_pixel_table_is_the_preprocessing(network):
    values = (np.arange(256) / 255 - 0.5) / 0.25
    assert np.array_equal(network.table[0], network.input_grid.quantise(values))
    pixels = torch.arange(192, dtype=torch.uint8).view(1, 3, 8, 8).numpy()
    assert np.array_equal(network.enter(pixels), np.take(network.table[0], pixels))


def test_a_missing_or_damaged_network_is_told(network, tmp_path):
    with pytest.raises(AnncvtError, match="no integer network"):
        integer_network.load(tmp_path)
    integer_network.save(network, tmp_path)
    file = tmp_path / integer_network.DESCRIPTION
    data = json.loads(file.read_text())
    for damaged in ({**data, "steps": [{"name": "x"}]}, {**data, "format": 99}, {}):
        file.write_text(json.dumps(damaged))
        with pytest.raises(AnncvtError, match=r"damaged|newer"):
            integer_network.load(tmp_path)
    file.write_text(json.dumps(data))
    (tmp_path / integer_network.ARRAYS).write_bytes(b"nothing")
    with pytest.raises(AnncvtError, match="damaged"):
        integer_network.load(tmp_path)
