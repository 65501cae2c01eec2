"""Steps of an integer network that only rearrange integers, as ONNX nodes in plain and in blocked layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto

from anncvt.runtime.integer import Step
from anncvt.runtime.onnx_body import DOMAIN
from anncvt.runtime.onnx_fused_body import LANES
from anncvt.runtime.onnx_integer_graph import KIND, Graph, blocked_of, blocked_shape, integers_of, shape_of, window_of


def stays_blocked(graph: Graph, step: Step) -> bool:
    """Whether the inputs of a step are there in blocks, and its output can be made of them."""
    there = all(blocked_of(name) in graph.layouts.get(name, ()) for name in step.inputs)
    whole = all(shape_of(graph.network, name)[0] % LANES == 0 for name in step.inputs[:-1])
    return there and whole and step.op in BLOCKED_MOVES


def _max_pool(graph: Graph, step: Step, inputs: Sequence[str]) -> None:
    window = window_of(step)
    del window["group"]
    graph.node("MaxPool", inputs, integers_of(step.name), name=step.name, kernel_shape=step.kernel, **window)


def _slice(graph: Graph, step: Step, inputs: Sequence[str]) -> None:
    first = step.channels[0]
    starts, ends = (first, 0, 0), (first + step.shape[0], 2**31, 2**31)
    rows = {"starts": starts, "ends": ends, "axes": (1, 2, 3), "steps": (1, *step.window.stride)}
    operands = [graph.constant(f"{step.name}/{part}", np.array(row, np.int64)) for part, row in rows.items()]
    graph.node("Slice", [*inputs, *operands], integers_of(step.name), name=step.name)


def _pad(graph: Graph, step: Step, inputs: Sequence[str]) -> None:
    top, left, bottom, right = step.window.padding
    before, behind = step.channels
    pads = np.array([0, before, top, left, 0, behind, bottom, right], np.int64)
    operands = [
        graph.constant(f"{step.name}/pads", pads),
        graph.constant(f"{step.name}/zero", np.uint8(step.pad_values[0])),
    ]
    graph.node("Pad", [*inputs, *operands], integers_of(step.name), name=step.name)


def _flatten(graph: Graph, step: Step, inputs: Sequence[str]) -> None:
    shape = graph.constant(f"{step.name}/shape", np.array([0, *step.shape], np.int64))
    graph.node("Reshape", [*inputs, shape], integers_of(step.name), name=step.name)


def _concatenate(graph: Graph, step: Step, inputs: Sequence[str]) -> None:
    graph.node("Concat", inputs, integers_of(step.name), name=step.name, axis=1)


def _shuffle(graph: Graph, step: Step, inputs: Sequence[str]) -> None:
    channels, height, width = step.shape
    shapes = ((0, step.window.groups, -1, height, width), (0, channels, height, width))
    split, whole = (
        graph.constant(f"{step.name}/{part}", np.array(shape, np.int64))
        for part, shape in zip(("split", "whole"), shapes, strict=True)
    )
    groups = graph.node("Reshape", [*inputs, split], f"{step.name}/groups")
    turned = graph.node("Transpose", [groups], f"{step.name}/turned", perm=(0, 2, 1, 3, 4))
    graph.node("Reshape", [turned, whole], integers_of(step.name), name=step.name)


def _blocked_max_pool(graph: Graph, step: Step) -> None:
    window: dict[str, Any] = {"kernel_shape": step.kernel, **window_of(step)}
    del window["group"]
    graph.node(f"MaxPool{KIND}", [blocked_of(step.inputs[0])], blocked_of(step.name), DOMAIN, step.name, **window)
    graph.shaped(blocked_of(step.name), TensorProto.UINT8, blocked_shape(step.shape))
    graph.layouts[step.name] = {blocked_of(step.name)}


def _blocked_concatenation(graph: Graph, step: Step) -> None:
    graph.node("Concat", [blocked_of(name) for name in step.inputs], blocked_of(step.name), name=step.name, axis=1)
    graph.shaped(blocked_of(step.name), TensorProto.UINT8, blocked_shape(step.shape))
    graph.layouts[step.name] = {blocked_of(step.name)}


#: By what a step does; each takes the step and its plain inputs, and leaves the step's plain integers.
MOVES: dict[str, Callable[[Graph, Step, Sequence[str]], None]] = {
    "max_pool": _max_pool,
    "slice": _slice,
    "pad": _pad,
    "flatten": _flatten,
    "concatenate": _concatenate,
    "shuffle": _shuffle,
}
#: Of these, the ones that there are in blocked layout, too.
BLOCKED_MOVES: dict[str, Callable[[Graph, Step], None]] = {
    "max_pool": _blocked_max_pool,
    "concatenate": _blocked_concatenation,
}
