"""An integer network as an ONNX graph that computes the integers of :mod:`anncvt.runtime.integer`, bit for bit.

Adders are ``ai.anncvt::AdderInteger2d``, everything else is in standard operators. Every tensor of the network is a
value of the graph: ``NAME/integers`` what a step puts out, ``NAME/accumulator`` what its epilogue works on. What
belongs to no step has a name that begins with a slash.

Fused, a step and its epilogue are one node whose accumulators are no value. Such nodes pass blocked tensors on to
each other (``NAME/blocked``, see :mod:`anncvt.runtime.onnx_fused_body`); plain ones are made where others read them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir
from onnx import TensorProto, helper, numpy_helper

from anncvt.program import Preprocess, versions
from anncvt.runtime.integer import Array, Epilogue, Step
from anncvt.runtime.integer_network import INPUT, IntegerNetwork, verify
from anncvt.runtime.onnx_body import DOMAIN, INTEGER_OP_TYPE, VERSION, adder_integer2d_function
from anncvt.runtime.onnx_fused_body import LANES, integer_functions

#: What torch's exporter writes, too; the oldest onnxruntime that is supported reads no newer one.
IR_VERSION = 10
BATCH = "batch"
#: What the names of ops that change the layout of integers end with.
KIND = "Integer"
#: The sign of an int8 weight as an offset of a uint8 one: onnxruntime's products of uint8 and int8 may saturate.
WEIGHT_ZERO = 128
#: A line that is rounded must not come nearer to a tie: some sixteen times what float32 resolves at 255.
TIE = 2**-12


def integers_of(name: str) -> str:
    """The value of the graph that holds a tensor of the network, ``[batch, C, H, W]`` uint8 (logits: int32)."""
    return f"{name}/integers"


def blocked_of(name: str) -> str:
    """The value of a fused graph that holds a tensor of the network, ``[batch, ceil(C/16), H, W, 16]`` uint8."""
    return f"{name}/blocked"


def blocked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """``[C, H, W]`` in blocked layout, without the batch."""
    return (-(-shape[0] // LANES), *shape[1:], LANES)


def accumulator_of(name: str) -> str:
    """The value of the graph that holds a step's accumulators, ``[batch, C, H, W]`` int32."""
    return f"{name}/accumulator"


def integer_model(
    network: IntegerNetwork,
    preprocess: Preprocess,
    opset: int,
    body: str,
    image: str,
    logits: str,
    *,
    fuse: bool = False,
) -> onnx_ir.Model:
    """The network from ``image`` (float32 ``[batch, C, H, W]``, normalised) to ``logits`` (float32).

    The image is turned back into the pixels it was made of, since pixels are what the network's table takes.

    Raises:
        AnncvtError: a sum of a layer may overflow.
    """
    verify(network)
    graph = _Graph(network, opset)
    _enter(graph, preprocess, image)
    for step in network.steps:
        if step.epilogue is None and _stays_blocked(graph, step):
            _BLOCKED[step.op](graph, step)
        elif step.epilogue is None:
            _REARRANGING[step.op](graph, step, [graph.plain(name) for name in step.inputs])
            graph.shaped(integers_of(step.name), TensorProto.UINT8, step.shape)
        elif fuse and step.op == "adder" and _ends_in_bytes(step.epilogue):
            _fused(graph, step, step.epilogue)
        elif fuse and _ends_in_bytes(step.epilogue):
            _fused_convolution(graph, step, step.epilogue)
        else:
            _ACCUMULATING[step.op](graph, step, [graph.plain(name) for name in step.inputs])
            graph.shaped(accumulator_of(step.name), TensorProto.INT32, step.shape)
            _finish(graph, step, step.epilogue)
    last = network.steps[-1]
    flat = graph.node("Flatten", [graph.plain(last.name)], f"/{logits}/flat", axis=1)
    graph.node("DequantizeLinear", [flat, graph.constant(f"/{logits}/scale", np.float32(last.grid.scale))], logits)
    functions = [adder_integer2d_function(opset, body)] if any(s.op == "adder" for s in network.steps) else []
    if graph.layouts:
        functions += integer_functions(opset)
    return onnx_ir.from_proto(graph.model(image, logits, functions))


