"""Integer networks compiled as a whole: bit for bit the reference, whatever their steps are."""

import functools
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")

import tvm
from networks import Inverted, Joined, Residual, Shuffled, ZeroPadded
from quantized import adder_program, noise

from anncvt.errors import AnncvtError
from anncvt.passes.choice import Choice
from anncvt.passes.quantize import QuantizeConfig, quantize
from anncvt.program import Preprocess
from anncvt.runtime import integer_network
from anncvt.runtime import tvm as runtime
from anncvt.runtime.integer import Epilogue, Grid, Step, Window
from anncvt.runtime.integer_network import INPUT, IntegerNetwork
from anncvt.runtime.kernels import integer_data
from anncvt.runtime.kernels.deployment import Deployment

RANDOM = np.random.default_rng(0)
GRID = Grid(1.0, 9)
WIDE = (-(2**31), 2**31 - 1)


def equal(network: IntegerNetwork, pixels: np.ndarray, folder: Path) -> runtime.Model:
    """The compiled network, after comparing it with the reference on all ``pixels``, at once and in parts."""
    preprocess = Preprocess(network.input_shape, (0.5,), (0.25,))
    model = runtime.load(runtime.compile_network(network, preprocess, folder / "model.int8.so", batch=4))
    expected = integer_network.run(network, pixels)
    logits = model(pixels)
    assert logits.dtype == expected.dtype
    np.testing.assert_array_equal(logits, expected)
    np.testing.assert_array_equal(model(pixels[:1]), expected[:1])
    assert len({row.tobytes() for row in expected}) > 1
    return model


@pytest.mark.parametrize(
    ("cnn", "config", "copies"),
    [
        (Residual, QuantizeConfig(bits=5, groups=2), 1),
        (ZeroPadded, QuantizeConfig(bits=4), 1),
        (Inverted, QuantizeConfig(), 1),
        (Joined, QuantizeConfig(bits=6), 1),
        (Shuffled, QuantizeConfig(), 1),
        (Inverted, QuantizeConfig(), 2),
        (functools.partial(Residual, 16), QuantizeConfig(bits=6), 2),
    ],
)
def test_quantized_networks(cnn, config, copies, tmp_path):
    program = adder_program(cnn(), 8, choice=Choice.of(copies=copies))
    network = quantize(program, noise(16, (3, 8, 8)), config)
    model = equal(network, noise(7, (3, 8, 8), 1).pixels.numpy(), tmp_path)
    assert model.manifest["input"] == {"name": "pixels", "shape": ["batch", 3, 8, 8], "dtype": "uint8"}
    assert model.manifest["output"]["scale"] == network.steps[-1].grid.scale
    assert model.manifest["integers"]["bits"] == config.bits
    with pytest.raises(AnncvtError, match="expected pixels of uint8"):
        model(np.zeros((1, 3, 8, 8), np.float32))


