"""THE op: ``anncvt::adder2d``, its backward and its form for inference, registered with torch (schema, fake, autograd,
dispatch).

A ``torch.library`` op and not a plain ``autograd.Function``: the latter is inlined by ``torch.fx`` and
``torch.export``, which loses both the node and the adder gradients. And not its ``custom_op``, whose wrappers around
each call take as long as a small layer: a kernel that has just moved megabytes leaves Python none of the caches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from anncvt.runtime import fallback, kernels
from anncvt.runtime.epilogue import Epilogue
from anncvt.runtime.geometry import output_size

GRADIENTS = ("full", "exact")

_library = torch.library.Library("anncvt", "DEF")


def _define(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make an op of ``function``, for every device, by its name and annotations."""
    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=())
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, "CompositeExplicitAutograd")
    return function


@_define
def adder2d(
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    gradient: str = "full",
) -> Tensor:
    """``y[n,o,p] = -sum_{c,k} |x[n,c,p*stride+k*dilation-padding] - w[o,c,k]|`` (AdderNet, arXiv 1912.13200, eq. 1).

    Zero padding is part of the sum: a padded tap contributes ``-|0-w|``.

    Args:
        x: ``[N, C, H, W]``, floating point. ``channels_last`` is the fast layout and is kept.
        weight: ``[O, C/groups, kh, kw]``.
        stride, dilation: ``(h, w)``.
        padding: ``(h, w)`` or ``(top, left, bottom, right)``.
        groups: number of channel groups.
        gradient: what backward computes: ``"full"`` (AdderNet eq. 5-8, for training) or ``"exact"`` (the true
            subgradient, for calibration).

    Returns:
        ``[N, O, H', W']`` in the dtype of ``x`` (``weight`` may keep its float32); half types accumulate in float32.
        Under autocast float32.

    Raises:
        ValueError: shapes, devices, groups or ``gradient`` do not fit.
    """
    _check(x, weight, groups, gradient)
    implementation, a = _implementation(x)
    return _like(implementation.forward(a, weight.to(_compute_dtype(x)), stride, padding, dilation, groups), x)


@torch.library.register_fake("anncvt::adder2d")
def _(x, weight, stride, padding, dilation, groups, gradient="full"):
    _check(x, weight, groups, gradient)
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return torch.empty((x.shape[0], weight.shape[0], *size), dtype=x.dtype, device=x.device, memory_format=_layout(x))


@_define
def adder2d_fused(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    """``clip(scale[o] * adder2d(x, weight)[n,o,p] + shift[o] + residual[n,o,p], low, high)``, for inference.

    One kernel on GPUs. It has no gradient.

    Args:
        x, weight, stride, padding, dilation, groups: see :func:`adder2d`.
        scale, shift: ``[O]``, floating point.
        residual: ``[N, O, H', W']``, what is added.
        low, high: the limits; None: there is none.

    Returns:
        ``[N, O, H', W']`` in the dtype of ``x``, under autocast float32; half types are computed with in float32.

    Raises:
        ValueError: shapes, devices or groups do not fit.
    """
    _check_fused(x, weight, scale, shift, residual, stride, padding, dilation, groups)
    implementation, a = _implementation(x)
    compute, infinity = _compute_dtype(x), float("inf")
    epilogue = Epilogue(scale, shift, residual, -infinity if low is None else low, infinity if high is None else high)
    y = implementation.fused_forward(a, weight.to(compute), stride, padding, dilation, groups, epilogue)
    return _like(y, x)


@torch.library.register_fake("anncvt::adder2d_fused")
def _(x, weight, scale, shift, residual, stride, padding, dilation, groups, low=None, high=None):
    size = _check_fused(x, weight, scale, shift, residual, stride, padding, dilation, groups)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=_layout(x))


# A sum of hundreds of distances is far from zero and differs little between pixels: rounded to half precision, what
# BatchNorm needs of it would be gone. So autocast hands the op float32 and takes float32 from it.
for _name, _device in itertools.product(("adder2d", "adder2d_fused"), ("cpu", "cuda")):
    torch.library.register_autocast(f"anncvt::{_name}", _device, torch.float32)