class _Graph:
    """A graph while it grows."""

    def __init__(self, network: IntegerNetwork, opset: int) -> None:
        self.network, self.opset = network, opset
        #: Tensors of the network of which there is more than the plain value, and in which layouts there are.
        self.layouts: dict[str, set[str]] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.shapes: list[onnx.ValueInfoProto] = []

    def node(
        self, op: str, inputs: Sequence[str], output: str, domain: str = "", name: str = "", **attributes: Any
    ) -> str:
        node = helper.make_node(op, inputs, [output], name=name or output, domain=domain, **attributes)
        self.nodes.append(node)
        return output

    def constant(self, name: str, value: Any) -> str:
        self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def arithmetic(self, op: str, value: str, output: str, **constants: Any) -> str:
        """An operation of int64 and constants."""
        names = [self.constant(f"{output}/{name}", np.asarray(c, np.int64)) for name, c in constants.items()]
        return self.node(op, [value, *names], output)

    def plain(self, name: str) -> str:
        """The plain value of a tensor of the network."""
        value, known = integers_of(name), self.layouts.get(name, {integers_of(name)})
        if value not in known:
            channels = self.network.step(name).shape[0]
            self.node(f"Unblock{KIND}", [blocked_of(name)], value, DOMAIN, channels=channels)
            self.shaped(value, TensorProto.UINT8, self.network.step(name).shape)
            known.add(value)
        return value

    def blocked(self, name: str) -> str:
        """The blocked value of a tensor of the network."""
        value, known = blocked_of(name), self.layouts.setdefault(name, {integers_of(name)})
        if value not in known:
            self.in_blocks(integers_of(name), value, _shape(self.network, name))
            known.add(value)
        return value

    def in_blocks(self, plain: str, value: str, shape: Sequence[int]) -> str:
        """A plain value of ``shape`` ``[C, H, W]`` as a blocked one."""
        self.node(f"Block{KIND}", [plain], value, DOMAIN)
        self.shaped(value, TensorProto.UINT8, blocked_shape(shape))
        return value

    def shaped(self, value: str, element: int, shape: Sequence[int]) -> None:
        """State the type of a value, for whoever infers none through the op."""
        self.shapes.append(helper.make_tensor_value_info(value, element, [BATCH, *shape]))

    def model(self, image: str, logits: str, functions: list[onnx.FunctionProto]) -> onnx.ModelProto:
        network = self.network
        classes = network.steps[-1].shape[0]
        graph = helper.make_graph(
            self.nodes,
            "integers",
            [helper.make_tensor_value_info(image, TensorProto.FLOAT, [BATCH, *network.input_shape])],
            [helper.make_tensor_value_info(logits, TensorProto.FLOAT, [BATCH, classes])],
            list(self.constants.values()),
            value_info=self.shapes,
        )
        opsets = [helper.make_opsetid("", self.opset)]
        if functions:
            opsets.append(helper.make_opsetid(DOMAIN, VERSION))
        return helper.make_model(
            graph,
            functions=functions,
            opset_imports=opsets,
            ir_version=IR_VERSION,
            producer_name="anncvt",
            producer_version=versions().get("anncvt", "unknown"),
        )


def _enter(graph: _Graph, preprocess: Preprocess, image: str) -> None:
    """Normalised floats -> the pixels they were -> the integers of the table."""
    network = graph.network
    channels = network.input_shape[0]
    per_channel = (channels, 1, 1)
    std, mean = (
        np.broadcast_to(np.asarray(values, np.float32), channels).reshape(per_channel)
        for values in (preprocess.std, preprocess.mean)
    )
    spread = graph.node("Mul", [image, graph.constant("/pixels/std", std)], "/pixels/spread")
    unit = graph.node("Add", [spread, graph.constant("/pixels/mean", mean)], "/pixels/unit")
    scale, zero = graph.constant("/pixels/scale", np.float32(1 / 255)), graph.constant("/pixels/zero", np.uint8(0))
    pixels = graph.node("QuantizeLinear", [unit, scale, zero], "/pixels")
    graph.shaped(integers_of(INPUT), TensorProto.UINT8, network.input_shape)
    if (line := _line(network, std)) is not None:
        slope, start = graph.constant("/pixels/slope", line[0]), graph.constant("/pixels/start", line[1])
        floats = graph.node("Cast", [pixels], "/pixels/floats", to=TensorProto.FLOAT)
        sloped = graph.node("Mul", [floats, slope], "/pixels/sloped")
        places = graph.node("Add", [sloped, start], "/pixels/places")
        graph.node("QuantizeLinear", [places, graph.constant("/pixels/one", np.float32(1)), zero], integers_of(INPUT))
        return
    rows = np.arange(0, 256 * channels, 256, dtype=np.int32).reshape(per_channel)
    offsets = graph.node("Cast", [pixels], "/pixels/offsets", to=TensorProto.INT32)
    places = graph.node("Add", [offsets, graph.constant("/pixels/rows", rows)], "/pixels/places")
    table = graph.constant("/pixels/table", network.table.reshape(-1))
    graph.node("Gather", [table, places], integers_of(INPUT), axis=0)


