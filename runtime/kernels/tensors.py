"""What the launchers for CPUs and for GPUs do with tensors alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor


def nhwc(x: Tensor) -> Tensor:
    """``[N, C, H, W]`` as contiguous ``[N, H, W, C]``, without a history."""
    return x.detach().permute(0, 2, 3, 1).contiguous()


_Function = TypeVar("_Function", bound=Callable[..., Tensor])


def multiplied_forward(forward: _Function) -> _Function:
    """A ``forward`` that has depthwise layers of several outputs per channel: with their channels repeated.

    Its arguments are ``x, weight, stride, padding, dilation, groups``, and what is no matter of channels.
    """

    @functools.wraps(forward)
    def wrapped(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        geometry, more = rest[:4], rest[4:]
        return forward(*_repeated(x, weight, *geometry), *more)

    return cast(_Function, wrapped)


def multiplied_weight_gradient(weight_gradient: _Function) -> _Function:
    """See :func:`multiplied_forward`."""

    @functools.wraps(weight_gradient)
    def wrapped(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        return weight_gradient(grad, *_repeated(x, weight, *rest))

    return cast(_Function, wrapped)


def multiplied_input_gradient(input_gradient: _Function) -> _Function:
    """See :func:`multiplied_forward`; a channel's gradient is the sum of those of its copies."""

    @functools.wraps(input_gradient)
    def wrapped(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        *geometry, gradient = rest
        result = input_gradient(grad, *_repeated(x, weight, *geometry), gradient)
        return result if result.shape == x.shape else result.unflatten(1, (x.shape[1], -1)).sum(2)

    return cast(_Function, wrapped)


def _repeated(x: Tensor, weight: Tensor, *geometry: Any) -> tuple[Any, ...]:
    *sizes, groups = geometry
    repeat = weight.shape[0] // groups if groups > 1 and weight.shape[1] == 1 else 1
    return (x, weight, *geometry) if repeat == 1 else (x.repeat_interleave(repeat, 1), weight, *sizes, groups * repeat)
