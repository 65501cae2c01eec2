"""Steps of an integer network that accumulate, as ONNX nodes in plain layout, and the requantisation behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from anncvt.runtime.integer import Array, Epilogue, Step
from anncvt.runtime.onnx_body import DOMAIN, INTEGER_OP_TYPE
from anncvt.runtime.onnx_integer_graph import Graph, accumulator_of, integers_of, shape_of, window_of

#: The sign of an int8 weight as an offset of a uint8 one: onnxruntime's products of uint8 and int8 may saturate.
WEIGHT_ZERO = 128


@dataclass(frozen=True)
class Part:
    """The filters of an adder that read one of its inputs."""

    name: str  # of the node
    at: int  # which input
    filters: Array  # which filters, ascending
    weight: Array  # [filters, C/groups, kh, kw] uint8
    pad_value: int
    alone: bool  # whether these are all filters


def parts_of(step: Step) -> list[Part]:
    """The filters of an adder by the input they read, without inputs that none reads."""
    assert step.weight is not None and step.filter_group is not None
    members = [np.flatnonzero(step.filter_group == at) for at in range(len(step.inputs))]
    used = [at for at, filters in enumerate(members) if len(filters)]
    return [
        Part(
            step.name if count == 1 else f"{step.name}:{count}",
            at,
            members[at],
            step.weight[members[at]],
            step.pad_values[at],
            len(used) == 1,
        )
        for count, at in enumerate(used, 1)
    ]


def join(graph: Graph, step: Step, values: list[str], output: str) -> None:
    """``values`` of all parts of an adder, plain, as ``output`` with the filters in the step's order."""
    joined = graph.node("Concat", values, f"{step.name}/joined", axis=1)
    assert step.filter_group is not None
    order = np.argsort(np.argsort(step.filter_group, kind="stable"))
    places = graph.constant(f"{step.name}/order", order.astype(np.int64))
    graph.node("Gather", [joined, places], output, axis=1)


def _adder(graph: Graph, step: Step, inputs: Sequence[str]) -> None:
    parts = []
    for part in parts_of(step):
        weight = graph.constant(f"{part.name}/weight", part.weight)
        output = accumulator_of(step.name) if part.alone else f"{part.name}/sums"
        attributes = {**window_of(step), "pad_value": part.pad_value}
        parts.append(graph.node(INTEGER_OP_TYPE, [inputs[part.at], weight], output, DOMAIN, part.name, **attributes))
    if len(parts) > 1:
        join(graph, step, parts, accumulator_of(step.name))


def _convolution(graph: Graph, step: Step, inputs: Sequence[str]) -> None:
    assert step.weight is not None
    zeros = [
        graph.constant(f"{step.name}/zero", np.uint8(step.pad_values[0])),
        graph.constant(f"{step.name}/weight_zero", np.uint8(WEIGHT_ZERO)),
    ]
    weight, shape = shifted(step.weight), shape_of(graph.network, step.inputs[0])
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
    graph.node("ConvInteger", operands, accumulator_of(step.name), name=step.name, **window_of(step))


def shifted(weight: Array) -> Array:
    """int8 weights of a convolution as uint8 with the zero point :data:`WEIGHT_ZERO`."""
    return (weight.astype(np.int16) + WEIGHT_ZERO).astype(np.uint8)


def _sum_pool(graph: Graph, step: Step, inputs: Sequence[str]) -> None:
    """A convolution with ones, whose padding adds nothing; here it counts as the zero point, like every pixel.

    Of the whole map it is a plain sum, for which onnxruntime takes a fraction of the time.
    """
    channels, zero = step.shape[0], step.pad_values[0]
    if step.kernel == tuple(shape_of(graph.network, step.inputs[0])[1:]) and not any(step.window.padding):
        wide = graph.node("Cast", inputs, f"{step.name}/wide_integers", to=TensorProto.INT32)
        axes = graph.constant(f"{step.name}/axes", np.array([2, 3], np.int64))
        graph.node("ReduceSum", [wide, axes], accumulator_of(step.name), name=step.name)
        return
    operands = [
        *inputs,
        graph.constant(f"{step.name}/ones", np.ones((channels, 1, *step.kernel), np.uint8)),
        graph.constant(f"{step.name}/zero", np.uint8(zero)),
    ]
    window = {**window_of(step), "group": channels}
    centred = graph.node("ConvInteger", operands, f"{step.name}/centred", name=step.name, **window)
    back = graph.constant(f"{step.name}/back", np.int32(zero * step.kernel[0] * step.kernel[1]))
    graph.node("Add", [centred, back], accumulator_of(step.name))


def _rescale(graph: Graph, step: Step, inputs: Sequence[str]) -> None:
    graph.node("Cast", inputs, accumulator_of(step.name), to=TensorProto.INT32)


def finish(graph: Graph, step: Step, epilogue: Epilogue) -> None:
    """Requantise a step's accumulators in int64, see :class:`anncvt.runtime.integer.Epilogue`.

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
    element = TensorProto.UINT8 if ends_in_bytes(epilogue) else TensorProto.INT32
    graph.node("Cast", [total], integers_of(name), to=element)
    graph.shaped(integers_of(name), element, step.shape)


def ends_in_bytes(epilogue: Epilogue) -> bool:
    """Whether what it puts out is uint8; else it is int32."""
    return epilogue.low >= 0 and epilogue.high <= 255


def _column(values: Array) -> Array:
    """Per channel."""
    return values.astype(np.int64).reshape(-1, 1, 1)


#: By what a step does; each takes the step and its plain inputs, and leaves the step's accumulators.
LAYERS: dict[str, Callable[[Graph, Step, Sequence[str]], None]] = {
    "adder": _adder,
    "convolution": _convolution,
    "sum_pool": _sum_pool,
    "rescale": _rescale,
}