def _line(network: IntegerNetwork, std: Array) -> tuple[Array, Array] | None:
    """Slope and start, float32 ``[C, 1, 1]``, of lines that round to the rows of the network's table, if there are any.

    The table of a normalisation is a rounded line, which runtimes compute ten times as fast as they look pixels up.
    """
    slope = (1 / (255 * std.astype(np.float64) * network.input_grid.scale)).astype(np.float32).reshape(-1, 1)
    sloped, wanted = np.arange(256, dtype=np.float32) * slope, network.table.astype(np.float64)
    least = np.where(wanted > 0, wanted - 0.5 - sloped, -np.inf).max(1)
    most = np.where(wanted < 255, wanted + 0.5 - sloped, np.inf).min(1)
    if not np.isfinite(least + most).all() or (most - least).min() < 2 * TIE:
        return None
    start = ((least + most) / 2).astype(np.float32)
    return slope.reshape(-1, 1, 1), start.reshape(-1, 1, 1)


def _adder(graph: _Graph, step: Step, inputs: Sequence[str]) -> None:
    parts = []
    for part in _parts(step):
        weight = graph.constant(f"{part.name}/weight", part.weight)
        output = accumulator_of(step.name) if part.alone else f"{part.name}/sums"
        attributes = {**_window(step), "pad_value": part.pad_value}
        parts.append(graph.node(INTEGER_OP_TYPE, [inputs[part.at], weight], output, DOMAIN, part.name, **attributes))
    if len(parts) > 1:
        _join(graph, step, parts, accumulator_of(step.name))


def _fused(graph: _Graph, step: Step, epilogue: Epilogue) -> None:
    """An adder with its epilogue as one node, of each filter group; groups meet in plain layout."""
    parts = []
    for part in _parts(step):
        shape = (len(part.filters), *step.shape[1:])
        inputs = [graph.blocked(step.inputs[part.at])]
        values = {
            "weight": part.weight,
            "multiplier": epilogue.multiplier[part.filters],
            "bias": epilogue.bias[part.filters],
        }
        inputs += [graph.constant(f"{part.name}/{name}", value) for name, value in values.items()]
        attributes = {**_window(step), "pad_value": part.pad_value, "shift": epilogue.shift}
        attributes |= {"low": epilogue.low, "high": epilogue.high}
        op = f"Fused{INTEGER_OP_TYPE}"
        if step.residual is not None:
            inputs.append(_residual(graph, step.residual, part))
            op, attributes = f"{op}Residual", {**attributes, "residual_multiplier": epilogue.residual_multiplier}
        output = blocked_of(step.name) if part.alone else f"{part.name}/part"
        graph.node(op, inputs, output, DOMAIN, part.name, **attributes)
        graph.shaped(output, TensorProto.UINT8, blocked_shape(shape))
        if not part.alone:
            output = graph.node(f"Unblock{KIND}", [output], f"{part.name}/plain", DOMAIN, channels=len(part.filters))
            graph.shaped(output, TensorProto.UINT8, shape)
        parts.append(output)
    if len(parts) > 1:
        _join(graph, step, parts, integers_of(step.name))
        graph.shaped(integers_of(step.name), TensorProto.UINT8, step.shape)
    graph.layouts[step.name] = {blocked_of(step.name) if len(parts) == 1 else integers_of(step.name)}


def _reads_the_image(step: Step) -> bool:
    """Whether a step is a convolution of few channels in plain layout, which need not be blocked first."""
    return step.op == "convolution" and step.inputs[0] == INPUT and step.window.groups == 1 and step.residual is None


