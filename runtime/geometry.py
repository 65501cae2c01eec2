"""Sizes of a sliding window: one place that knows how padding, stride and dilation turn into output sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Padding(NamedTuple):
    """Zero padding in pixels."""

    top: int
    left: int
    bottom: int
    right: int


NO_PADDING = Padding(0, 0, 0, 0)


def expand_padding(padding: Sequence[int]) -> Padding:
    """``(h, w)`` pads both sides alike; ``(top, left, bottom, right)`` is the order of ONNX ``pads``."""
    if len(padding) == 2:
        return Padding(padding[0], padding[1], padding[0], padding[1])
    if len(padding) == 4:
        return Padding(*padding)
    raise ValueError(f"padding must have 2 (h, w) or 4 (top, left, bottom, right) entries, got {list(padding)}")


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Output height and width of a 2-d window over an input of ``size`` (height, width)."""
    pad = expand_padding(padding)
    height = (size[0] + pad.top + pad.bottom - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    width = (size[1] + pad.left + pad.right - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    return height, width
