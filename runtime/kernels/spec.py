"""What one compiled kernel computes: every size but the batch's, and the blocking derived from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anncvt.runtime.geometry import Padding, output_size

SHARPNESS = 2.0**80
"""``clip(SHARPNESS*w - SHARPNESS*x, -1, 1)`` is ``sign(w - x)``: scaling by a power of two is exact and float32 values
between 1e-17 and 1e14 differ by more than its inverse or not at all."""


@dataclass(frozen=True)
class Spec:
    """One kernel. Channel counts are per group; the vectorised one is a multiple of ``lanes``.

    A depthwise kernel has ``groups`` blocks of ``lanes`` channels: channels are the lanes and meet only themselves.
    """

    kind: str
    height: int
    width: int
    channels: int
    outputs: int
    groups: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: Padding
    dilation: tuple[int, int]
    lanes: int
    depthwise: bool = False

    @property
    def output(self) -> tuple[int, int]:
        """Output height and width."""
        return output_size((self.height, self.width), self.kernel, self.stride, self.padding, self.dilation)


@dataclass(frozen=True)
class Axis:
    """How the input gradient runs along one spatial axis without meeting the zeros of a strided gradient.

    Input positions are split by their remainder r modulo the stride. Position ``stride*a + r`` meets kernel positions
    ``first[r] + t*step``, ``t < count[r]``, at output positions ``a + offset[r] - t*back``.
    """

    stride: int
    step: int
    back: int
    first: tuple[int, ...]
    count: tuple[int, ...]
    offset: tuple[int, ...]
    blocks: int
    """Values of ``a``."""
    low: int
    """The smallest output position met, for a = 0 (never above 0)."""
    high: int
    """The largest ``offset``."""

    @classmethod
    def of(cls, size: int, kernel: int, stride: int, before: int, dilation: int) -> Axis:
        """For an input of ``size`` pixels with ``before`` pixels of padding in front."""
        step = next(s for s in range(1, stride + 1) if s * dilation % stride == 0)
        first, count, offset = [], [], []
        for r in range(stride):
            k0 = next((k for k in range(min(step, kernel)) if (r + before - k * dilation) % stride == 0), None)
            first.append(0 if k0 is None else k0)
            count.append(0 if k0 is None else len(range(k0, kernel, step)))
            offset.append(0 if k0 is None else (r + before - k0 * dilation) // stride)
        back = step * dilation // stride
        low = min(o - max(c - 1, 0) * back for o, c in zip(offset, count, strict=True))
        return cls(
            stride,
            step,
            back,
            tuple(first),
            tuple(count),
            tuple(offset),
            -(-size // stride),
            min(low, 0),
            max(offset),
        )


def divisor(size: int, limit: int) -> int:
    """The largest divisor of ``size`` up to ``limit``."""
    return max(d for d in range(1, min(size, limit) + 1) if size % d == 0)


def tile(size: int, limit: int) -> int:
    """The cheapest tile length up to ``limit`` for ``size``: little waste, but enough sums to hide their latency."""
    return min(range(1, min(size, limit) + 1), key=lambda t: (-(-size // t) * (max(t, 4) + 1), -t))


def row_block(rows: int, bytes_per_row: int) -> int:
    """Rows of one parallel task: few enough for the cache and for threads to share one image."""
    share = -(-rows // 4) if rows >= 16 else rows
    return max(1, min(share, (192 << 10) // max(bytes_per_row, 1)))


def lanes_for(channels: int, widest: int) -> int:
    """Vector length for ``channels`` per group: the widest that does not mostly compute padding."""
    lanes = widest
    while lanes > 4 and -(-channels // lanes) * lanes > -(-channels // (lanes // 2)) * (lanes // 2) * 1.25:
        lanes //= 2
    return lanes


def as_pair(values: Sequence[int]) -> tuple[int, int]:
    """``(h, w)`` as a hashable pair of plain integers."""
    h, w = values
    return int(h), int(w)
