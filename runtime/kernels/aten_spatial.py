"""ATen operators on the image: pooling, windows, concatenation, relabelled shapes."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from anncvt.runtime.geometry import expand_padding
from anncvt.runtime.kernels.aten import Lowering, Unsuitable, argument, arguments, handles, overload_of, pair, shape_of
from anncvt.runtime.kernels.fusion import Value, View
from anncvt.runtime.kernels.pooling import Pool


@handles("max_pool2d.default", "max_pool2d_with_indices.default", "avg_pool2d.default")
def _pool(context: Lowering, node: fx.Node) -> Any:
    x = context.blocked(arguments(node)[0])
    maximum = overload_of(node).startswith("max")
    result = node.meta["val"]
    with_indices = isinstance(result, tuple | list)
    shape = tuple(int(size) for size in (result[0] if with_indices else result).shape)
    kernel = pair(arguments(node)[1])
    stride = pair(argument(node, 2, "stride") or kernel)
    padding = expand_padding(pair(argument(node, 3, "padding", 0)))
    spec = Pool(
        "max" if maximum else "mean",
        x.shape[0],
        x.shape[1],
        pair(x.shape[2:]),
        pair(shape[2:]),
        kernel,
        stride,
        padding,
        pair(argument(node, 4, "dilation", 1)) if maximum else (1, 1),
        True if maximum else argument(node, 5, "count_include_pad", True),
        0 if maximum else argument(node, 6, "divisor_override") or 0,
    )
    value = context.emitter.pool(spec, x, shape)
    return (value,) if with_indices else value


@handles("mean.dim", "_adaptive_avg_pool2d.default", "adaptive_avg_pool2d.default")
def _adaptive(context: Lowering, node: fx.Node) -> Value:
    """Means over windows that divide the image; the global mean is the case of one window."""
    before = shape_of(arguments(node)[0])
    if len(before) != 4:
        raise Unsuitable("a mean over other than four dimensions")
    out = (1, 1)
    if overload_of(node) == "mean.dim":
        if sorted(axis % 4 for axis in arguments(node)[1]) != [2, 3]:
            raise Unsuitable("a mean over other dimensions")
    else:
        out = pair(shape_of(node)[2:])
    x = context.blocked(arguments(node)[0])
    return context.emitter.pool(Pool("mean", x.shape[0], x.shape[1], pair(x.shape[2:]), out), x, shape_of(node))


@handles("adaptive_max_pool2d.default")
def _adaptive_max(context: Lowering, node: fx.Node) -> tuple[Value]:
    """Maxima alone; nothing here can use their places."""
    x = context.blocked(arguments(node)[0])
    shape = tuple(int(size) for size in node.meta["val"][0].shape)
    if len(shape) != 4:
        raise Unsuitable("maxima over other than an image")
    return (context.emitter.pool(Pool("max", x.shape[0], x.shape[1], pair(x.shape[2:]), pair(shape[2:])), x, shape),)


@handles("slice.Tensor")
def _slice(context: Lowering, node: fx.Node) -> Any:
    axis, before = argument(node, 1, "dim", 0), shape_of(arguments(node)[0])
    axis %= len(before)
    start, stop = argument(node, 2, "start") or 0, argument(node, 3, "end")
    step, size = argument(node, 4, "step", 1), before[axis]
    start, stop, step = slice(start, stop, step).indices(size)
    if (start, stop, step) == (0, size, 1):
        return context.lazy(arguments(node)[0])
    view = context.view(arguments(node)[0])
    if axis == 0:
        raise Unsuitable("a slice of the batch")
    return view.replaced(axis - 1, view.axes[axis - 1].slice(start, stop, step))


@handles("split_with_sizes.default", "split.Tensor", "chunk.default")
def _split(context: Lowering, node: fx.Node) -> tuple[View, ...]:
    if argument(node, 2, "dim", 0) != 1:
        raise Unsuitable("a split of other than channels")
    view, parts, start = View.of(context.blocked(arguments(node)[0])), [], 0
    for part in node.meta["val"]:
        stop = start + int(part.shape[1])
        parts.append(view.replaced(0, view.axes[0].slice(start, stop, 1)))
        start = stop
    return tuple(parts)


@handles("constant_pad_nd.default", "pad.default")
def _pad(context: Lowering, node: fx.Node) -> View:
    sides = list(arguments(node)[1])
    named = overload_of(node) == "pad.default"
    fill = argument(node, 3 if named else 2, "value") or 0.0
    view = context.view(arguments(node)[0])
    if (named and argument(node, 2, "mode", "constant") != "constant") or len(sides) > 6:
        raise Unsuitable("padding")
    if view.padded and view.fill != fill:
        view = View.of(context.blocked(arguments(node)[0]))
    view = View(view.x, view.axes, float(fill))
    for i in range(len(sides) // 2):
        axis = 2 - i
        view = view.replaced(axis, view.axes[axis].pad(sides[2 * i], sides[2 * i + 1]))
    return view


@handles("cat.default")
def _cat(context: Lowering, node: fx.Node) -> Value:
    if len(shape_of(node)) not in (2, 4) or argument(node, 1, "dim", 0) not in (1, 1 - len(shape_of(node))):
        raise Unsuitable("concatenation of other than channels")
    return context.emitter.concatenate([context.blocked(part) for part in arguments(node)[0]])


@handles("view.default", "reshape.default", "flatten.using_ints", "unsqueeze.default", "squeeze.dim", "squeeze.dims")
def _relabel(context: Lowering, node: fx.Node) -> Value:
    """``[N, C, 1, 1]`` and ``[N, C]`` are the same data in blocked layout."""
    x, shape = context.value(arguments(node)[0]), shape_of(node)
    one_pixel = math.prod(x.shape[2:]) == math.prod(shape[2:]) == 1
    if not (x.blocked and one_pixel and x.shape[:2] == shape[:2] and len(shape) in (2, 4)):
        raise Unsuitable("a reshape")
    return Value(x.expr, shape, True)


@handles(
    "clone.default",
    "alias.default",
    "detach.default",
    "contiguous.default",
    "dropout.default",
    "lift_fresh_copy.default",
)
def _identity(context: Lowering, node: fx.Node) -> Any:
    return context.lazy(arguments(node)[0])


@handles("getitem")
def _getitem(context: Lowering, node: fx.Node) -> Any:
    parts = context.lazy(arguments(node)[0])
    if not isinstance(parts, tuple) or arguments(node)[1] >= len(parts):
        raise Unsuitable("an output that has no kernel")
    return parts[arguments(node)[1]]
