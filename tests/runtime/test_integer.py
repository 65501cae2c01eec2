import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from anncvt.runtime import integer, integer_torch, reference
from anncvt.runtime.integer import Epilogue, Grid, Step, Window


@st.composite
def windows(draw, grouped=True):
    """A window, a kernel and a feature map it fits on."""
    groups = draw(st.integers(1, 3)) if grouped else 1
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    pair = st.tuples(st.integers(1, 2), st.integers(1, 2))
    stride, dilation = draw(pair), draw(pair)
    padding = draw(st.tuples(*[st.integers(0, 2)] * 4))
    size = [d * (k - 1) + draw(st.integers(1, 4)) for d, k in zip(dilation, kernel, strict=True)]
    window = Window(stride, padding, dilation, groups)
    return window, kernel, (draw(st.integers(1, 2)), groups * draw(st.integers(1, 3)), *size), draw(st.integers(1, 3))


def random(shape, low, high, dtype, seed=0):
    return np.random.default_rng(seed).integers(low, high, shape, endpoint=True).astype(dtype)


@settings(max_examples=40, deadline=None)
@given(windows(), st.integers(0, 255))
def test_an_adder_is_the_op_on_integers(case, pad_value):
    window, kernel, shape, each = case
    x = random(shape, 0, 255, np.uint8)
    w = random((window.groups * each, shape[1] // window.groups, *kernel), 0, 255, np.uint8, 1)
    accumulators = integer.adder(x, w, window, pad_value)
    assert accumulators.dtype == np.int32
    top, left, bottom, right = window.padding
    padded = F.pad(torch.from_numpy(x).double(), (left, right, top, bottom), value=pad_value)
    geometry = (window.stride, (0, 0), window.dilation, window.groups)
    expected = reference.forward(padded, torch.from_numpy(w).double(), *geometry)
    assert np.array_equal(accumulators, expected.numpy())


@settings(max_examples=40, deadline=None)
@given(windows(), st.integers(0, 255))
def test_a_convolution_is_torchs_on_integers(case, zero):
    window, kernel, shape, each = case
    x = random(shape, 0, 255, np.uint8)
    w = random((window.groups * each, shape[1] // window.groups, *kernel), -128, 127, np.int8, 1)
    top, left, bottom, right = window.padding
    padded = F.pad(torch.from_numpy(x).double() - zero, (left, right, top, bottom))
    expected = F.conv2d(padded, torch.from_numpy(w).double(), None, window.stride, 0, window.dilation, window.groups)
    assert np.array_equal(integer.convolution(x, w, window, zero), expected.numpy())


@settings(max_examples=60, deadline=None)
@given(windows(), st.sampled_from(integer.OPS), st.integers(0, 255))
def test_the_fast_execution_is_the_reference_bit_for_bit(case, op, zero):
    window, kernel, shape, each = case
    step = a_step(op, window, kernel, shape, each, zero)
    inputs = [random(shape, 0, 255, np.uint8, seed) for seed in range(len(step.pad_values) or 1)]
    tensors = [torch.from_numpy(x) for x in inputs]
    if step.epilogue is None:
        assert np.array_equal(integer.rearrange(step, inputs), integer_torch.rearrange(step, tensors).numpy())
        return
    residual = random((shape[0], *step.shape), 0, 255, np.uint8, 9) if step.residual else None
    output, accumulators = integer.execute(step, inputs, residual)
    fast = integer_torch.accumulate(step, tensors)
    assert fast.dtype == torch.int32 and np.array_equal(accumulators, fast.numpy())
    finished = integer_torch.finish(step.epilogue, fast, None if residual is None else torch.from_numpy(residual))
    assert np.array_equal(output, finished.numpy()) and output.dtype == finished.numpy().dtype


def a_step(op, window, kernel, shape, each, zero):
    size = window.output_size(shape[2:], kernel)
    if op in ("slice", "pad", "flatten", "rescale", "concatenate", "shuffle"):
        kernel = (1, 1)
    outputs = window.groups * each if op in ("adder", "convolution") else shape[1]
    channels, pad_values, filter_group, weight = (0, 0), (zero,), None, None
    if op == "adder":
        weight = random((outputs, shape[1] // window.groups, *kernel), 0, 255, np.uint8, 5)
        several = window.groups == 1 and outputs > 1
        filter_group = (np.arange(outputs) % 2 if several else np.zeros(outputs)).astype(np.uint8)
        pad_values = (zero, 255 - zero) if several else (zero,)
    elif op == "convolution":
        weight = random((outputs, shape[1] // window.groups, *kernel), -128, 127, np.int8, 5)
    elif op in ("sum_pool", "max_pool"):
        window = Window(window.stride, window.padding, (1, 1) if op == "sum_pool" else window.dilation)
        size = window.output_size(shape[2:], kernel)
    elif op == "rescale":
        size = shape[2:]
    elif op == "flatten":
        outputs, size = int(np.prod(shape[1:])), (1, 1)
    elif op == "concatenate":
        outputs, size, pad_values = 2 * shape[1], shape[2:], (zero, zero)
    elif op == "slice":
        channels = (zero % shape[1], 0)
        outputs, window = shape[1] - channels[0], Window(window.stride)
        size = window.output_size(shape[2:], (1, 1))
    elif op == "shuffle":
        size = shape[2:]
    elif op == "pad":
        channels, window = (1, 2), Window(padding=window.padding)
        outputs, size = shape[1] + 3, window.output_size(shape[2:], (1, 1))
    epilogue = None
    if op in integer.ACCUMULATING:
        rng = np.random.default_rng(3)
        multiplier = rng.integers(-(2**15), 2**15, outputs).astype(np.int32)
        epilogue = Epilogue(multiplier, rng.integers(-(2**24), 2**24, outputs), 12, 3, 250, -777)
    residual = "r" if epilogue is not None and zero % 2 else None
    return Step(
        "s", op, ("x",), (outputs, *size), Grid(1.0, 0), window, kernel, weight, filter_group, pad_values, epilogue,
        residual, channels,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("accumulator", "expected"),
    [(1, 1), (3, 2), (-1, 0), (-3, -1), (-2, -1), (5, 3), (1000, 100), (-1000, -100)],
)
def test_requantisation_rounds_half_up_and_clamps(accumulator, expected):
    epilogue = Epilogue(np.array([1], np.int32), np.array([0], np.int64), 1, -100, 100)
    found = epilogue.apply(np.full((1, 1, 1, 1), accumulator, np.int32))
    assert found.dtype == np.int32 and found.item() == expected


def test_a_sum_of_the_largest_numbers_does_not_wrap():
    epilogue = Epilogue(np.array([2**31 - 1], np.int32), np.array([2**60], np.int64), 31, 0, 2**31 - 1)
    found = epilogue.apply(np.full((1, 1, 1, 1), 2**20, np.int32))
    assert found.item() == ((2**31 - 1) * 2**20 + 2**60 + 2**30) >> 31


def test_wide_layers_leave_float32():
    x, w = np.full((1, 16500, 1, 1), 255, np.uint8), np.zeros((2, 16500, 1, 1), np.uint8)
    w[1, 0] = 1
    step = Step(
        "s", "adder", ("x",), (2, 1, 1), Grid(1.0, 0), weight=w, filter_group=np.zeros(2, np.uint8), pad_values=(0,)
    )
    found = integer_torch.accumulate(step, [torch.from_numpy(x)]).numpy()
    assert np.array_equal(found, integer.accumulate(step, [x])) and found[0, 1] - found[0, 0] == 1


@given(st.floats(1e-3, 1e3), st.integers(0, 15), st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=20))
def test_a_grid_returns_what_is_on_it(scale, zero, values):
    grid = Grid(scale, zero, 4)
    integers = grid.quantise(np.array(values))
    assert integers.max() <= grid.top
    assert np.array_equal(grid.quantise(grid.values(integers)), integers)
    inside = np.clip(values, grid.low, grid.high)
    assert np.all(np.abs(grid.values(integers) - inside) <= scale / 2 * (1 + 1e-9))
