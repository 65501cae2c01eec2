"""ATen operators that have kernels of their own on blocked tensors. What is not here goes through ``foreign``."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor, fx

from anncvt.runtime.geometry import Padding, expand_padding
from anncvt.runtime.kernels.emitter import Emitter, linear_as_convolution
from anncvt.runtime.kernels.fusion import Combination, Convolution, Pending, Value, View
from anncvt.runtime.kernels.layer import Activation
from anncvt.runtime.kernels.pooling import Pool


class Unsuitable(Exception):
    """This use of an operator has no kernel here (layout, rank, dtype): take the general way."""


class Lowering(Protocol):
    """What a handler sees of the graph being lowered."""

    emitter: Emitter

    def value(self, argument: Any) -> Value: ...

    def blocked(self, argument: Any) -> Value: ...

    def pending(self, argument: Any) -> Pending: ...

    def view(self, argument: Any) -> View: ...

    def lazy(self, argument: Any) -> Any: ...

    def constant(self, argument: Any) -> Tensor | None: ...


Handler = Callable[[Lowering, fx.Node], Any]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler for ATen overloads, ``"relu.default"``."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """A positional or keyword argument of ``node``."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def _args(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.args)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape torch.export recorded for ``node``."""
    return tuple(int(size) for size in node.meta["val"].shape)


def _pair(values: Any) -> tuple[int, int]:
    if isinstance(values, int):
        return (values, values)
    first, *rest = values
    return (int(first), int(rest[0] if rest else first))


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def _weight(context: Lowering, node: Any) -> Tensor:
    weight = context.constant(node)
    if weight is None:
        raise Unsuitable("weights are computed from the input")
    return weight.detach().float()


def _convolution(
    context: Lowering,
    x: Any,
    weight: Tensor,
    mode: str,
    padding: Sequence[int],
    stride: Any,
    dilation: Any,
    groups: int,
) -> Convolution:
    """The layer on ``x``; a zero padding in front of it becomes its own."""
    pad, lazy = expand_padding(_pair(padding) if len(padding) < 4 else padding), context.lazy(x)
    before = lazy.as_padding() if isinstance(lazy, View) else None
    if isinstance(lazy, View) and before is not None:
        value = lazy.x
        pad = Padding(*(a + b for a, b in zip(pad, before, strict=True)))
    else:
        value = context.value(x)
    if len(value.shape) != 4:
        raise Unsuitable("only 2-d windows")
    return Convolution(value, weight.numpy(), mode, _pair(stride), pad, _pair(dilation), groups)


@handles("adder2d.default")
def _adder(context: Lowering, node: fx.Node) -> Pending:
    x, weight, stride, padding, dilation, groups = _args(node)[:6]
    source = _convolution(context, x, _weight(context, weight), "max", padding, stride, dilation, groups)
    return Pending.of(source, shape_of(node))