def _fused_convolution(graph: _Graph, step: Step, epilogue: Epilogue) -> None:
    """A convolution with its epilogue as one node, that of the image from plain to blocked integers.

    Sums over windows and rescaling are convolutions with ones.
    """
    weight, window, bias, pad_value = step.weight, _window(step), epilogue.bias, 0
    if step.op != "rescale":
        pad_value = step.pad_values[0]
    if weight is None:
        weight = np.ones((step.shape[0], 1, *step.kernel), np.int8)
        window["group"] = step.shape[0]
        # A convolution counts from the zero point, where a sum counts from 0.
        bias = bias + epilogue.multiplier.astype(np.int64) * (pad_value * step.kernel[0] * step.kernel[1])
    values = {"weight": _shifted(weight), "multiplier": epilogue.multiplier, "bias": bias}
    inputs = [graph.constant(f"{step.name}/{name}", value) for name, value in values.items()]
    settings = {**window, "pad_value": pad_value, "shift": epilogue.shift, "low": epilogue.low, "high": epilogue.high}
    op, output = "FusedConvInteger2d", blocked_of(step.name)
    if _reads_the_image(step):
        inputs.insert(0, graph.plain(INPUT))
    else:
        op, inputs = f"{op}Blocked", [graph.blocked(step.inputs[0]), *inputs]
    if step.residual is not None:
        inputs.append(graph.blocked(step.residual))
        op, settings = f"{op}Residual", {**settings, "residual_multiplier": epilogue.residual_multiplier}
    graph.node(op, inputs, output, DOMAIN, step.name, **settings)
    graph.shaped(output, TensorProto.UINT8, blocked_shape(step.shape))
    graph.layouts[step.name] = {output}


def _residual(graph: _Graph, name: str, part: _Part) -> str:
    """The channels that a part's filters add to, blocked."""
    if part.alone:
        return graph.blocked(name)
    places = graph.constant(f"{part.name}/filters", part.filters.astype(np.int64))
    chosen = graph.node("Gather", [graph.plain(name), places], f"{part.name}/residual", axis=1)
    shape = (len(part.filters), *graph.network.step(name).shape[1:])
    return graph.in_blocks(chosen, f"{part.name}/residual/blocked", shape)


@dataclass(frozen=True)
class _Part:
    """The filters of an adder that read one of its inputs."""

    name: str  # of the node
    at: int  # which input
    filters: Array  # which filters, ascending
    weight: Array
    pad_value: int
    alone: bool  # whether these are all filters


def _parts(step: Step) -> list[_Part]:
    assert step.weight is not None and step.filter_group is not None
    members = [np.flatnonzero(step.filter_group == at) for at in range(len(step.inputs))]
    used = [at for at, filters in enumerate(members) if len(filters)]
    return [
        _Part(
            step.name if count == 1 else f"{step.name}:{count}",
            at,
            members[at],
            step.weight[members[at]],
            step.pad_values[at],
            len(used) == 1,
        )
        for count, at in enumerate(used, 1)
    ]


def _join(graph: _Graph, step: Step, values: list[str], output: str) -> None:
    """The filters of all parts in the step's order."""
    joined = graph.node("Concat", values, f"{step.name}/joined", axis=1)
    assert step.filter_group is not None
    order = np.argsort(np.argsort(step.filter_group, kind="stable"))
    places = graph.constant(f"{step.name}/order", order.astype(np.int64))
    graph.node("Gather", [joined, places], output, axis=1)


def _convolution(graph: _Graph, step: Step, inputs: Sequence[str]) -> None:
    assert step.weight is not None
    zeros = [
        graph.constant(f"{step.name}/zero", np.uint8(step.pad_values[0])),
        graph.constant(f"{step.name}/weight_zero", np.uint8(WEIGHT_ZERO)),
    ]
    weight, shape = _shifted(step.weight), _shape(graph.network, step.inputs[0])
    one_pixel = shape[1:] == step.shape[1:] == weight.shape[2:] == (1, 1)
    if one_pixel and step.window.groups == 1 and not any(step.window.padding):
        # A product of matrices, whose constant weights runtimes arrange once.
        operands = [
            graph.node("Flatten", inputs, f"{step.name}/flat", axis=1),
            graph.constant(f"{step.name}/weight", np.ascontiguousarray(weight[:, :, 0, 0].T)),
            *zeros,
        ]
        product = graph.node("MatMulInteger", operands, f"{step.name}/product", name=step.name)
        axes = graph.constant(f"{step.name}/axes", np.array([2, 3], np.int64))
        graph.node("Unsqueeze", [product, axes], accumulator_of(step.name))
        return
    operands = [*inputs, graph.constant(f"{step.name}/weight", weight), *zeros]
    graph.node("ConvInteger", operands, accumulator_of(step.name), name=step.name, **_window(step))


