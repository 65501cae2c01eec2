"""The meaning of the op, in float64: slow, obvious, and what every other implementation is compared with.

Source: AdderNet (arXiv 1912.13200), eq. 1 for the forward pass, eq. 5-8 for the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anncvt.runtime.geometry import expand_padding, output_size


def forward(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``y[n,o,p] = -sum_{c,k} |x[n,c,p*stride+k*dilation-padding] - w[o,c,k]|``; padded taps contribute ``-|0-w|``.

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[O, C/groups, kh, kw]``.
        stride, dilation: ``(h, w)``.
        padding: ``(h, w)`` or ``(top, left, bottom, right)``.
        groups: number of channel groups.

    Returns:
        ``[N, O, H', W']`` in float64.
    """
    x, weight = x.double(), weight.double()
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    y = x.new_zeros(x.shape[0], groups, weight.shape[0] // groups, *size)
    for window, tap, _ in _taps(x, weight, stride, padding, dilation, groups):
        y -= (window[:, :, None] - tap[None, :, :, :, None, None]).abs().sum(3)
    return y.flatten(1, 2)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    gradient: str,
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to ``x`` and ``weight`` in float64.

    ``"full"``: ``dw = sum g*(x-w)`` and ``dx = sum g*clip(w-x, -1, 1)`` (AdderNet eq. 5 and 7);
    ``"exact"``: the derivative of the op itself, ``dw = sum g*sign(x-w)``, ``dx = sum g*sign(w-x)``, sign(0) = 0.
    """
    grad, x, weight = grad.double(), x.double(), weight.double()
    pad = expand_padding(padding)
    g = grad.unflatten(1, (groups, weight.shape[0] // groups))[:, :, :, None]
    dw = torch.zeros_like(weight).unflatten(0, (groups, -1))
    padded = F.pad(x, (pad.left, pad.right, pad.top, pad.bottom))
    dx = torch.zeros_like(padded).unflatten(1, (groups, -1))
    for window, tap, (at, rows, columns) in _taps(x, weight, stride, padding, dilation, groups):
        difference = window[:, :, None] - tap[None, :, :, :, None, None]
        to_weight = difference if gradient == "full" else difference.sign()
        to_input = -difference.clamp(-1, 1) if gradient == "full" else -difference.sign()
        dw[:, :, :, at[0], at[1]] = (g * to_weight).sum((0, 4, 5))
        dx[:, :, :, rows, columns] += (g * to_input).sum(2)
    dx = dx.flatten(1, 2)[:, :, pad.top : pad.top + x.shape[2], pad.left : pad.left + x.shape[3]]
    return dx, dw.flatten(0, 1)


def _taps(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Iterator[tuple[Tensor, Tensor, tuple[tuple[int, int], slice, slice]]]:
    """For each kernel position: the input pixels it sees, its weights, and where those pixels lie."""
    pad = expand_padding(padding)
    height, width = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    padded = F.pad(x, (pad.left, pad.right, pad.top, pad.bottom)).unflatten(1, (groups, -1))
    taps = weight.unflatten(0, (groups, -1))
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            rows = slice(i * dilation[0], i * dilation[0] + (height - 1) * stride[0] + 1, stride[0])
            columns = slice(j * dilation[1], j * dilation[1] + (width - 1) * stride[1] + 1, stride[1])
            yield padded[:, :, :, rows, columns], taps[:, :, :, i, j], ((i, j), rows, columns)
