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
        if spec.depthwise:
            x = _pad_channels(x, 1, spec.groups * spec.lanes)
        packed = _pack_outputs(weight, spec)
        if spec.depthwise:
            _call(spec, nhwc(x), packed, 1.0, y)
        else:
            # The sum of the weights of each filter, in the order of the outputs.
            _call(spec, nhwc(x), packed, packed.sum((2, 3, 4, 5)).view(-1), 2.0, y)
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
        packed = _pack_inputs(weight, spec)
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
    packed = _pack_outputs(weight, spec)
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


def _pack_outputs(weight: Tensor, spec: Spec) -> Tensor:
    """``[G, O/L, C/cb, kh, kw, cb, L]``: vectors over output channels."""
    if spec.depthwise:
        return _pack_depthwise(weight, spec)
    w = weight.detach().reshape(spec.groups, -1, *weight.shape[1:])
    if w.shape[1] != spec.outputs:
        w = F.pad(w, (0, 0, 0, 0, 0, 0, 0, spec.outputs - w.shape[1]))
    block = divisor(spec.channels, 16)
    w = w.reshape(spec.groups, -1, spec.lanes, spec.channels // block, block, *spec.kernel)
    return w.permute(0, 1, 3, 5, 6, 4, 2).contiguous()


def _unpack_outputs(packed: Tensor, weight: Tensor, spec: Spec) -> Tensor:
    if spec.depthwise:
        return packed.permute(0, 6, 1, 2, 5, 3, 4).reshape(-1, 1, *spec.kernel)[: weight.shape[0]]
    w = packed.permute(0, 1, 6, 2, 5, 3, 4).flatten(3, 4).flatten(1, 2)
    return w[:, : weight.shape[0] // spec.groups].reshape(weight.shape)


def _pack_inputs(weight: Tensor, spec: Spec) -> Tensor:
    """``[G, C/L, O/ob, kh, kw, ob, L]``: vectors over input channels."""
    if spec.depthwise:
        return _pack_depthwise(weight, spec)
    w = weight.detach().reshape(spec.groups, -1, *weight.shape[1:])
    if w.shape[2] != spec.channels:
        w = F.pad(w, (0, 0, 0, 0, 0, spec.channels - w.shape[2]))
    block = divisor(spec.outputs, 16)
    w = w.reshape(spec.groups, -1, block, spec.channels // spec.lanes, spec.lanes, *spec.kernel)
    return w.permute(0, 3, 1, 5, 6, 2, 4).contiguous()


def _pack_depthwise(weight: Tensor, spec: Spec) -> Tensor:
    """``[G, kh, kw, L]``: vectors over channels."""
    w, missing = weight.detach(), spec.groups * spec.lanes - weight.shape[0]
    if missing:
        w = F.pad(w, (0, 0, 0, 0, 0, 0, 0, missing))
    return w.view(spec.groups, spec.lanes, *spec.kernel).permute(0, 2, 3, 1).contiguous()