def _shifted(weight: Array) -> Array:
    """Of a convolution, uint8 with the zero point :data:`WEIGHT_ZERO`."""
    return (weight.astype(np.int16) + WEIGHT_ZERO).astype(np.uint8)


def _shape(network: IntegerNetwork, name: str) -> tuple[int, ...]:
    """Of a tensor of the network, without the batch."""
    return network.input_shape if name == INPUT else network.step(name).shape


def _sum_pool(graph: _Graph, step: Step, inputs: Sequence[str]) -> None:
    """A convolution with ones, whose padding adds nothing; here it counts as the zero point, like every pixel.

    Of the whole map it is a plain sum, for which onnxruntime takes a fraction of the time.
    """
    channels, zero = step.shape[0], step.pad_values[0]
    if step.kernel == tuple(_shape(graph.network, step.inputs[0])[1:]) and not any(step.window.padding):
        wide = graph.node("Cast", inputs, f"{step.name}/wide_integers", to=TensorProto.INT32)
        axes = graph.constant(f"{step.name}/axes", np.array([2, 3], np.int64))
        graph.node("ReduceSum", [wide, axes], accumulator_of(step.name), name=step.name)
        return
    operands = [
        *inputs,
        graph.constant(f"{step.name}/ones", np.ones((channels, 1, *step.kernel), np.uint8)),
        graph.constant(f"{step.name}/zero", np.uint8(zero)),
    ]
    window = {**_window(step), "group": channels}
    centred = graph.node("ConvInteger", operands, f"{step.name}/centred", name=step.name, **window)
    back = graph.constant(f"{step.name}/back", np.int32(zero * step.kernel[0] * step.kernel[1]))
    graph.node("Add", [centred, back], accumulator_of(step.name))


def _rescale(graph: _Graph, step: Step, inputs: Sequence[str]) -> None:
    graph.node("Cast", inputs, accumulator_of(step.name), to=TensorProto.INT32)


def _finish(graph: _Graph, step: Step, epilogue: Epilogue) -> None:
    """Requantise in int64, see :class:`anncvt.runtime.integer.Epilogue`.

    ONNX shifts no signed integers, and its division drops fractions toward zero. So the sum is clamped before the
    shift and counted from the lower clamp, which leaves numbers that division floors.
    """
    name, half = step.name, 1 << (epilogue.shift - 1)
    total = graph.node("Cast", [accumulator_of(name)], f"{name}/wide", to=TensorProto.INT64)
    total = graph.arithmetic("Mul", total, f"{name}/scaled", multiplier=_column(epilogue.multiplier))
    total = graph.arithmetic("Add", total, f"{name}/shifted", bias=_column(epilogue.bias + half))
    if step.residual is not None:
        residual = graph.node("Cast", [graph.plain(step.residual)], f"{name}/residual", to=TensorProto.INT64)
        residual = graph.arithmetic("Mul", residual, f"{name}/share", multiplier=epilogue.residual_multiplier)
        total = graph.node("Add", [total, residual], f"{name}/total")
    least, unit = epilogue.low << epilogue.shift, 1 << epilogue.shift
    most = (epilogue.high << epilogue.shift) + unit - 1
    total = graph.arithmetic("Clip", total, f"{name}/clamped", low=least, high=most)
    if least:
        total = graph.arithmetic("Sub", total, f"{name}/counted", least=least)
    total = graph.arithmetic("Div", total, f"{name}/divided", unit=unit)
    if least:
        total = graph.arithmetic("Add", total, f"{name}/placed", low=epilogue.low)
    element = TensorProto.UINT8 if _ends_in_bytes(epilogue) else TensorProto.INT32
    graph.node("Cast", [total], integers_of(name), to=element)
    graph.shaped(integers_of(name), element, step.shape)


def _stays_blocked(graph: _Graph, step: Step) -> bool:
    """Whether the inputs of a step are there in blocks, and its output can be made of them."""
    there = all(blocked_of(name) in graph.layouts.get(name, ()) for name in step.inputs)
    whole = all(_shape(graph.network, name)[0] % LANES == 0 for name in step.inputs[:-1])
    return there and whole and step.op in _BLOCKED


