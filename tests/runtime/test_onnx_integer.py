"""Integer networks as ONNX: the same integers as the reference at every layer, in every engine."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Inverted, Joined, Residual, Shuffled, ZeroPadded
from onnx import helper, shape_inference
from onnx.reference import ReferenceEvaluator
from quantized import adder_program, noise

from anncvt.errors import AnncvtError
from anncvt.passes.choice import Choice
from anncvt.passes.quantize import QuantizeConfig, pixel_table, quantize
from anncvt.program import Preprocess, Program, Record
from anncvt.runtime import integer_network, onnx_file, onnx_native, onnx_trace
from anncvt.runtime.integer import Epilogue, Grid, Step, Window
from anncvt.runtime.integer_network import INPUT, IntegerNetwork
from anncvt.runtime.onnx import export_integers, run, session
from anncvt.runtime.onnx_body import BODIES, DOMAIN, INTEGER_OP_TYPE, OPSETS
from anncvt.runtime.onnx_integer import integer_model, integers_of

SIZE = (3, 8, 8)
TEST = noise(3, SIZE, 5)
PIXELS = TEST.pixels.numpy()
CASES = {
    "strided shortcut, 8 bits": (Residual, QuantizeConfig()),
    "padded shortcut, 5 bits": (ZeroPadded, QuantizeConfig(bits=5)),
    "inverted residual, powers of two": (Inverted, QuantizeConfig(bits=6, power_of_two=True)),
    "filter groups, 4 bits": (ZeroPadded, QuantizeConfig(bits=4, groups=3)),
    "concatenations": (Joined, QuantizeConfig()),
    "shuffled channels": (Shuffled, QuantizeConfig()),
    "two weights per input, 6 bits": (Inverted, QuantizeConfig(bits=6), 2),
    "three weights per input, whole blocks": (functools.partial(Residual, 16), QuantizeConfig(), 3),
}


@pytest.fixture(scope="module", params=CASES)
def program(request, tmp_path_factory):
    """A program in a folder that has integers."""
    cnn, config, *copies = CASES[request.param]
    made = adder_program(cnn(), 8, choice=Choice.of(copies=copies[0] if copies else 1))
    made.folder = str(tmp_path_factory.mktemp("quantized"))
    integer_network.save(quantize(made, noise(16, SIZE), config), made.folder)
    return made


def images(program: Program) -> np.ndarray:
    return TEST.batch(torch.arange(len(TEST)), program.preprocess).numpy()


def expected(network: IntegerNetwork) -> np.ndarray:
    """The logits as floats."""
    return integer_network.run(network, PIXELS) * np.float32(network.steps[-1].grid.scale)


def assert_equal_at_every_step(path, network, pixels, *, fused=False):
    trace = onnx_trace.run(path, network, pixels)
    ending = {s.name for s in network.steps if s.epilogue and not (fused and s.epilogue.high <= 255)}
    assert set(trace.accumulators) == ending

    def compare(step, output, accumulators):
        np.testing.assert_array_equal(trace.integers[step.name], output, step.name, strict=True)
        if step.name in trace.accumulators:
            np.testing.assert_array_equal(trace.accumulators[step.name], accumulators, step.name, strict=True)

    logits = integer_network.run(network, pixels, compare)
    np.testing.assert_array_equal(trace.logits, logits * np.float32(network.steps[-1].grid.scale))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("fused", [False, True], ids=["adders", "fused adders"])
def test_onnxruntime_equals_the_reference_at_every_step(program, body, fused, tmp_path):
    path = export_integers(program, tmp_path / "model.onnx", body=body, fuse=fused)
    network = integer_network.load(program.folder)
    assert_equal_at_every_step(path, network, PIXELS, fused=fused)
    x = images(program)
    for batch in (1, 2):
        np.testing.assert_array_equal(run(session(path), x[:batch]), expected(network)[:batch])


@pytest.mark.parametrize("fused", [False, True], ids=["adders", "fused adders"])
def test_reference_evaluator_equals_the_reference(program, fused, tmp_path):
    model = onnx.load(export_integers(program, tmp_path / "model.onnx", fuse=fused))
    found = ReferenceEvaluator(model).run(None, {"image": images(program)})[0]
    np.testing.assert_array_equal(found, expected(integer_network.load(program.folder)))


def test_structure(program, tmp_path):
    model = onnx.load(export_integers(program, tmp_path / "model.onnx"))
    onnx.checker.check_model(model, full_check=True)
    inferred = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    (image,), (logits,) = inferred.graph.input, inferred.graph.output
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (image, logits)]
    assert (image.name, logits.name) == ("image", "logits") and shapes == [["batch", *SIZE], ["batch", 5]]
    network = integer_network.load(program.folder)
    nodes = {node.name: node for node in model.graph.node}
    assert len(nodes) == len(model.graph.node)
    for step in network.steps:
        if step.op == "adder":
            names = [step.name, *(f"{step.name}:{n}" for n in range(2, len(step.inputs) + 1))]
            for name in names:
                assert (nodes[name].domain, nodes[name].op_type) == (DOMAIN, INTEGER_OP_TYPE)
                given_names = {attribute.name for attribute in nodes[name].attribute}
                assert given_names == {"strides", "pads", "dilations", "group", "pad_value"}
    adders = sum(len(step.inputs) for step in network.steps if step.op == "adder")
    assert sum(node.domain == DOMAIN for node in model.graph.node) == adders
    quantising = [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert quantising in (["/pixels"], ["/pixels", integers_of(INPUT)])
    assert [node.op_type for node in model.graph.node].count("DequantizeLinear") == 1
    assert [(f.domain, f.name) for f in model.functions] == [(DOMAIN, INTEGER_OP_TYPE)]


def test_structure_of_fused_adders(program, tmp_path):
    """One node for each filter group of an adder, blocked from one to the next."""
    path = export_integers(program, tmp_path / "model.onnx", fuse=True)
    assert export_integers(program, tmp_path / "again.onnx", fuse=True).read_bytes() == path.read_bytes()
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    made_by = {node.output[0]: node for node in model.graph.node}
    fused = [node for node in model.graph.node if node.op_type.startswith("FusedAdder")]
    adders = [step for step in integer_network.load(program.folder).steps if step.op == "adder"]
    assert len(fused) == sum(len(step.inputs) for step in adders)
    assert sum(node.op_type.endswith("Residual") for node in fused) == sum(
        len(step.inputs) for step in adders if step.residual
    )
    for node in fused:
        assert {made_by[name].op_type for name in (node.input[0], *node.input[4:])} <= {
            "BlockInteger", "FusedAdderInteger2d", "FusedAdderInteger2dResidual", "FusedConvInteger2d",
            "FusedConvInteger2dBlocked", "FusedConvInteger2dBlockedResidual", "MaxPoolInteger", "Concat",
        }  # fmt: skip


def test_metadata_of_the_integers(program, tmp_path):
    program.history.append(Record("quantized", 1.0, {"integer": {"top1": 61.5, "top5": 90.0, "bits": 8}}, 0, {}))
    path = export_integers(program, tmp_path / "model.onnx")
    program.history.pop()
    told = session(path).get_modelmeta().custom_metadata_map
    network = integer_network.load(program.folder)
    assert json.loads(told["anncvt.integers"])["sha256"] == integer_network.digest(network)
    assert json.loads(told["anncvt.integers"])["bits"] == network.settings["bits"]
    assert json.loads(told["anncvt.accuracy"]) == {"top1": 61.5, "top5": 90.0}
    scales = json.loads(told["anncvt.scales"])
    assert list(scales) == sorted([INPUT, *(step.name for step in network.steps)])
    assert all(scales[step.name] == dataclasses.asdict(step.grid) for step in network.steps)
    content = path.read_bytes()
    for secret in (b"/home", b"site-packages", b"stack_trace", program.folder.encode(), b"seconds"):
        assert secret not in content


def test_same_integers_same_bytes(program, tmp_path):
    first, second = (export_integers(program, tmp_path / f"{name}.onnx") for name in "ab")
    assert first.read_bytes() == second.read_bytes()


@pytest.fixture(scope="module")
def inverted(tmp_path_factory):
    made = adder_program(Inverted(), 8)
    made.folder = str(tmp_path_factory.mktemp("inverted"))
    integer_network.save(quantize(made, noise(16, SIZE)), made.folder)
    return made


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset(inverted, opset, tmp_path):
    path = export_integers(inverted, tmp_path / "model.onnx", opset=opset, fuse=opset % 2 == 0)
    assert {o.domain: o.version for o in onnx.load(path).opset_import} == {"": opset, DOMAIN: 1}
    found = run(session(path), images(inverted))
    np.testing.assert_array_equal(found, expected(integer_network.load(inverted.folder)))


@pytest.fixture(scope="module")
def loops(tmp_path_factory):
    """A native library without compiled kernels: plain loops take any layer."""
    pytest.importorskip("tvm")
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (cc) here")
    return onnx_native.build([], tmp_path_factory.mktemp("loops") / onnx_native.LIBRARY, target="cpu")


@pytest.mark.parametrize("fused", [False, True], ids=["adders", "fused adders"])
def test_the_native_library_equals_the_reference_at_every_step(program, loops, fused, tmp_path):
    path = export_integers(program, tmp_path / "model.onnx", fuse=fused)
    shutil.copy(loops, tmp_path)
    assert session(path).anncvt.native
    assert_equal_at_every_step(path, integer_network.load(program.folder), PIXELS, fused=fused)


def test_large_weights_go_beside_the_model(inverted, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "MAX_EMBEDDED_BYTES", 100)
    path = export_integers(inverted, tmp_path / "model.onnx")
    assert len(list(tmp_path.glob("model-*.data"))) == 1
    assert_equal_at_every_step(path, integer_network.load(inverted.folder), PIXELS)


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3, (0.5,) * 3), ((0.0,) * 3, (1 / 255,) * 3)],
    ids=["ImageNet", "ties", "bytes"],
)
def test_every_pixel_gets_the_integer_of_the_table(mean, std):
    preprocess = Preprocess((3, 16, 16), mean, std)
    grid, table = pixel_table(preprocess)
    network = one_step(Step("step", "max_pool", (INPUT,), (3, 16, 16), grid), grid, (3, 16, 16), table)
    pixels = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16), (1, 3, 16, 16)).copy()
    found = values_in_onnxruntime(network, preprocess, pixels, [integers_of(INPUT)])[0]
    np.testing.assert_array_equal(found, network.enter(pixels))


def one_step(step: Step, grid: Grid, shape, table) -> IntegerNetwork:
    """A network of ``step`` whose outputs become the logits as they are."""
    width = int(np.prod(step.shape))
    same = Epilogue(np.full(width, 2, np.int32), np.zeros(width, np.int64), 1, -(2**31), 2**31 - 1)
    flat = Step("flat", "flatten", (step.name,), (width, 1, 1), step.grid)
    logits = Step("logits", "rescale", ("flat",), (width, 1, 1), Grid(1.0, 0, 32), epilogue=same)
    return IntegerNetwork((step, flat, logits), shape, grid, table, {"bits": 8})


def values_in_onnxruntime(network, preprocess, pixels, names, body="scan"):
    import onnxruntime

    from anncvt.images import normalise

    model = onnx_ir.to_proto(integer_model(network, preprocess, 18, body, "image", "logits"))
    known = {value.name: value for value in model.graph.value_info}
    model.graph.output.extend(known.get(n) or helper.make_empty_tensor_value_info(n) for n in names)
    opened = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return opened.run(names, {"image": normalise(torch.from_numpy(pixels), preprocess).numpy()})


@st.composite
def steps(draw):
    """A step of any operation with any geometry, on a random input."""

    def pair(low, high):
        return draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    op = draw(st.sampled_from([op for op in integer_network.OPS if op != "flatten"]))
    zero, groups, channels = draw(st.integers(0, 255)), 1, draw(st.integers(1, 4))
    kernel, window = (1, 1), Window()
    if op in ("adder", "convolution", "shuffle"):
        groups = draw(st.integers(1, 2))
        channels = groups * channels
    if op not in ("slice", "pad", "rescale", "concatenate", "shuffle"):
        kernel = pair(1, 3)
        dilation = pair(1, 2) if op != "sum_pool" else (1, 1)
        padding = draw(st.tuples(*[st.integers(0, (k - 1) // 2 if "pool" in op else 2) for k in kernel * 2]))
        window = Window(pair(1, 3), padding, dilation, groups)
    if op == "slice":
        window = Window(stride=pair(1, 3))
    if op == "shuffle":
        window = Window(groups=groups)
    reach = [d * (k - 1) + 1 for d, k in zip(window.dilation, kernel, strict=True)]
    shape = (channels, *(draw(st.integers(r, 8)) for r in reach))
    filters = groups * draw(st.integers(1, 3)) if op in ("adder", "convolution") else channels
    around = draw(st.tuples(st.integers(0, 2), st.integers(0, 2))) if op == "pad" else (0, 0)
    if op == "pad":
        window, filters = Window(padding=draw(st.tuples(*[st.integers(0, 2)] * 4))), channels + sum(around)
        out = (shape[1] + window.padding[0] + window.padding[2], shape[2] + window.padding[1] + window.padding[3])
    elif op == "slice":
        around = (draw(st.integers(0, channels - 1)), 0)
        filters = channels - around[0]
        out = tuple(-(-size // stride) for size, stride in zip(shape[1:], window.stride, strict=True))
    else:
        out = window.output_size(shape[1:], kernel)
    inputs = (INPUT,)
    if op == "concatenate":
        inputs = (INPUT,) * draw(st.integers(2, 3))
        filters = channels * len(inputs)
    grid = Grid(1.0, zero)
    step = Step("step", op, inputs, (filters, *out), grid, window, kernel, pad_values=(zero,), channels=around)
    if op in ("adder", "convolution"):
        weight = random.integers(0, 256, (filters, channels // groups, *kernel)).astype(np.uint8)
        weight = weight if op == "adder" else weight.view(np.int8)
        step = dataclasses.replace(step, weight=weight, filter_group=np.zeros(filters, np.uint8))
    if op in integer_network.ACCUMULATING:
        shift = draw(st.integers(1, 31))
        multiplier = random.integers(-(2**15), 2**15, filters).astype(np.int32)
        bias = random.integers(-(2**40), 2**40, filters) if draw(st.booleans()) else np.zeros(filters, np.int64)
        low = draw(st.sampled_from([0, 0, 7]))
        residual = INPUT if (filters, *out) == shape and draw(st.booleans()) else None
        share = draw(st.integers(-(2**15), 2**15)) if residual else 0
        epilogue = Epilogue(multiplier, bias, shift, low, draw(st.sampled_from([15, 255])), share)
        step = dataclasses.replace(step, epilogue=epilogue, residual=residual)
    return step, shape, random.integers(0, 256, (2, *shape)).astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(steps(), st.sampled_from(BODIES))
def test_any_step(case, body):
    step, shape, pixels = case
    table = np.tile(np.arange(256, dtype=np.uint8), (shape[0], 1))
    network = one_step(step, step.grid, shape, table)
    wanted = []
    logits = integer_network.run(network, pixels, lambda _, output, sums: wanted.append((output, sums)))
    names = ["step/integers", "logits", *(["step/accumulator"] if step.epilogue else [])]
    found = values_in_onnxruntime(network, Preprocess(shape, (0.0,), (1.0,)), pixels, names, body)
    np.testing.assert_array_equal(found[0], wanted[0][0], strict=True)
    np.testing.assert_array_equal(found[1], logits.astype(np.float32))
    if step.epilogue is not None:
        np.testing.assert_array_equal(found[2], wanted[0][1], strict=True)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 31), st.integers(-(2**31), 2**31 - 1), st.integers(-(2**62), 2**62), st.booleans())
def test_rounding_of_signed_outputs(shift, multiplier, bias, small):
    """Ties round up, below zero too, and what is beyond 32 bits is clamped."""
    bias = bias >> (shift + 31) << shift if small else bias
    pixels = np.arange(8, dtype=np.uint8).reshape(1, 8, 1, 1)
    epilogue = Epilogue(np.full(8, multiplier, np.int32), np.full(8, bias), shift, -(2**31), 2**31 - 1)
    logits = Step("logits", "rescale", (INPUT,), (8, 1, 1), Grid(1.0, 0, 32), epilogue=epilogue)
    table = np.tile(np.arange(256, dtype=np.uint8), (8, 1))
    network = IntegerNetwork((logits,), (8, 1, 1), Grid(1.0, 0), table, {"bits": 8})
    wanted = integer_network.run(network, pixels)
    found = values_in_onnxruntime(network, Preprocess((8, 1, 1), (0.0,), (1.0,)), pixels, ["logits/integers"])[0]
    np.testing.assert_array_equal(found.reshape(1, 8), wanted, strict=True)


def refusal(call, *args, **kwargs):
    with pytest.raises(AnncvtError) as caught:
        call(*args, **kwargs)
    assert caught.value.fix
    return str(caught.value)


def test_refuses_without_integers(tmp_path):
    program = adder_program(Residual(), 8)
    for folder in (None, str(tmp_path)):
        program.folder = folder
        assert "no integer network" in refusal(export_integers, program, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"opset": 14}, {"opset": 24}, {"body": "two"}])
def test_refuses_what_does_not_exist(inverted, tmp_path, options):
    assert str(next(iter(options.values()))) in refusal(export_integers, inverted, tmp_path / "m.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_refuses_sums_that_may_overflow(inverted, tmp_path):
    network = integer_network.load(inverted.folder)
    last = network.steps[-1]
    wide = dataclasses.replace(last.epilogue, bias=np.full(last.shape[0], 2**63 - 1))
    changed = dataclasses.replace(network, steps=(*network.steps[:-1], dataclasses.replace(last, epilogue=wide)))
    assert last.name in refusal(integer_model, changed, inverted.preprocess, 18, "scan", "image", "logits")


def test_a_file_of_other_integers_is_told(inverted, tmp_path):
    path = export_integers(inverted, tmp_path / "model.onnx")
    network = integer_network.load(inverted.folder)
    last = network.steps[-1]
    other = dataclasses.replace(last.epilogue, bias=last.epilogue.bias + 1)
    changed = dataclasses.replace(network, steps=(*network.steps[:-1], dataclasses.replace(last, epilogue=other)))
    assert "does not hold the integer network" in refusal(onnx_trace.run, path, changed, PIXELS)
