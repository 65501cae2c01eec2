"""Steps of an integer network that accumulate, with their requantisation as one ONNX node, in blocked layout."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from anncvt.runtime.integer import Epilogue, Step
from anncvt.runtime.integer_network import INPUT
from anncvt.runtime.onnx_body import DOMAIN, INTEGER_OP_TYPE
from anncvt.runtime.onnx_integer_graph import KIND, Graph, blocked_of, blocked_shape, integers_of, window_of
from anncvt.runtime.onnx_integer_layers import Part, join, parts_of, shifted


def fused_adder(graph: Graph, step: Step, epilogue: Epilogue) -> None:
    """An adder with its epilogue as one node, of each filter group; groups meet in plain layout."""
    parts = []
    for part in parts_of(step):
        shape = (len(part.filters), *step.shape[1:])
        inputs = [graph.blocked(step.inputs[part.at])]
        values = {
            "weight": part.weight,
            "multiplier": epilogue.multiplier[part.filters],
            "bias": epilogue.bias[part.filters],
        }
        inputs += [graph.constant(f"{part.name}/{name}", value) for name, value in values.items()]
        attributes = {**window_of(step), "pad_value": part.pad_value, "shift": epilogue.shift}
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
        join(graph, step, parts, integers_of(step.name))
        graph.shaped(integers_of(step.name), TensorProto.UINT8, step.shape)
    graph.layouts[step.name] = {blocked_of(step.name) if len(parts) == 1 else integers_of(step.name)}


def _residual(graph: Graph, name: str, part: Part) -> str:
    """The channels that a part's filters add to, blocked."""
    if part.alone:
        return graph.blocked(name)
    places = graph.constant(f"{part.name}/filters", part.filters.astype(np.int64))
    chosen = graph.node("Gather", [graph.plain(name), places], f"{part.name}/residual", axis=1)
    shape = (len(part.filters), *graph.network.step(name).shape[1:])
    return graph.in_blocks(chosen, f"{part.name}/residual/blocked", shape)


def _reads_the_image(step: Step) -> bool:
    """Whether a step is a convolution of few channels in plain layout, which need not be blocked first."""
    return step.op == "convolution" and step.inputs[0] == INPUT and step.window.groups == 1 and step.residual is None


def fused_convolution(graph: Graph, step: Step, epilogue: Epilogue) -> None:
    """A convolution with its epilogue as one node, that of the image from plain to blocked integers.

    Sums over windows and rescaling are convolutions with ones.
    """
    weight, window, bias, pad_value = step.weight, window_of(step), epilogue.bias, 0
    if step.op != "rescale":
        pad_value = step.pad_values[0]
    if weight is None:
        weight = np.ones((step.shape[0], 1, *step.kernel), np.int8)
        window["group"] = step.shape[0]
        # A convolution counts from the zero point, where a sum counts from 0.
        bias = bias + epilogue.multiplier.astype(np.int64) * (pad_value * step.kernel[0] * step.kernel[1])
    values = {"weight": shifted(weight), "multiplier": epilogue.multiplier, "bias": bias}
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