def epilogue(count: int, taps: int, low: int = 0, high: int = 255, residual: int = 0) -> Epilogue:
    """One that spreads sums of ``taps`` differences of bytes over 0..255."""
    multiplier = RANDOM.integers(1, 3, count).astype(np.int32) * ((1 << 16) // taps)
    bias = multiplier.astype(np.int64) * (taps * 85) + RANDOM.integers(-(1 << 18), 1 << 18, count)
    return Epilogue(multiplier, bias, 16, low, high, residual)


def adder(name: str, inputs: tuple[str, ...], depth: int, count: int, end: Epilogue, residual: str | None) -> Step:
    """A fully connected adder, whose filters read one of ``inputs`` each, in no order."""
    weight = RANDOM.integers(0, 256, (count, depth, 1, 1)).astype(np.uint8)
    group = RANDOM.permutation(np.arange(count) % len(inputs)).astype(np.uint8)
    values = (9,) * len(inputs)
    shape = (count, 1, 1)
    return Step(
        name,
        "adder",
        inputs,
        shape,
        GRID,
        weight=weight,
        filter_group=group,
        pad_values=values,
        epilogue=end,
        residual=residual,
    )


def network(*steps: Step, channels: int) -> IntegerNetwork:
    table = RANDOM.permuted(np.tile(np.arange(256, dtype=np.uint8), (channels, 1)), axis=1)
    return IntegerNetwork(steps, (channels, 6, 7), GRID, table, {"bits": 8})


def test_steps_of_every_kind_with_uneven_geometry(tmp_path):
    """One channel, windows and borders that differ by side, groups and a residual in the last step."""
    window = Window((1, 2), (1, 0, 0, 1), (2, 1))
    pool = Step("pool", "max_pool", (INPUT,), (1, 5, 3), GRID, window, (2, 3))
    pad = Step(
        "pad", "pad", ("pool",), (18, 6, 5), GRID, Window(padding=(0, 1, 1, 1)), channels=(3, 14), pad_values=(9,)
    )
    strided = Step("slice", "slice", ("pad",), (18, 3, 5), GRID, Window((2, 1)))
    sums = Window((2, 1), (1, 0, 0, 1))
    mean = Step(
        "mean", "sum_pool", ("slice",), (18, 2, 5), GRID, sums, (2, 2), pad_values=(9,), epilogue=epilogue(18, 1)
    )
    flat = Step("flat", "flatten", ("mean",), (180, 1, 1), GRID)
    copy = Step("copy", "rescale", ("flat",), (180, 1, 1), GRID, epilogue=epilogue(180, 1, 3, 240))
    side = adder("side", ("flat", "copy"), 180, 21, epilogue(21, 180), None)
    again = adder("again", ("flat", "copy"), 180, 21, epilogue(21, 180, residual=-9000), "side")
    last = adder("last", ("copy", "flat"), 180, 21, epilogue(21, 180, *WIDE, residual=70000), "again")
    whole = network(pool, pad, strided, mean, flat, copy, side, again, last, channels=1)
    equal(whole, RANDOM.integers(0, 256, (6, 1, 6, 7)).astype(np.uint8), tmp_path)


def test_concatenations_begin_at_any_channel(tmp_path):
    """Parts that fill no block of channels, that fill some, and one that is read twice; the image itself among them."""
    joined = Step("joined", "concatenate", (INPUT, INPUT), (10, 6, 7), GRID)
    pad = Step("pad", "pad", ("joined",), (32, 6, 7), GRID, channels=(4, 18), pad_values=(9,))
    whole = Step("whole", "concatenate", ("pad", "joined"), (42, 6, 7), GRID)
    both = Step("both", "concatenate", (INPUT, "whole", "pad"), (79, 6, 7), GRID)
    average = Epilogue(np.full(79, 1 << 12, np.int32), np.zeros(79, np.int64), 15, 0, 255)
    mean = Step("mean", "sum_pool", ("both",), (79, 2, 7), GRID, kernel=(5, 1), pad_values=(9,), epilogue=average)
    flat = Step("flat", "flatten", ("mean",), (1106, 1, 1), GRID)
    last = adder("last", ("flat",), 1106, 21, epilogue(21, 50, *WIDE), None)
    pixels = RANDOM.integers(0, 256, (6, 5, 6, 7)).astype(np.uint8)
    equal(network(joined, pad, whole, both, mean, flat, last, channels=5), pixels, tmp_path)


def test_a_pooling_sum_can_be_the_last_step(tmp_path):
    weight = RANDOM.integers(-128, 128, (5, 20, 3, 3)).astype(np.int8)
    end = Epilogue(np.full(5, 40, np.int32), np.full(5, 100 << 16, np.int64), 16, 0, 255)
    convolution = Step("conv", "convolution", (INPUT,), (5, 4, 5), GRID, kernel=(3, 3), weight=weight, pad_values=(9,))
    mean = Step("mean", "sum_pool", ("conv",), (5, 1, 1), GRID, kernel=(4, 5), pad_values=(9,))
    steps = [
        Step(**{**vars(convolution), "epilogue": end}),
        Step(**{**vars(mean), "epilogue": epilogue(5, 4 * 5, *WIDE)}),
    ]
    equal(network(*steps, channels=20), RANDOM.integers(0, 256, (3, 20, 6, 7)).astype(np.uint8), tmp_path)


def test_what_does_not_fit_bytes_is_refused_by_name(tmp_path):
    flat = Step("flat", "flatten", (INPUT,), (42, 1, 1), GRID)
    broad = adder("broad", ("flat",), 42, 4, epilogue(4, 42, *WIDE), None)
    last = adder("last", ("broad",), 4, 4, epilogue(4, 42, *WIDE), None)
    with pytest.raises(AnncvtError, match="broad"):
        runtime.compile_network(
            network(flat, broad, last, channels=1), Preprocess((1, 6, 7), (0.5,), (0.25,)), tmp_path / "model.so"
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [(5, 5), (9, 9)])  # less than a vector of pixels, and vectors that overlap
def test_pixels_are_looked_up(size):
    target = Deployment.parse("cpu")
    kernel = integer_data.enter((2, 3, *size), target.features).with_attr("global_symbol", "main")
    x, table = (RANDOM.integers(0, 256, shape, np.uint8) for shape in ((2, 3, *size), (3, 256)))
    tensors = [tvm.runtime.tensor(array) for array in (x, table, np.zeros_like(x))]
    tvm.compile(tvm.IRModule({"main": kernel}), target.target)["main"](*tensors)
    expected = np.stack([table[channel][x[:, channel]] for channel in range(3)], 1)
    np.testing.assert_array_equal(tensors[-1].numpy(), expected)