@_define
def adder2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    gradient: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`adder2d` for ``x`` and ``weight``; one that is not needed comes back empty."""
    implementation, a = _implementation(x)
    g, w = grad.to(a.dtype), weight.to(_compute_dtype(x))
    config = (stride, padding, dilation, groups)
    dx, dw = x.new_empty(0), weight.new_empty(0)
    if need_x:
        dx = _like(implementation.input_gradient(g, a, w, *config, gradient), x)
    if need_weight and gradient == "full":
        # In full precision whatever the kernels take: it is a difference of large sums.
        dw = fallback.full_weight_gradient(grad.to(w.dtype), x.to(w.dtype), w, *config).to(weight.dtype).contiguous()
    elif need_weight:
        dw = implementation.exact_weight_gradient(g, a, w, *config).to(weight.dtype).contiguous()
    return dx, dw


@torch.library.register_fake("anncvt::adder2d_backward")
def _(grad, x, weight, stride, padding, dilation, groups, gradient, need_x, need_weight):
    dx = torch.empty_like(x, memory_format=_layout(x)) if need_x else x.new_empty(0)
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else weight.new_empty(0)
    return dx, dw


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *ctx.config = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_weight = ctx.needs_input_grad[:2]
    dx, dw = torch.ops.anncvt.adder2d_backward(grad, *ctx.saved_tensors, *ctx.config, need_x, need_weight)
    return dx if need_x else None, dw if need_weight else None, None, None, None, None, None


def _no_gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise RuntimeError("anncvt::adder2d_fused and anncvt::adder2d_backward have no gradient; use anncvt::adder2d")


torch.library.register_autograd("anncvt::adder2d", _backward, setup_context=_setup)
for _name in ("adder2d_fused", "adder2d_backward"):
    torch.library.register_autograd(f"anncvt::{_name}", _no_gradient)


@torch.library.register_vmap("anncvt::adder2d")
def _(info, in_dims, x, weight, stride, padding, dilation, groups, gradient="full"):
    if in_dims[1] is not None:
        raise NotImplementedError("anncvt::adder2d: vmap over the weights is not supported, only over x")
    merged = x.movedim(in_dims[0], 0)
    y = torch.ops.anncvt.adder2d(merged.flatten(0, 1), weight, stride, padding, dilation, groups, gradient)
    return y.unflatten(0, merged.shape[:2]), 0


def _check(x: Tensor, weight: Tensor, groups: int, gradient: str) -> None:
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            f"adder2d expects x[N,C,H,W] and weight[O,C/groups,kh,kw], got {x.dim()}-d and {weight.dim()}-d"
        )
    if not (x.dtype.is_floating_point and weight.dtype.is_floating_point):
        raise ValueError(f"adder2d expects floating point tensors, got {x.dtype} and {weight.dtype}")
    if weight.shape[0] % groups or x.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"adder2d: {x.shape[1]} input channels and weight {list(weight.shape)} do not fit groups={groups}"
        )
    if gradient not in GRADIENTS:
        raise ValueError(f"adder2d: gradient must be one of {GRADIENTS}, got {gradient!r}")
    _check_devices("adder2d", x, weight=weight)


def _check_devices(name: str, x: Tensor, **others: Tensor | None) -> None:
    """A kernel would follow a pointer into the memory of another device, which ends the process's use of the GPU."""
    for argument, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: x is on {x.device}, {argument} on {tensor.device}; move both to one device")


def _check_fused(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[int, ...]:
    """The output's shape."""
    _check(x, weight, groups, "full")
    outputs = weight.shape[0]
    size = (x.shape[0], outputs, *output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation))
    for name, line in (("scale", scale), ("shift", shift)):
        if line.shape != (outputs,):
            raise ValueError(f"adder2d_fused: {name} must be [{outputs}], got {list(line.shape)}")
    if residual is not None and residual.shape != size:
        raise ValueError(f"adder2d_fused: the residual must be {list(size)}, got {list(residual.shape)}")
    _check_devices("adder2d_fused", x, scale=scale, shift=shift, residual=residual)
    return size


def _implementation(x: Tensor) -> tuple[ModuleType, Tensor]:
    """Compiled kernels where they take ``x``, plain torch elsewhere; both have the same functions. And ``x`` as these
    take it: GPU kernels read half types as they are.
    """
    if kernels.usable(x):
        return kernels.compiled(x), x
    wide = x.to(_compute_dtype(x))
    return (kernels.compiled(wide) if kernels.usable(wide) else fallback), wide


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _layout(x: Tensor) -> torch.memory_format:
    """channels_last in, channels_last out; where both readings fit (one channel, one pixel), NCHW."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _like(y: Tensor, x: Tensor) -> Tensor:
    return y.to(dtype=x.dtype).contiguous(memory_format=_layout(x))
