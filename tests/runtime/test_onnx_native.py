"""The native library of onnxruntime against the float64 and the integer reference."""

import dataclasses
import math
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native import attributes, compiled_calls, layers_made, native_session, node_model, to_blocks
from parity import Case, cases
from recorder import Recorder

from anncvt.errors import AnncvtError
from anncvt.runtime import artifact, integer, onnx_native, processor, reference
from anncvt.runtime.geometry import expand_padding
from anncvt.runtime.integer import Epilogue, Window
from anncvt.runtime.kernels import fixed_point, ort_library
from anncvt.runtime.kernels.deployment import Deployment
from anncvt.runtime.onnx_fused_body import integer_functions

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

TOLERANCE = 1e-4
#: Layers that the library has kernels for: dense, plain input, partial blocks, both kinds of groups, depthwise, uneven.
LAYERS = [
    Case(channels=32, outputs=48, size=(9, 8)),
    Case(channels=3, outputs=20, size=(11, 10), stride=(2, 2), padding=(2, 1)),
    Case(channels=20, outputs=7, kernel=(1, 1), padding=(0, 0), stride=(2, 1)),
    Case(channels=64, outputs=64, size=(7, 7), kernel=(1, 1), padding=(0, 0)),
    Case(channels=16, outputs=32, groups=2),
    Case(channels=5, outputs=3, groups=4, padding=(0, 2, 1, 0), dilation=(2, 1)),
    Case(channels=1, outputs=1, groups=20),
    Case(channels=17, outputs=33, kernel=(2, 3), padding=(1, 0, 0, 2), dilation=(1, 2)),
]
#: What the fused kernels of the library are for: bounds and residual.
FUSED = [((0.0, math.inf), True), ((0.5, 1.0), False)]
FUSED_CASE = LAYERS[7]
#: Fused integer layers that the library has kernels for, and whether they have a residual.
FUSED_INTEGERS = [(LAYERS[0], False), (LAYERS[3], True), (LAYERS[4], False), (LAYERS[6], False), (LAYERS[7], True)]
#: One of them of which there is a second kernel, for totals that need more than 32 bits.
LONG_INTEGERS = LAYERS[7]
LONG_SHIFT = 25


#: Convolutions of an image that the library has kernels for: windows whose columns are side by side, and others.
IMAGE_CONVOLUTIONS = [
    Case(channels=3, outputs=33, size=(13, 12), kernel=(7, 7), stride=(2, 2), padding=(3, 3)),
    Case(channels=1, outputs=5, padding=(0, 2, 1, 0), dilation=(1, 2)),
    Case(channels=20, outputs=16, size=(5, 6)),
]
#: The same of blocked inputs, and whether they have a residual: dense, depthwise, in groups.
CONVOLUTIONS = [
    (LAYERS[0], True),
    (LAYERS[5], False),
    (LAYERS[6], False),
    (dataclasses.replace(LAYERS[6], groups=48), True),
]


def window_of(case: Case) -> Window:
    padding = expand_padding(case.padding)
    return Window(case.stride, (padding.top, padding.left, padding.bottom, padding.right), case.dilation, case.groups)


def floats(
    case: Case, *, constant: bool = True, shape=None
) -> tuple[onnx.ModelProto, dict[str, np.ndarray], np.ndarray]:
    """A model of the layer, its inputs, and the result."""
    x, weight, _ = case.tensors()
    x = x.contiguous()
    expected = reference.forward(x, weight, *case.arguments()).numpy()
    inputs, constants = {"x": x.numpy()}, {"w": weight.numpy()}
    if not constant:
        inputs |= constants
        constants = {}
    return node_model("Adder2d", inputs, constants, attributes(window_of(case)), shape=shape), inputs, expected


