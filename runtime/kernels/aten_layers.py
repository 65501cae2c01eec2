"""ATen operators that become layers or join one: adder, convolution, linear, batch norm, arithmetic, activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, fx

from anncvt.runtime.geometry import Padding, expand_padding
from anncvt.runtime.kernels.aten import (
    Lowering,
    Unsuitable,
    argument,
    arguments,
    array,
    handles,
    overload_of,
    pair,
    shape_of,
)
from anncvt.runtime.kernels.emitter import linear_as_convolution
from anncvt.runtime.kernels.fusion import Combination, Convolution, Pending, View
from anncvt.runtime.kernels.layer import Activation


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
    pad, lazy = expand_padding(pair(padding) if len(padding) < 4 else padding), context.lazy(x)
    before = lazy.as_padding() if isinstance(lazy, View) else None
    if isinstance(lazy, View) and before is not None:
        value = lazy.x
        pad = Padding(*(a + b for a, b in zip(pad, before, strict=True)))
    else:
        value = context.value(x)
    if len(value.shape) != 4:
        raise Unsuitable("only 2-d windows")
    return Convolution(value, weight.numpy(), mode, pair(stride), pad, pair(dilation), groups)


@handles("adder2d.default")
def _adder(context: Lowering, node: fx.Node) -> Pending:
    x, weight, stride, padding, dilation, groups = arguments(node)[:6]
    source = _convolution(context, x, _weight(context, weight), "max", padding, stride, dilation, groups)
    return Pending.of(source, shape_of(node))


@handles("conv2d.default", "conv2d.padding")
def _conv2d(context: Lowering, node: fx.Node) -> Pending:
    weight = _weight(context, arguments(node)[1])
    stride, padding = argument(node, 3, "stride", 1), argument(node, 4, "padding", 0)
    dilation, groups = argument(node, 5, "dilation", 1), argument(node, 6, "groups", 1)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(pair(dilation), weight.shape[2:], strict=True)]
        padding = [t // 2 for t in total] + [t - t // 2 for t in total]
    padding = [0, 0] if padding == "valid" else [padding] if isinstance(padding, int) else padding
    source = _convolution(context, arguments(node)[0], weight, "conv", padding, stride, dilation, groups)
    return _biased(context, Pending.of(source, shape_of(node)), argument(node, 2, "bias"))


@handles("linear.default")
def _linear(context: Lowering, node: fx.Node) -> Pending:
    x = context.value(arguments(node)[0])
    if len(x.shape) != 2:
        raise Unsuitable("linear on more than two dimensions")
    pending = Pending.of(linear_as_convolution(x, _weight(context, arguments(node)[1]).numpy()), shape_of(node))
    return _biased(context, pending, argument(node, 2, "bias"))


def _biased(context: Lowering, pending: Pending, bias: Any) -> Pending:
    if bias is None:
        return pending
    return pending.scaled(np.ones(pending.shape[1]), array(_weight(context, bias)))


@handles("_native_batch_norm_legit_no_training.default")
def _batch_norm(context: Lowering, node: fx.Node) -> tuple[Pending]:
    x, *parameters = arguments(node)[:5]
    weight, bias, mean, variance = (None if p is None else array(_weight(context, p)) for p in parameters)
    assert mean is not None and variance is not None
    scale = 1 / np.sqrt(variance + arguments(node)[6])
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
    left, right = arguments(node)[:2]
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
    return np.broadcast_to(array(tensor).reshape(-1), shape[1]).copy()


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
    "clamp_min.default": lambda node: ("clamp", float(arguments(node)[1]), math.inf),
    "clamp_max.default": lambda node: ("clamp", -math.inf, float(arguments(node)[1])),
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
    pending = context.pending(arguments(node)[0])
    if pending.activation:
        value = context.value(arguments(node)[0])
        pending = Pending.of(Combination(value), value.shape)
    return pending.activated(_ACTIVATIONS[overload_of(node)](node))


@handles("elu.default")
def _elu(context: Lowering, node: fx.Node) -> Pending:
    if argument(node, 2, "scale", 1) != 1 or argument(node, 3, "input_scale", 1) != 1:
        raise Unsuitable("selu")
    pending = context.pending(arguments(node)[0])
    if pending.activation:
        value = context.value(arguments(node)[0])
        pending = Pending.of(Combination(value), value.shape)
    return pending.activated(("elu", float(argument(node, 1, "alpha", 1))))