@handles("conv2d.default", "conv2d.padding")
def _conv2d(context: Lowering, node: fx.Node) -> Pending:
    weight = _weight(context, _args(node)[1])
    stride, padding = argument(node, 3, "stride", 1), argument(node, 4, "padding", 0)
    dilation, groups = argument(node, 5, "dilation", 1), argument(node, 6, "groups", 1)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(_pair(dilation), weight.shape[2:], strict=True)]
        padding = [t // 2 for t in total] + [t - t // 2 for t in total]
    padding = [0, 0] if padding == "valid" else [padding] if isinstance(padding, int) else padding
    source = _convolution(context, _args(node)[0], weight, "conv", padding, stride, dilation, groups)
    return _biased(context, Pending.of(source, shape_of(node)), argument(node, 2, "bias"))


@handles("linear.default")
def _linear(context: Lowering, node: fx.Node) -> Pending:
    x = context.value(_args(node)[0])
    if len(x.shape) != 2:
        raise Unsuitable("linear on more than two dimensions")
    pending = Pending.of(linear_as_convolution(x, _weight(context, _args(node)[1]).numpy()), shape_of(node))
    return _biased(context, pending, argument(node, 2, "bias"))


def _biased(context: Lowering, pending: Pending, bias: Any) -> Pending:
    if bias is None:
        return pending
    return pending.scaled(np.ones(pending.shape[1]), _array(_weight(context, bias)))


@handles("_native_batch_norm_legit_no_training.default")
def _batch_norm(context: Lowering, node: fx.Node) -> tuple[Pending]:
    x, *parameters = _args(node)[:5]
    weight, bias, mean, variance = (None if p is None else _array(_weight(context, p)) for p in parameters)
    assert mean is not None and variance is not None
    scale = 1 / np.sqrt(variance + _args(node)[6])
    scale = scale if weight is None else scale * weight
    return (_opened(context, x).scaled(scale, (0 if bias is None else bias) - mean * scale),)


def _opened(context: Lowering, x: Any) -> Pending:
    """``x`` as something that scale, shift or a residual may join."""
    pending = context.pending(x)
    if pending.open:
        return pending
    value = context.value(x)
    return Pending.of(Combination(value), value.shape)


@handles("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "maximum.default", "minimum.default")
def _arithmetic(context: Lowering, node: fx.Node) -> Pending:
    """Two tensors, or a tensor and a constant (number or one per channel)."""
    name = str(node.target).split(".")[1]
    left, right = _args(node)[:2]
    if name in ("add", "sub") and node.kwargs.get("alpha", 1) != 1:
        raise Unsuitable("alpha")
    if name in ("add", "mul") and _channel_constant(context, left, node) is not None:
        left, right = right, left
    constant = _channel_constant(context, right, node)
    if constant is not None:
        return _with_constant(context, name, left, constant)
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        raise Unsuitable("a constant of this shape")
    if name == "add" and shape_of(left) == shape_of(right):
        return _sum(context, left, right)
    if name in ("add", "sub"):
        raise Unsuitable("broadcast addition")
    return _combined(context, name, left, right)


def _channel_constant(context: Lowering, operand: Any, node: fx.Node) -> np.ndarray | None:
    """``operand`` as one number per channel of the result, if it is that."""
    shape = shape_of(node)
    if len(shape) not in (2, 4):
        return None
    if isinstance(operand, int | float):
        return np.full(shape[1], float(operand))
    tensor = context.constant(operand)
    if tensor is None or not tensor.is_floating_point():
        return None
    full = (1,) * (len(shape) - tensor.dim()) + tuple(tensor.shape)
    if full[0] != 1 or any(size != 1 for size in full[2:]):
        return None
    return np.broadcast_to(_array(tensor).reshape(-1), shape[1]).copy()


def _with_constant(context: Lowering, name: str, x: Any, constant: np.ndarray) -> Pending:
    if name not in ("add", "sub", "mul", "div"):
        raise Unsuitable("maximum with a constant")
    opened, one, zero = _opened(context, x), np.ones(len(constant)), np.zeros(len(constant))
    if opened.shape[1] != len(constant):
        raise Unsuitable("a constant with more channels")
    if name in ("mul", "div"):
        return opened.scaled(constant if name == "mul" else 1 / constant, zero)
    return opened.scaled(one, constant if name == "add" else -constant)


def _sum(context: Lowering, left: fx.Node, right: fx.Node) -> Pending:
    """An addition of equal shapes joins the operand that is still open; the other one becomes its residual."""
    if left is right:
        return _opened(context, left).scaled(np.full(shape_of(left)[1], 2.0), np.zeros(shape_of(left)[1]))
    if not context.pending(right).open or isinstance(context.pending(right).source, Combination):
        left, right = right, left
    opened = _opened(context, right)
    return opened.added(context.blocked(left))


def _combined(context: Lowering, name: str, left: fx.Node, right: fx.Node) -> Pending:
    if name == "mul" and math.prod(shape_of(left)) < math.prod(shape_of(right)):
        left, right = right, left
    x, other = context.blocked(left), context.blocked(right)
    same = x.shape == other.shape
    gate = len(x.shape) == 4 and x.shape[:2] == other.shape[:2] and math.prod(other.shape[2:]) == 1
    if not (same or gate):
        raise Unsuitable("broadcast")
    return Pending.of(Combination(x, name, other), x.shape)


def _clamp(node: fx.Node) -> Activation:
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    return ("clamp", -math.inf if low is None else float(low), math.inf if high is None else float(high))


_ACTIVATIONS: dict[str, Callable[[fx.Node], Activation]] = {
    "relu.default": lambda node: ("relu",),
    "relu6.default": lambda node: ("clamp", 0.0, 6.0),
    "hardtanh.default": lambda node: (
        "clamp",
        float(argument(node, 1, "min_val", -1)),
        float(argument(node, 2, "max_val", 1)),
    ),
    "clamp.default": _clamp,
    "clamp_min.default": lambda node: ("clamp", float(_args(node)[1]), math.inf),
    "clamp_max.default": lambda node: ("clamp", -math.inf, float(_args(node)[1])),
    "hardsigmoid.default": lambda node: ("hardsigmoid",),
    "hardswish.default": lambda node: ("hardswish",),
    "sigmoid.default": lambda node: ("sigmoid",),
    "silu.default": lambda node: ("silu",),
    "tanh.default": lambda node: ("tanh",),
    "abs.default": lambda node: ("abs",),
    "leaky_relu.default": lambda node: ("leaky_relu", float(argument(node, 1, "negative_slope", 0.01))),
    "gelu.default": lambda node: ("gelu", str(argument(node, 1, "approximate", "none"))),
}


@handles(*_ACTIVATIONS)
def _activation(context: Lowering, node: fx.Node) -> Pending:
    pending = context.pending(_args(node)[0])
    if pending.activation:
        value = context.value(_args(node)[0])
        pending = Pending.of(Combination(value), value.shape)
    return pending.activated(_ACTIVATIONS[_overload(node)](node))


@handles("elu.default")
def _elu(context: Lowering, node: fx.Node) -> Pending:
    if argument(node, 2, "scale", 1) != 1 or argument(node, 3, "input_scale", 1) != 1:
        raise Unsuitable("selu")
    pending = context.pending(_args(node)[0])
    if pending.activation:
        value = context.value(_args(node)[0])
        pending = Pending.of(Combination(value), value.shape)
    return pending.activated(("elu", float(argument(node, 1, "alpha", 1))))


@handles("max_pool2d.default", "max_pool2d_with_indices.default", "avg_pool2d.default")
def _pool(context: Lowering, node: fx.Node) -> Any:
    x = context.blocked(_args(node)[0])
    maximum = _overload(node).startswith("max")
    result = node.meta["val"]
    with_indices = isinstance(result, tuple | list)
    shape = tuple(int(size) for size in (result[0] if with_indices else result).shape)
    kernel = _pair(_args(node)[1])
    stride = _pair(argument(node, 2, "stride") or kernel)
    padding = expand_padding(_pair(argument(node, 3, "padding", 0)))
    spec = Pool(
        "max" if maximum else "mean",
        x.shape[0],
        x.shape[1],
        _pair(x.shape[2:]),
        _pair(shape[2:]),
        kernel,
        stride,
        padding,
        _pair(argument(node, 4, "dilation", 1)) if maximum else (1, 1),
        True if maximum else argument(node, 5, "count_include_pad", True),
        0 if maximum else argument(node, 6, "divisor_override") or 0,
    )
    value = context.emitter.pool(spec, x, shape)
    return (value,) if with_indices else value


@handles("mean.dim", "_adaptive_avg_pool2d.default", "adaptive_avg_pool2d.default")
def _adaptive(context: Lowering, node: fx.Node) -> Value:
    """Means over windows that divide the image; the global mean is the case of one window."""
    before = shape_of(_args(node)[0])
    if len(before) != 4:
        raise Unsuitable("a mean over other than four dimensions")
    out = (1, 1)
    if _overload(node) == "mean.dim":
        if sorted(axis % 4 for axis in _args(node)[1]) != [2, 3]:
            raise Unsuitable("a mean over other dimensions")
    else:
        out = _pair(shape_of(node)[2:])
    x = context.blocked(_args(node)[0])
    return context.emitter.pool(Pool("mean", x.shape[0], x.shape[1], _pair(x.shape[2:]), out), x, shape_of(node))


@handles("slice.Tensor")
def _slice(context: Lowering, node: fx.Node) -> Any:
    axis, before = argument(node, 1, "dim", 0), shape_of(_args(node)[0])
    axis %= len(before)
    start, stop = argument(node, 2, "start") or 0, argument(node, 3, "end")
    step, size = argument(node, 4, "step", 1), before[axis]
    start, stop, step = slice(start, stop, step).indices(size)
    if (start, stop, step) == (0, size, 1):
        return context.lazy(_args(node)[0])
    view = context.view(_args(node)[0])
    if axis == 0:
        raise Unsuitable("a slice of the batch")
    return view.replaced(axis - 1, view.axes[axis - 1].slice(start, stop, step))


@handles("split_with_sizes.default", "split.Tensor", "chunk.default")
def _split(context: Lowering, node: fx.Node) -> tuple[View, ...]:
    if argument(node, 2, "dim", 0) != 1:
        raise Unsuitable("a split of other than channels")
    view, parts, start = View.of(context.blocked(_args(node)[0])), [], 0
    for part in node.meta["val"]:
        stop = start + int(part.shape[1])
        parts.append(view.replaced(0, view.axes[0].slice(start, stop, 1)))
        start = stop
    return tuple(parts)


@handles("constant_pad_nd.default", "pad.default")
def _pad(context: Lowering, node: fx.Node) -> View:
    sides = list(_args(node)[1])
    named = _overload(node) == "pad.default"
    fill = argument(node, 3 if named else 2, "value") or 0.0
    view = context.view(_args(node)[0])
    if (named and argument(node, 2, "mode", "constant") != "constant") or len(sides) > 6:
        raise Unsuitable("padding")
    if view.padded and view.fill != fill:
        view = View.of(context.blocked(_args(node)[0]))
    view = View(view.x, view.axes, float(fill))
    for i in range(len(sides) // 2):
        axis = 2 - i
        view = view.replaced(axis, view.axes[axis].pad(sides[2 * i], sides[2 * i + 1]))
    return view


@handles("cat.default")
def _cat(context: Lowering, node: fx.Node) -> Value:
    if len(shape_of(node)) not in (2, 4) or argument(node, 1, "dim", 0) not in (1, 1 - len(shape_of(node))):
        raise Unsuitable("concatenation of other than channels")
    return context.emitter.concatenate([context.blocked(part) for part in _args(node)[0]])


@handles("view.default", "reshape.default", "flatten.using_ints", "unsqueeze.default", "squeeze.dim", "squeeze.dims")
def _relabel(context: Lowering, node: fx.Node) -> Value:
    """``[N, C, 1, 1]`` and ``[N, C]`` are the same data in blocked layout."""
    x, shape = context.value(_args(node)[0]), shape_of(node)
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
    return context.lazy(_args(node)[0])


@handles("getitem")
def _getitem(context: Lowering, node: fx.Node) -> Any:
    parts = context.lazy(_args(node)[0])
    if not isinstance(parts, tuple) or _args(node)[1] >= len(parts):
        raise Unsuitable("an output that has no kernel")
    return parts[_args(node)[1]]


def _overload(node: fx.Node) -> str:
    return overload_name(node.target)


def overload_name(target: Any) -> str:
    """``"relu.default"`` for ``torch.ops.aten.relu.default``."""
    return "getitem" if target is operator.getitem else getattr(target, "__name__", str(target))
