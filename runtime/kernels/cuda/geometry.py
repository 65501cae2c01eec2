"""How tensors are walked over: the numbers that CUDA kernels are launched with. No torch and no TVM here."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from anncvt.runtime.geometry import expand_padding, output_size
from anncvt.runtime.kernels.spec import Axis


@dataclass(frozen=True)
class Walk:
    """One axis: result ``first + a*step``, a < ``size``, meets at tap ``i`` the position ``a*mul + off + i*delta``.

    Its ``taps`` are those of the kernel from ``tap`` on, each ``tap_step``-th.
    """

    size: int
    first: int
    step: int
    mul: int
    off: int
    delta: int
    tap: int
    tap_step: int
    taps: int

    def numbers(self, axis: str) -> dict[str, float]:
        """By the names kernels have for them; ``axis`` is ``"h"`` or ``"w"``."""
        return {f"mul_{axis}": self.mul, f"off_{axis}": self.off, f"delta_{axis}": self.delta}


@dataclass(frozen=True)
class Layer:
    """A layer on images of one size: everything that the numbers depend on but the batch."""

    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, ...]
    dilation: tuple[int, int]

    @functools.cached_property
    def output(self) -> tuple[int, int]:
        """Output height and width."""
        return output_size(self.size, self.kernel, self.stride, self.padding, self.dilation)

    @functools.cached_property
    def forward(self) -> tuple[Walk, Walk]:
        """Over the output; positions are those of the image."""
        pad = expand_padding(self.padding)
        rows, cols = (
            Walk(size, 0, 1, stride, -before, dilation, 0, 1, kernel)
            for size, stride, before, dilation, kernel in zip(
                self.output, self.stride, (pad.top, pad.left), self.dilation, self.kernel, strict=True
            )
        )
        return rows, cols

    @functools.cached_property
    def backward(self) -> tuple[tuple[Walk, Walk], ...]:
        """Over the image, in parts that meet the same taps (one for each remainder of a stride); positions are those
        of the output.
        """
        pad = expand_padding(self.padding)
        rows = _remainders(self.size[0], self.kernel[0], self.stride[0], pad.top, self.dilation[0])
        cols = _remainders(self.size[1], self.kernel[1], self.stride[1], pad.left, self.dilation[1])
        return tuple((row, col) for row in rows for col in cols)


def _remainders(size: int, kernel: int, stride: int, before: int, dilation: int) -> list[Walk]:
    a = Axis.of(size, kernel, stride, before, dilation)
    return [
        Walk(-(-(size - r) // stride), r, stride, 1, a.offset[r], -a.back, a.first[r], a.step, a.count[r])
        for r in range(min(stride, size))
    ]


@functools.lru_cache(maxsize=4096)
def layer(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, ...],
    dilation: tuple[int, int],
) -> Layer:
    """The same object for the same numbers: its derived ones are computed once."""
    return Layer(size, kernel, stride, padding, dilation)


def split(blocks: int, steps: int, wanted: int, fewest: int) -> tuple[int, int]:
    """``(splits, steps of each)``: enough blocks to fill ``wanted`` places, none with fewer than ``fewest`` steps.

    No split is empty.
    """
    splits = max(1, min(wanted // max(blocks, 1), steps // fewest, 64))
    per = -(-steps // splits) if steps else 0
    return (-(-steps // per) if per else 1), per