def integers(case: Case, pad_value: int = 3) -> tuple[onnx.ModelProto, dict[str, np.ndarray], np.ndarray]:
    random = np.random.default_rng(0)
    x, weight = (random.integers(0, 256, tensor.shape).astype(np.uint8) for tensor in case.tensors()[:2])
    window = window_of(case)
    expected = integer.adder(x, weight, window, pad_value)
    model = node_model("AdderInteger2d", {"x": x}, {"w": weight}, attributes(window, pad_value=pad_value), "int32")
    return model, {"x": x}, expected


def fused(bounds: tuple[float, float], residual: bool) -> tuple[onnx.ModelProto, dict[str, np.ndarray], np.ndarray]:
    """The same of :data:`FUSED_CASE` with scale and shift, blocked."""
    x, weight, other = FUSED_CASE.tensors()
    sums = reference.forward(x, weight, *FUSED_CASE.arguments()).numpy()
    scale = np.random.default_rng(0).normal(size=FUSED_CASE.outputs).astype(np.float32)
    shift = (-scale * sums.mean((0, 2, 3))).astype(np.float32)
    total = sums * scale[:, None, None] + shift[:, None, None]
    expected = to_blocks(np.clip(total + other.numpy() * residual, *bounds))
    inputs = {"x": to_blocks(x.numpy()), **({"residual": to_blocks(other.numpy())} if residual else {})}
    constants = {"w": weight.numpy(), "scale": scale, "shift": shift}
    settings = attributes(window_of(FUSED_CASE), low=bounds[0], high=bounds[1])
    model = node_model("FusedAdder2d" + "Residual" * residual, inputs, constants, settings)
    model.graph.node[0].input[:] = ["x", *constants, *list(inputs)[1:]]
    return model, inputs, expected


def fused_integers(
    case: Case, end: Epilogue, *, residual: bool, pad_value: int = 3
) -> tuple[onnx.ModelProto, dict[str, np.ndarray], np.ndarray]:
    """The layer of integers with an epilogue, blocked; the residual is that of ``end``."""
    random = np.random.default_rng(0)
    x, weight, other = (random.integers(0, 256, tensor.shape).astype(np.uint8) for tensor in case.tensors())
    window = window_of(case)
    with np.errstate(over="ignore"):
        expected = end.apply(integer.adder(x, weight, window, pad_value), other if residual else None)
    inputs = {"x": to_blocks(x), **({"residual": to_blocks(other)} if residual else {})}
    constants = {"w": weight, "multiplier": end.multiplier, "bias": end.bias}
    share = {"residual_multiplier": end.residual_multiplier} if residual else {}
    given = attributes(window, pad_value=pad_value, shift=end.shift, low=end.low, high=end.high, **share)
    model = node_model("FusedAdderInteger2d" + "Residual" * residual, inputs, constants, given, "uint8")
    model.graph.node[0].input[:] = ["x", *constants, *list(inputs)[1:]]
    return model, inputs, to_blocks(expected)


