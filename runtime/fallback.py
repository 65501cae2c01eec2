"""The op in plain torch, for devices and machines without compiled kernels.

Works one tap and one channel of each group at a time, so the extra memory is two tensors of the output's (or input's)
size: it never builds the ``N x O x K x L`` tensor of differences that makes other implementations run out of memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anncvt.runtime.epilogue import stepwise
from anncvt.runtime.geometry import Padding, expand_padding, output_size


def forward(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """See :func:`anncvt.runtime.reference.forward`; same shapes, the dtype of ``x``."""
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    padded = _pad(x, expand_padding(padding)).unflatten(1, (groups, weight.shape[1]))
    taps = weight.unflatten(0, (groups, weight.shape[0] // groups))
    y = x.new_zeros(x.shape[0], *taps.shape[:2], *size)
    for channel in range(weight.shape[1]):
        for i in range(weight.shape[2]):
            for j in range(weight.shape[3]):
                window = _window(padded[:, :, channel], i, j, stride, dilation, size)
                y -= (window[:, :, None] - taps[:, :, channel, i, j, None, None]).abs_()
    return y.flatten(1, 2)


fused_forward = stepwise(forward)


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
    """Gradient with respect to ``x``; see :func:`anncvt.runtime.reference.backward`."""
    size = (grad.shape[2], grad.shape[3])
    pad = expand_padding(padding)
    padded = _pad(x, pad)
    result = torch.zeros_like(padded)
    per_group, depth = weight.shape[0] // groups, weight.shape[1]
    for o in range(weight.shape[0]):
        channels = slice(o // per_group * depth, (o // per_group + 1) * depth)
        for i in range(weight.shape[2]):
            for j in range(weight.shape[3]):
                window = _window(padded[:, channels], i, j, stride, dilation, size)
                difference = weight[o, :, i, j].view(1, -1, 1, 1) - window
                slope = difference.clamp_(-1, 1) if gradient == "full" else difference.sign_()
                _window(result[:, channels], i, j, stride, dilation, size).addcmul_(grad[:, o : o + 1], slope)
    return result[:, :, pad.top : pad.top + x.shape[2], pad.left : pad.left + x.shape[3]]


def exact_weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``dw = sum g * sign(x - w)``: the derivative of the op itself."""
    size = (grad.shape[2], grad.shape[3])
    padded = _pad(x, expand_padding(padding))
    result = torch.zeros_like(weight)
    per_group, depth = weight.shape[0] // groups, weight.shape[1]
    for o in range(weight.shape[0]):
        channels = slice(o // per_group * depth, (o // per_group + 1) * depth)
        for i in range(weight.shape[2]):
            for j in range(weight.shape[3]):
                window = _window(padded[:, channels], i, j, stride, dilation, size)
                slope = (window - weight[o, :, i, j].view(1, -1, 1, 1)).sign_()
                result[o, :, i, j] = slope.mul_(grad[:, o : o + 1]).sum((0, 2, 3))
    return result


def full_weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``dw = sum g*(x - w)``: linear in x, hence the convolution's own weight gradient minus ``w * sum g``."""
    pad = expand_padding(padding)
    symmetric = pad.top == pad.bottom and pad.left == pad.right
    source, amount = (x, [pad.top, pad.left]) if symmetric else (_pad(x, pad), [0, 0])
    if tuple(weight.shape[2:]) == (1, 1) and max(stride) > 1:
        # Only the pixels that are met: for strided 1x1 windows of few channels oneDNN 3.12 writes beyond its workspace.
        source, amount = _window(_pad(x, pad), 0, 0, stride, dilation, (grad.shape[2], grad.shape[3])), [0, 0]
        stride = (1, 1)
    of_convolution = torch.ops.aten.convolution_backward(
        grad, source, weight, None, list(stride), amount, list(dilation), False, [0, 0], groups, [False, True, False]
    )[1]
    return of_convolution.addcmul_(weight, grad.sum((0, 2, 3)).view(-1, 1, 1, 1), value=-1)


def _pad(x: Tensor, pad: Padding) -> Tensor:
    return F.pad(x, (pad.left, pad.right, pad.top, pad.bottom)) if any(pad) else x


def _window(x: Tensor, i: int, j: int, stride: Sequence[int], dilation: Sequence[int], size: tuple[int, int]) -> Tensor:
    """The (strided) pixels of padded ``x[..., H, W]`` that kernel position ``(i, j)`` meets, ``[..., H', W']``."""
    top, left = i * dilation[0], j * dilation[1]
    return x[
        ...,
        top : top + (size[0] - 1) * stride[0] + 1 : stride[0],
        left : left + (size[1] - 1) * stride[1] + 1 : stride[1],
    ]
