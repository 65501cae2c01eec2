"""Elementwise functions a kernel can apply to the value it has in a register, before it is stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx

from anncvt.runtime.kernels.layer import Activation


def _f32(value: float) -> Any:
    return tirx.const(value, "float32")


def _clamp(x: Any, low: float = -math.inf, high: float = math.inf) -> Any:
    x = x if low == -math.inf else tirx.max(x, _f32(low))
    return x if high == math.inf else tirx.min(x, _f32(high))


def _hard_sigmoid(x: Any) -> Any:
    return _clamp(x * _f32(1 / 6) + _f32(0.5), 0.0, 1.0)


def _sigmoid(x: Any) -> Any:
    return _f32(1) / (_f32(1) + tirx.exp(_f32(0) - x))


def _gelu(x: Any, approximate: str = "none") -> Any:
    if approximate == "tanh":
        inner = _f32(math.sqrt(2 / math.pi)) * (x + _f32(0.044715) * x * x * x)
        return _f32(0.5) * x * (_f32(1) + tirx.tanh(inner))
    return _f32(0.5) * x * (_f32(1) + tirx.erf(x * _f32(math.sqrt(0.5))))


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "relu": lambda x: tirx.max(x, _f32(0)),
    "clamp": _clamp,
    "leaky_relu": lambda x, slope=0.01: tirx.max(x, _f32(0)) + _f32(slope) * tirx.min(x, _f32(0)),
    "elu": lambda x, alpha=1.0: tirx.max(x, _f32(0)) + _f32(alpha) * (tirx.exp(tirx.min(x, _f32(0))) - _f32(1)),
    "hardsigmoid": _hard_sigmoid,
    "hardswish": lambda x: x * _hard_sigmoid(x),
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "tanh": tirx.tanh,
    "gelu": _gelu,
    "abs": tirx.abs,
}

#: Those that map 0 to something else: lanes beyond the last channel must be cleared after them.
_MOVE_ZERO = {"sigmoid", "hardsigmoid"}


def apply(activation: Activation, value: Any) -> Any:
    """The expression ``activation(value)``."""
    if not activation:
        return value
    name, *parameters = activation
    return _FUNCTIONS[name](value, *parameters)


def keeps_zero(activation: Activation) -> bool:
    """Whether ``activation(0) == 0``."""
    if activation and activation[0] == "clamp":
        low, high = (*activation[1:], math.inf)[:2]
        return low <= 0 <= high
    return not activation or activation[0] not in _MOVE_ZERO