def _blocked_concatenation(graph: _Graph, step: Step) -> None:
    graph.node("Concat", [blocked_of(name) for name in step.inputs], blocked_of(step.name), name=step.name, axis=1)
    graph.shaped(blocked_of(step.name), TensorProto.UINT8, blocked_shape(step.shape))
    graph.layouts[step.name] = {blocked_of(step.name)}


def _blocked_max_pool(graph: _Graph, step: Step) -> None:
    window: dict[str, Any] = {"kernel_shape": step.kernel, **_window(step)}
    del window["group"]
    graph.node(f"MaxPool{KIND}", [blocked_of(step.inputs[0])], blocked_of(step.name), DOMAIN, step.name, **window)
    graph.shaped(blocked_of(step.name), TensorProto.UINT8, blocked_shape(step.shape))
    graph.layouts[step.name] = {blocked_of(step.name)}


def _ends_in_bytes(epilogue: Epilogue) -> bool:
    return epilogue.low >= 0 and epilogue.high <= 255


def _column(values: Array) -> Array:
    """Per channel."""
    return values.astype(np.int64).reshape(-1, 1, 1)


def _max_pool(graph: _Graph, step: Step, inputs: Sequence[str]) -> None:
    window = _window(step)
    del window["group"]
    graph.node("MaxPool", inputs, integers_of(step.name), name=step.name, kernel_shape=step.kernel, **window)


def _slice(graph: _Graph, step: Step, inputs: Sequence[str]) -> None:
    first = step.channels[0]
    starts, ends = (first, 0, 0), (first + step.shape[0], 2**31, 2**31)
    rows = {"starts": starts, "ends": ends, "axes": (1, 2, 3), "steps": (1, *step.window.stride)}
    operands = [graph.constant(f"{step.name}/{part}", np.array(row, np.int64)) for part, row in rows.items()]
    graph.node("Slice", [*inputs, *operands], integers_of(step.name), name=step.name)


def _pad(graph: _Graph, step: Step, inputs: Sequence[str]) -> None:
    top, left, bottom, right = step.window.padding
    before, behind = step.channels
    pads = np.array([0, before, top, left, 0, behind, bottom, right], np.int64)
    operands = [
        graph.constant(f"{step.name}/pads", pads),
        graph.constant(f"{step.name}/zero", np.uint8(step.pad_values[0])),
    ]
    graph.node("Pad", [*inputs, *operands], integers_of(step.name), name=step.name)


def _flatten(graph: _Graph, step: Step, inputs: Sequence[str]) -> None:
    shape = graph.constant(f"{step.name}/shape", np.array([0, *step.shape], np.int64))
    graph.node("Reshape", [*inputs, shape], integers_of(step.name), name=step.name)


def _concatenate(graph: _Graph, step: Step, inputs: Sequence[str]) -> None:
    graph.node("Concat", inputs, integers_of(step.name), name=step.name, axis=1)


def _shuffle(graph: _Graph, step: Step, inputs: Sequence[str]) -> None:
    channels, height, width = step.shape
    shapes = ((0, step.window.groups, -1, height, width), (0, channels, height, width))
    split, whole = (
        graph.constant(f"{step.name}/{part}", np.array(shape, np.int64))
        for part, shape in zip(("split", "whole"), shapes, strict=True)
    )
    groups = graph.node("Reshape", [*inputs, split], f"{step.name}/groups")
    turned = graph.node("Transpose", [groups], f"{step.name}/turned", perm=(0, 2, 1, 3, 4))
    graph.node("Reshape", [turned, whole], integers_of(step.name), name=step.name)


def _window(step: Step) -> dict[str, Any]:
    window = step.window
    return {
        "strides": window.stride,
        "pads": window.padding,
        "dilations": window.dilation,
        "group": window.groups,
    }


_ACCUMULATING: dict[str, Callable[[_Graph, Step, Sequence[str]], None]] = {
    "adder": _adder,
    "convolution": _convolution,
    "sum_pool": _sum_pool,
    "rescale": _rescale,
}
_REARRANGING: dict[str, Callable[[_Graph, Step, Sequence[str]], None]] = {
    "max_pool": _max_pool,
    "slice": _slice,
    "pad": _pad,
    "flatten": _flatten,
    "concatenate": _concatenate,
    "shuffle": _shuffle,
}
#: Of these, the ones that there are in blocked layout, too.
_BLOCKED: dict[str, Callable[[_Graph, Step], None]] = {
    "max_pool": _blocked_max_pool,
    "concatenate": _blocked_concatenation,
}
