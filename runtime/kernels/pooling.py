"""Pooling on blocked tensors: windows with fixed geometry, and adaptive ones (global pooling among them)."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from anncvt.runtime.geometry import NO_PADDING, Padding
from anncvt.runtime.kernels.flat import f32, function, store, zero
from anncvt.runtime.kernels.layer import LANES, blocks

#: What a padded pixel counts as in a maximum: the lowest float32, as infinities may be assumed away by the compiler.
LOWEST = -3.4028234663852886e38


@dataclass(frozen=True)
class Pool:
    """``"max"`` or ``"mean"`` over windows of ``[N, C, H, W]`` (blocked).

    ``count_padding``: a mean divides by the size of the window including padding, as torch does by default.
    """

    mode: str
    batch: int
    channels: int
    size: tuple[int, int]
    out_size: tuple[int, int]
    kernel: tuple[int, int] = (0, 0)  # (0, 0): adaptive, window i covers [i*H//H', ceil((i+1)*H/H'))
    stride: tuple[int, int] = (1, 1)
    padding: Padding = NO_PADDING
    dilation: tuple[int, int] = (1, 1)
    count_padding: bool = True
    divisor: int = 0  # 0: the number of pixels

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (self.batch, blocks(self.channels), *self.out_size, LANES)


def build(spec: Pool, dtype: str = "float32") -> tirx.PrimFunc:
    """The kernel: arguments ``x, y``. Of ``"uint8"`` there are maxima alone."""
    (height, width), (rows, columns) = spec.size, spec.out_size
    depth = blocks(spec.channels)

    def window(i: Any, axis: int) -> tuple[Any, Any, Any]:
        """Begin, end and step of output position ``i``, cut to the image; and the extent it is divided by."""
        size = spec.size[axis]
        if spec.kernel == (0, 0):
            out = spec.out_size[axis]
            return i * size // out, ((i + 1) * size + out - 1) // out, 0
        before, after = (
            (spec.padding.top, spec.padding.bottom) if axis == 0 else (spec.padding.left, spec.padding.right)
        )
        step = spec.dilation[axis]
        start = i * spec.stride[axis] - before
        end = start + (spec.kernel[axis] - 1) * step + 1
        extent = tirx.min(end, size + after) - start
        first = tirx.if_then_else(start < 0, start + (step - 1 - start) // step * step, start)
        return first, tirx.min(end, size), extent

    def largest(x: Any, plane: Any, i: Any, j: Any, lane: Any) -> Any:
        """A window without gaps. What is outside the image counts as the nearest pixel, which is in the window too."""
        found = []
        for r, s in itertools.product(*map(range, spec.kernel)):
            row, column = (
                tirx.max(tirx.min(position * step + tap - before, size - 1), 0)
                for position, step, tap, before, size in zip(
                    (i, j), spec.stride, (r, s), (spec.padding.top, spec.padding.left), spec.size, strict=True
                )
            )
            found.append(x[((plane * height + row) * width + column) * LANES + lane])
        return functools.reduce(tirx.max, found)

    def body(x: Any, y: Any) -> None:
        with T.parallel(spec.batch * depth * rows) as line, T.serial(columns) as j:
            plane, i = line // rows, line % rows
            if spec.mode == "max" and spec.kernel != (0, 0) and spec.dilation == (1, 1):
                store(y, (line * columns + j) * LANES, lambda lane: largest(x, plane, i, j, lane))
                return
            total = T.alloc_buffer((LANES,), dtype, scope="local")
            store(total, 0, f32(LOWEST) if spec.mode == "max" and dtype == "float32" else zero(dtype))
            (top, bottom, tall), (left, right, wide) = window(i, 0), window(j, 1)
            down, along = spec.dilation
            high, broad = (bottom - top + down - 1) // down, (right - left + along - 1) // along
            with T.serial(high) as r, T.serial(broad) as c:
                at = ((plane * height + top + r * down) * width + left + c * along) * LANES
                if spec.mode == "max":
                    store(total, 0, lambda lane: tirx.max(total[lane], x[at + lane]))
                else:
                    store(total, 0, lambda lane: total[lane] + x[at + lane])
            target = (line * columns + j) * LANES
            if spec.mode == "max":
                store(y, target, lambda lane: total[lane])
                return
            count = spec.divisor or (tall * wide if spec.count_padding and spec.kernel != (0, 0) else high * broad)
            inverse = f32(1) / tirx.Cast("float32", count) if not isinstance(count, int) else f32(1 / count)
            store(y, target, lambda lane: total[lane] * inverse)

    shape = (spec.batch, depth, height, width, LANES)
    return function({"x": shape, "y": spec.out_shape}, body, dtype)
