"""From torch tensors to kernel calls: layouts, packed weights, channel padding, and which kernel to take."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anncvt.runtime.epilogue import stepwise
from anncvt.runtime.geometry import expand_padding
from anncvt.runtime.kernels import cache
from anncvt.runtime.kernels.spec import SHARPNESS, Spec, as_pair, divisor, lanes_for
from anncvt.runtime.kernels.target import Cpu, host
from anncvt.runtime.kernels.tensors import (
    multiplied_forward,
    multiplied_input_gradient,
    multiplied_weight_gradient,
    nhwc,
)

_ALIGNMENT = 64


@multiplied_forward
def forward(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """See :func:`anncvt.runtime.fallback.forward`."""
    spec = _spec("forward", x, weight, stride, padding, dilation, groups)
    y = x.new_empty(x.shape[0], *spec.output, spec.groups * spec.outputs)
    if y.numel():
        filled = _filled(weight, spec)
        packed = _packed(filled, spec, over="outputs")
        if spec.depthwise:
            _call(spec, nhwc(_pad_channels(x, 1, spec.groups * spec.lanes)), packed, 1.0, y)
        else:
            _call(spec, nhwc(x), packed, filled.sum((1, 2, 3)), 2.0, y)
    return _unpad(y, weight.shape[0], 1 if spec.depthwise else groups)


fused_forward = stepwise(forward)


@multiplied_input_gradient
def input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    gradient: str,
) -> Tensor:
    """See :func:`anncvt.runtime.fallback.input_gradient`."""
    spec = _spec(f"dx_{gradient}", x, weight, stride, padding, dilation, groups)
    y = x.new_empty(x.shape[0], x.shape[2], x.shape[3], spec.groups * spec.channels)
    depthwise = spec.depthwise
    if y.numel():
        padded = _pad_channels(x, 1 if depthwise else groups, spec.groups * spec.channels)
        if depthwise:
            grad = _pad_channels(grad, 1, spec.groups * spec.channels)
        packed = _packed(_filled(weight, spec), spec, over="inputs")
        if gradient == "exact":
            packed = packed * SHARPNESS  # not in place: packed may be the weight itself
        _call(spec, nhwc(padded), nhwc(grad), packed, 1.0, y)
    return _unpad(y, x.shape[1], 1 if depthwise else groups)


@multiplied_weight_gradient
def exact_weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """See :func:`anncvt.runtime.fallback.exact_weight_gradient`."""
    if not (x.numel() and grad.numel()):
        return torch.zeros_like(weight)
    spec = _spec("dw_exact", x, weight, stride, padding, dilation, groups)
    packed = _packed(_filled(weight, spec), spec, over="outputs")
    if spec.depthwise:
        packed = packed[:, None, None, :, :, None]
    parts = packed.new_zeros(min(torch.get_num_threads(), x.shape[0] * spec.output[0]), *packed.shape)
    grad = _pad_channels(grad, 1 if spec.depthwise else groups, spec.groups * spec.outputs)
    if spec.depthwise:
        x = _pad_channels(x, 1, spec.groups * spec.lanes)
    _call(spec, nhwc(x), nhwc(grad), packed * SHARPNESS, 1.0, parts)
    return _unpack_outputs(parts.sum(0), weight, spec)


def _spec(
    kind: str,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Spec:
    shape = (x.shape[2], x.shape[3], *weight.shape)
    return _spec_of(kind, host(), shape, tuple(stride), tuple(padding), tuple(dilation), groups)


@functools.lru_cache(maxsize=4096)
def _spec_of(
    kind: str,
    cpu: Cpu,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Spec:
    """``shape``: height and width of the input, then the weight's shape."""
    height, width, filters, channels, *kernel = shape
    outputs = filters // groups
    depthwise = groups > 1 and channels == outputs == 1
    if depthwise:
        lanes = lanes_for(groups, cpu.lanes)
        channels = outputs = lanes
        groups = -(-groups // lanes)
    elif kind.startswith("dx"):
        lanes = lanes_for(channels, cpu.lanes)
        channels = -(-channels // lanes) * lanes
    else:
        lanes = lanes_for(outputs, cpu.lanes)
        outputs = -(-outputs // lanes) * lanes
    return Spec(
        kind,
        height,
        width,
        channels,
        outputs,
        groups,
        as_pair(kernel),
        as_pair(stride),
        expand_padding(padding),
        as_pair(dilation),
        lanes,
        depthwise,
    )


def _call(spec: Spec, *arguments: Tensor | float) -> None:
    cache.use_threads(torch.get_num_threads())
    cache.kernel(spec)(*[a.clone() if isinstance(a, Tensor) and a.data_ptr() % _ALIGNMENT else a for a in arguments])


def _pad_channels(x: Tensor, groups: int, channels: int) -> Tensor:
    """``[N, C, H, W]`` with zero channels appended to each group, ``channels`` in all."""
    if x.shape[1] == channels:
        return x
    missing = (channels - x.shape[1]) // groups
    return F.pad(x.unflatten(1, (groups, -1)), (0, 0, 0, 0, 0, missing)).flatten(1, 2)


def _unpad(y: Tensor, channels: int, groups: int) -> Tensor:
    """NHWC kernel output to ``[N, C, H, W]`` without the channels added for the vectors."""
    if y.shape[3] != channels:
        y = y.unflatten(3, (groups, -1))[..., : channels // groups].flatten(3)
    return y.permute(0, 3, 1, 2)


def _filled(weight: Tensor, spec: Spec) -> Tensor:
    """``[G*O, C, kh, kw]`` with the zero filters and channels that the kernel adds to each group."""
    w = weight.detach()
    groups, outputs, channels = spec.groups, spec.outputs, spec.channels
    if spec.depthwise:
        groups, outputs, channels = 1, spec.groups * spec.lanes, 1
    missing = (channels - w.shape[1], outputs - w.shape[0] // groups)
    if not any(missing):
        return w
    return F.pad(w.unflatten(0, (groups, -1)), (0, 0, 0, 0, 0, missing[0], 0, missing[1])).flatten(0, 1)


def _packed(w: Tensor, spec: Spec, *, over: str) -> Tensor:
    """Weights as a kernel reads them, by one change of strides and one copy.

    Where a kernel has just moved megabytes, each call of torch takes as long as packing the weights of a small layer.

    Args:
        w: :func:`_filled`.
        spec: the kernel.
        over: "outputs" or "inputs", the channels that are side by side in vectors.

    Returns:
        ``[G, O/L, C/cb, kh, kw, cb, L]`` over outputs, ``[G, C/L, O/ob, kh, kw, ob, L]`` over inputs;
        ``[G, kh, kw, L]`` of a depthwise layer.
    """
    (outer, inner, row, column), lanes = w.stride(), spec.lanes
    if spec.depthwise:
        return w.as_strided((spec.groups, *spec.kernel, lanes), (lanes * outer, row, column, outer)).contiguous()
    vector, scalar = (spec.outputs, outer), (spec.channels, inner)
    if over == "inputs":
        vector, scalar = scalar, vector
    (wide, along), (deep, across) = vector, scalar
    block = divisor(deep, 16)
    size = (spec.groups, wide // lanes, deep // block, *spec.kernel, block, lanes)
    return w.as_strided(
        size, (spec.outputs * outer, lanes * along, block * across, row, column, across, along)
    ).contiguous()


def _unpack_outputs(packed: Tensor, weight: Tensor, spec: Spec) -> Tensor:
    if spec.depthwise:
        return packed.permute(0, 6, 1, 2, 5, 3, 4).reshape(-1, 1, *spec.kernel)[: weight.shape[0]]
    w = packed.permute(0, 1, 6, 2, 5, 3, 4).flatten(3, 4).flatten(1, 2)
    return w[:, : weight.shape[0] // spec.groups].reshape(weight.shape)