def spread(case: Case, *, shift: int = 12, low: int = 0, high: int = 255, residual: int = 0) -> Epilogue:
    """An epilogue that uses the range of bytes."""
    filters, taps = case.outputs * case.groups, case.channels * case.kernel[0] * case.kernel[1]
    random = np.random.default_rng(1)
    multiplier = (random.integers(1, 4, filters) * (2**shift * 3 // taps + 1) // 3).astype(np.int32)
    bias = (multiplier.astype(np.int64) * 85 * taps) + (100 << shift)
    return Epilogue(multiplier, bias, shift, low, high, residual)


def convolution(
    case: Case, zero: int = 7, *, blocked: bool = False, residual: bool = False
) -> tuple[onnx.ModelProto, dict[str, np.ndarray], np.ndarray]:
    """The layer as a convolution with an epilogue, to blocked integers, from ``blocked`` or plain ones."""
    random = np.random.default_rng(0)
    x, weight, other = (random.integers(0, 256, tensor.shape).astype(np.uint8) for tensor in case.tensors())
    taps, filters = weight[0].size, len(weight)
    multiplier = (random.uniform(0.5, 1.5, filters) * 60 * 2**16 / (1e4 * taps**0.5)).astype(np.int32)
    bias = np.full(filters, 128 << 16) + random.integers(0, 1 << 16, filters)
    end = Epilogue(multiplier, bias, 16, 2, 250, 20000 * residual)
    sums = integer.convolution(x, (weight.astype(np.int16) - 128).astype(np.int8), window_of(case), zero)
    constants = {"w": weight, "multiplier": multiplier, "bias": end.bias}
    settings = attributes(window_of(case), pad_value=zero, shift=end.shift, low=end.low, high=end.high)
    inputs = {"x": to_blocks(x) if blocked else x}
    if residual:
        inputs["residual"], settings["residual_multiplier"] = to_blocks(other), end.residual_multiplier
    op = "FusedConvInteger2d" + "Blocked" * blocked + "Residual" * residual
    model = node_model(op, inputs, constants, settings, "uint8")
    model.graph.node[0].input[:] = ["x", *constants, *list(inputs)[1:]]
    return model, inputs, to_blocks(end.apply(sums, other if residual else None))


def placed(array: np.ndarray, offset: int) -> np.ndarray:
    """A copy that begins ``offset`` bytes behind a multiple of 64."""
    memory = np.zeros(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def weights_of(model: onnx.ModelProto) -> np.ndarray:
    return next(onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == "w")


def assert_near(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max(initial=0) <= TOLERANCE * np.abs(expected).max(initial=1e-30)


def assert_near_in_fixed_point(actual: np.ndarray, expected: np.ndarray, weight: np.ndarray, scale: float = 1) -> None:
    """Rounding moves a tap by a step of the weights at most, and sums by much less, as errors are random."""
    assert actual.shape == expected.shape
    step = (max(weight.max(), 0) - min(weight.min(), 0)) / 65532
    limit = 3 * scale * step * weight[0].size ** 0.5 + 1e-6 * np.abs(expected).max()
    assert np.abs(actual - expected).max() <= limit


def write(folder, models):
    paths = []
    for index, model in enumerate(models):
        paths.append(folder / f"{index}.onnx")
        onnx.save(model, paths[-1])
    return paths


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Files whose layers are those of :data:`LAYERS`, floats and integers."""
    found = [make(case)[0] for case in LAYERS for make in (floats, integers)]
    found += [fused(*settings)[0] for settings in FUSED]
    found += [fused_integers(case, spread(case), residual=residual)[0] for case, residual in FUSED_INTEGERS]
    found.append(fused_integers(LONG_INTEGERS, spread(LONG_INTEGERS, shift=LONG_SHIFT), residual=True)[0])
    found += [convolution(case)[0] for case in IMAGE_CONVOLUTIONS]
    found += [convolution(case, blocked=True, residual=residual)[0] for case, residual in CONVOLUTIONS]
    return write(tmp_path_factory.mktemp("models"), found)


def usable(name: str) -> bool:
    """Whether this processor has the instruction set."""
    best = max(level.number for level in ort_library.levels("cpu"))
    return all(level.number <= best for level in ort_library.levels(name))


@pytest.fixture(
    scope="module",
    params=["cpu", *(pytest.param(level.name, marks=pytest.mark.slow) for level in ort_library.levels(None))],
)
def library(request, models, tmp_path_factory):
    """A library in float32 for this machine; the slow tests go through the instruction sets one by one."""
    if not usable(request.param):
        pytest.skip(f"this processor has no {request.param}")
    path = tmp_path_factory.mktemp("library") / f"{request.param}.so"
    return onnx_native.build(models, path, target=request.param, fixed=False)


@pytest.fixture(
    scope="module",
    params=["cpu", *(pytest.param(name, marks=pytest.mark.slow) for name in ("avx2", "avx512", "avx512vnni"))],
)
def fixed_library(request, models, tmp_path_factory):
    """The same with kernels in fixed point."""
    if not usable("avx2") or not usable(request.param):
        pytest.skip(f"this processor has no {request.param}, or nothing that makes fixed point fast")
    path = tmp_path_factory.mktemp("fixed") / f"{request.param}.so"
    return onnx_native.build(models, path, target=request.param, fixed=True)


@pytest.fixture(scope="module")
def loops(tmp_path_factory):
    """A library without compiled kernels."""
    return onnx_native.build([], tmp_path_factory.mktemp("loops") / "loops.so", target="cpu")


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_compiled_floats(library, case):
    model, inputs, expected = floats(case)
    before = compiled_calls(library)
    # Instruction sets that are for integers only have no kernels for floats.
    floating = any(level.floats for level in ort_library.levels(library.stem))
    (y,) = native_session(model, library).run(None, inputs)
    assert_near(y, expected)
    assert compiled_calls(library) - before == (case.batch if floating else 0)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_fixed_point(fixed_library, case):
    """Plain input and small groups stay in floats."""
    model, inputs, expected = floats(case)
    calls, layers = compiled_calls(fixed_library), layers_made(fixed_library)
    (y,) = native_session(model, fixed_library).run(None, inputs)
    fixed = (case.groups == 1 and case.channels >= 16) or case.channels % 16 == 0
    floating = any(level.floats for level in ort_library.levels(fixed_library.stem))
    compiled = fixed or floating
    assert list(layers_made(fixed_library) - layers) == [1, compiled, fixed]
    assert compiled_calls(fixed_library) - calls == case.batch * compiled
    if fixed:
        assert_near_in_fixed_point(y, expected, weights_of(model))
    else:
        assert_near(y, expected)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_compiled_integers(library, case):
    model, inputs, expected = integers(case)
    before = compiled_calls(library)
    (y,) = native_session(model, library).run(None, inputs)
    np.testing.assert_array_equal(y, expected)
    assert compiled_calls(library) - before == case.batch


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_any_float_layer(loops, case):
    model, inputs, expected = floats(case)
    (y,) = native_session(model, loops).run(None, inputs)
    assert_near(y, expected)


@settings(max_examples=60, deadline=None)
@given(case=cases(), pad_value=st.integers(0, 255))
def test_any_integer_layer(loops, case, pad_value):
    model, inputs, expected = integers(case, pad_value)
    (y,) = native_session(model, loops).run(None, inputs)
    np.testing.assert_array_equal(y, expected)


def test_weights_that_change(library):
    """They are packed in every call."""
    model, inputs, expected = floats(LAYERS[0], constant=False)
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_value = LAYERS[0].outputs
    session = native_session(model, library)
    (first,) = session.run(None, inputs)
    assert_near(first, expected)
    (second,) = session.run(None, {**inputs, "w": inputs["w"] + 1})
    x, weight = (torch.from_numpy(inputs[name]) for name in ("x", "w"))
    assert_near(second, reference.forward(x, weight + 1, *LAYERS[0].arguments()).numpy())


def test_weights_for_fixed_point(fixed_library):
    """Those that change stay in floats, and so do those of which a few lie far outside."""
    model, inputs, expected = floats(LAYERS[0], constant=False)
    before = layers_made(fixed_library)
    assert_near(native_session(model, fixed_library).run(None, inputs)[0], expected)
    model, inputs, _ = floats(LAYERS[0])
    weight = weights_of(model).copy()
    weight[0, 0, 0, 0] = 1000
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "w"))
    (y,) = native_session(model, fixed_library).run(None, inputs)
    x = torch.from_numpy(inputs["x"])
    assert_near(y, reference.forward(x, torch.from_numpy(weight), *LAYERS[0].arguments()).numpy())
    assert (layers_made(fixed_library) - before)[2] == 0


@pytest.mark.parametrize(("bounds", "residual"), FUSED)
@pytest.mark.parametrize("offset", [0, 16])
def test_fused_fixed_point(fixed_library, bounds, residual, offset):
    model, inputs, expected = fused(bounds, residual)
    before = compiled_calls(fixed_library)
    placed_inputs = {name: placed(array, offset) for name, array in inputs.items()}
    (y,) = native_session(model, fixed_library).run(None, placed_inputs)
    scale = next(onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "scale")
    assert_near_in_fixed_point(y, expected, weights_of(model), np.abs(scale).max())
    assert compiled_calls(fixed_library) - before == (FUSED_CASE.batch if offset == 0 else 0)


def test_fixed_point_needs_instructions(models, tmp_path):
    with pytest.raises(AnncvtError, match="faster than floats"):
        onnx_native.build(models, tmp_path / "library.so", target="x86-64", fixed=True)


@pytest.mark.skipif(processor.architecture() != "x86_64", reason="instruction sets of x86-64")
@pytest.mark.parametrize(
    ("target", "asked", "found"),
    [
        (None, None, {"avx512", "avx512vnni"}),
        (None, True, {"avx2", "avx512", "avx512vnni"}),
        (None, False, set()),
        ("avx512", None, {"avx512"}),
        ("avx2", None, set()),
        ("avx2", True, {"avx2"}),
        ("x86-64", None, set()),
    ],
)
def test_instruction_sets_in_fixed_point(models, target, asked, found):
    """Unless told otherwise those with AVX-512; float32 kernels are there all the same, for weights that need them."""
    layers = [layer for model in models for layer in onnx_native.layers_of(onnx_native.read(model))]
    levels = ort_library.levels(target)
    kernels, floats = (ort_library.kernels(layers, levels, fixed=fixed) for fixed in (asked, False))
    more = kernels[len(floats) :]
    assert kernels[: len(floats)] == floats
    assert {kernel.level.name for kernel in more} == found and {kernel.layer.mode for kernel in more} <= {"fixed"}


def test_a_library_says_whether_it_is_in_fixed_point(models, tmp_path):
    unasked = fixed_point.chosen(None, processor.architecture(), tuple(processor.features() or ()))
    for files, asked, found in ((models[:1], None, unasked), (models[:1], False, False), ([], None, False)):
        path = onnx_native.build(files, tmp_path / "library.so", target="cpu", fixed=asked)
        assert artifact.read_manifest(path)["fixed"] is found


def test_images_of_another_size_and_no_images(library):
    model, inputs, _ = floats(LAYERS[0])
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = "open"
    session = native_session(model, library)
    x = Case(channels=32, size=(4, 13)).tensors()[0]
    weight = torch.from_numpy(onnx.numpy_helper.to_array(model.graph.initializer[0]).copy())
    (y,) = session.run(None, {"x": x.numpy()})
    assert_near(y, reference.forward(x, weight, *LAYERS[0].arguments()).numpy())
    assert session.run(None, {"x": inputs["x"][:0]})[0].shape == (0, 48, 9, 8)


def test_threads_and_sessions_give_the_same(library):
    found = [floats(case) for case in LAYERS[:4]]
    serial = [native_session(model, library).run(None, inputs)[0] for model, inputs, _ in found]
    sessions = [native_session(model, library, threads=2) for model, _, _ in found]

    def call(index):
        return sessions[index % 4].run(None, found[index % 4][1])[0]

    with ThreadPoolExecutor(4) as pool:
        for index, y in enumerate(pool.map(call, range(64))):
            np.testing.assert_array_equal(y, serial[index % 4])


def test_shapes_are_inferred(loops):
    for case in LAYERS:
        model, _, expected = floats(case)
        (output,) = native_session(model, loops).get_outputs()
        assert output.shape == ["batch", *expected.shape[1:]]
    x = np.zeros((2, 20, 3, 5), np.float32)
    (output,) = native_session(node_model("Block", {"x": x}, {}, {}), loops).get_outputs()
    assert output.shape == ["batch", 2, 3, 5, 16]
    model = node_model("Unblock", {"x": to_blocks(x)}, {}, {"channels": 20})
    (output,) = native_session(model, loops).get_outputs()
    assert output.shape == ["batch", 20, 3, 5]


@pytest.mark.parametrize(("kind", "dtype"), [("", "float32"), ("Integer", "uint8")])
def test_layouts(loops, kind, dtype):
    x = np.random.default_rng(0).uniform(0, 256, size=(3, 37, 6, 7)).astype(dtype)
    blocked = node_model(f"Block{kind}", {"x": x}, {}, {}, dtype)
    (y,) = native_session(blocked, loops, threads=2).run(None, {"x": x})
    np.testing.assert_array_equal(y, to_blocks(x), strict=True)
    model = node_model(f"Unblock{kind}", {"x": y}, {}, {"channels": 37}, dtype)
    np.testing.assert_array_equal(native_session(model, loops).run(None, {"x": y})[0], x)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bounds", [(-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0), (0.5, 1.0)])
def test_any_fused_layer(loops, bounds, residual):
    model, inputs, expected = fused(bounds, residual)
    assert_near(native_session(model, loops).run(None, inputs)[0], expected)


@pytest.mark.parametrize(("bounds", "residual"), FUSED)
@pytest.mark.parametrize("offset", [0, 16])
def test_compiled_fused_layers(library, bounds, residual, offset):
    """A caller's buffer may be less aligned than compiled kernels need: then loops do it."""
    model, inputs, expected = fused(bounds, residual)
    before = compiled_calls(library)
    (y,) = native_session(model, library).run(None, {name: placed(array, offset) for name, array in inputs.items()})
    assert_near(y, expected)
    floating = any(level.floats for level in ort_library.levels(library.stem))
    assert compiled_calls(library) - before == (FUSED_CASE.batch if floating and offset == 0 else 0)


@pytest.mark.parametrize(("case", "residual"), FUSED_INTEGERS, ids=str)
@pytest.mark.parametrize("offset", [0, 16])
def test_compiled_fused_integers(library, case, residual, offset):
    """The kernels were made for the shape: what they requantise with comes with the call."""
    for end in (spread(case), spread(case, shift=15, low=30, high=200, residual=-20000 * residual)):
        model, inputs, expected = fused_integers(case, end, residual=residual)
        before = compiled_calls(library)
        placed_inputs = {name: placed(array, offset) for name, array in inputs.items()}
        (y,) = native_session(model, library).run(None, placed_inputs)
        np.testing.assert_array_equal(y, expected, strict=True)
        assert len(np.unique(y)) > 50
        assert compiled_calls(library) - before == (offset == 0)


@pytest.mark.parametrize(
    ("case", "blocked", "residual"),
    [*((case, False, False) for case in IMAGE_CONVOLUTIONS), *((case, True, other) for case, other in CONVOLUTIONS)],
    ids=str,
)
@pytest.mark.parametrize("offset", [0, 16])
def test_compiled_convolutions(library, case, blocked, residual, offset):
    model, inputs, expected = convolution(case, blocked=blocked, residual=residual)
    before = compiled_calls(library)
    (y,) = native_session(model, library).run(None, {name: placed(x, offset) for name, x in inputs.items()})
    np.testing.assert_array_equal(y, expected, strict=True)
    assert len(np.unique(y)) > 50
    assert compiled_calls(library) - before == (offset == 0)


@settings(max_examples=60, deadline=None)
@given(case=cases(), zero=st.integers(0, 255), kind=st.sampled_from([(False, False), (True, False), (True, True)]))
def test_any_convolution(loops, case, zero, kind):
    model, inputs, expected = convolution(case, zero, blocked=kind[0], residual=kind[1])
    assert_native_and_by_definition(model, loops, inputs, expected)


def test_compiled_kernels_of_longer_totals(library):
    """A kernel in 32 bits is left alone where totals need more; another one of the layer takes its place."""
    for case, residual in FUSED_INTEGERS:
        end = spread(case, shift=LONG_SHIFT, residual=2**20 * residual)
        model, inputs, expected = fused_integers(case, end, residual=residual)
        before = compiled_calls(library)
        aligned = {name: placed(array, 0) for name, array in inputs.items()}
        np.testing.assert_array_equal(native_session(model, library).run(None, aligned)[0], expected)
        assert compiled_calls(library) - before == (case is LONG_INTEGERS)


def test_what_compiled_kernels_might_cut_off(library):
    """Shifted sums beyond 32 bits are clamped first, which compiled kernels do not do."""
    case = FUSED_INTEGERS[0][0]
    end = dataclasses.replace(spread(case), multiplier=np.full(case.outputs, 2**20, np.int32), shift=1)
    model, inputs, expected = fused_integers(case, end, residual=False)
    before = compiled_calls(library)
    np.testing.assert_array_equal(native_session(model, library).run(None, inputs)[0], expected)
    assert compiled_calls(library) == before


@settings(max_examples=40, deadline=None)
@given(case=cases(), data=st.data())
def test_any_fused_integer_layer(loops, case, data):
    filters, random = case.outputs * case.groups, np.random.default_rng(data.draw(st.integers(0, 99)))
    low = data.draw(st.integers(0, 255))
    end = Epilogue(
        random.integers(-(2**31), 2**31, filters).astype(np.int32) >> data.draw(st.integers(0, 30)),
        random.integers(-(2**62), 2**62, filters) >> data.draw(st.integers(0, 62)),
        data.draw(st.integers(1, 31)),
        low,
        data.draw(st.integers(low, 255)),
        data.draw(st.integers(-(2**31), 2**31 - 1)),
    )
    model, inputs, expected = fused_integers(case, end, residual=data.draw(st.booleans()))
    np.testing.assert_array_equal(native_session(model, loops).run(None, inputs)[0], expected)


def assert_native_and_by_definition(model, loops, inputs, expected):
    """The op of one node, in the library and as its definition says."""
    (y,) = native_session(model, loops, threads=2).run(None, inputs)
    np.testing.assert_array_equal(y, expected, strict=True)
    model.functions.extend(integer_functions(18))
    stock = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(stock.run(None, inputs)[0], expected, strict=True)


@pytest.mark.parametrize(
    ("kernel", "window"),
    [
        ((3, 3), Window((2, 2), (1, 1, 1, 1))),
        ((2, 3), Window((1, 3), (0, 1, 1, 0), (2, 1))),
        ((1, 1), Window()),
    ],
    ids=["of a ResNet", "uneven", "one"],
)
def test_max_pool(loops, kernel, window):
    x = np.random.default_rng(0).integers(0, 256, (2, 37, 9, 8)).astype(np.uint8)
    settings = {**attributes(window), "kernel_shape": list(kernel)}
    del settings["group"]
    model = node_model("MaxPoolInteger", {"x": to_blocks(x)}, {}, settings, "uint8")
    assert_native_and_by_definition(model, loops, {"x": to_blocks(x)}, to_blocks(integer.max_pool(x, kernel, window)))


def test_refuses_other_windows(loops):
    x = np.zeros((1, 1, 2, 2, 16), np.uint8)
    given_attributes = {"strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1]}
    for kernel, said in [([3, 3], "smaller than the window"), ([0, 1], "must be positive"), ([1], "2 entries")]:
        model = node_model("MaxPoolInteger", {"x": x}, {}, {**given_attributes, "kernel_shape": kernel}, "uint8")
        with pytest.raises(Exception, match=said):
            native_session(model, loops).run(None, {"x": x})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shift": 0}, "shift must be 1 to 31"),
        ({"shift": 32}, "shift must be 1 to 31"),
        ({"low": -1}, "low and high within 0 to 255"),
        ({"low": 9, "high": 8}, "low and high within 0 to 255"),
        ({"pad_value": 256}, "pad_value must be 0 to 255"),
        ({"residual_multiplier": 2**31}, "must fit 32 bits"),
    ],
    ids=str,
)
def test_refuses_what_cannot_be_requantised(loops, changes, said):
    case = FUSED_INTEGERS[1][0]
    model, _, _ = fused_integers(case, spread(case), residual=True)
    for attribute in model.graph.node[0].attribute:
        if attribute.name in changes:
            attribute.i = changes[attribute.name]
    with pytest.raises(Exception, match=said):
        native_session(model, loops)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"strides": [0, 1]}, "must be positive"),
        ({"pads": [0, 0, -1, 0]}, "must not be negative"),
        ({"pads": [0, 0]}, "pads 4"),
        ({"group": 3}, "multiple of group"),
        ({"dilations": [9, 9]}, "smaller than the window"),
        ({"strides": None}, "strides and dilations must have 2"),
    ],
    ids=str,
)
def test_refuses_what_makes_no_sense(loops, changes, said):
    model, inputs, _ = floats(LAYERS[1])
    given_attributes = {**attributes(window_of(LAYERS[1])), **changes}
    kept = {name: value for name, value in given_attributes.items() if value is not None}
    model.graph.node[0].CopyFrom(onnx.helper.make_node("Adder2d", ["x", "w"], ["y"], domain="ai.anncvt", **kept))
    with pytest.raises(Exception, match=said):
        native_session(model, loops).run(None, inputs)


def test_refuses_other_channels(loops):
    model, inputs, _ = floats(LAYERS[1])
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "channels"
    with pytest.raises(Exception, match="channels that the weights expect"):
        native_session(model, loops).run(None, {"x": inputs["x"][:, :2]})


def test_libraries_for_this_machine_run_on_others_of_its_level():
    plain = {level.number: level for level in ort_library.levels(None)}
    for level in ort_library.levels("cpu"):
        tuned, general = (Deployment.parse(each.target) for each in (level, plain[level.number]))
        assert (tuned.features, tuned.accumulators) == (general.features, general.accumulators)


def test_layers_of_open_size_get_no_kernel(models):
    model = onnx.load(models[0])
    assert len(list(onnx_native.layers_of(model))) == 1
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "width"
    assert not list(onnx_native.layers_of(model))


def test_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(AnncvtError, match="no C compiler") as caught:
        onnx_native.build([], tmp_path / "library.so", target="cpu")
    assert "definitions inside it" in caught.value.fix
    monkeypatch.setenv("CC", "false")
    with pytest.raises(AnncvtError, match="the C compiler failed"):
        onnx_native.build([], tmp_path / "library.so", target="cpu")
    assert not list(tmp_path.iterdir())


def test_unknown_targets_and_models(tmp_path):
    with pytest.raises(AnncvtError, match="unknown target 'sse9'"):
        onnx_native.build([], tmp_path / "library.so", target="sse9")
    for content in ("<html>", ""):
        (tmp_path / "model.onnx").write_text(content)
        with pytest.raises(AnncvtError, match="not an ONNX model"):
            onnx_native.build([tmp_path / "model.onnx"], tmp_path / "library.so")


def test_other_files_are_left_out_if_they_are_damaged(models, tmp_path):
    notes = Recorder()
    (tmp_path / "copy.onnx").write_bytes(models[0].read_bytes()[:-5])
    path = tmp_path / "library.so"
    onnx_native.build(models[:1], path, others=[tmp_path / "copy.onnx"], target="cpu", progress=notes)
    assert len(notes.notes) == 1 and "copy.onnx" in notes.notes[0]
    assert path.exists()
