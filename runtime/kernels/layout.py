"""Moving data between layouts: plain NCHW to blocked and back, windows (slices, zero padding), concatenation."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from anncvt.runtime.kernels.flat import function, store, zero
from anncvt.runtime.kernels.layer import LANES, blocks


def blocked_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """``[N, C, H, W]`` or ``[N, C]`` as ``[N, ceil(C/16), H, W, 16]``."""
    batch, channels, height, width = (*shape, 1, 1)[:4]
    return (batch, blocks(channels), height, width, LANES)


def block(shape: tuple[int, ...], dtype: str = "float32") -> tirx.PrimFunc:
    """Plain ``shape`` to blocked, lanes beyond the last channel cleared."""
    batch, channels = shape[:2]
    pixels, depth = math.prod(shape[2:]), blocks(channels)

    def body(x: Any, y: Any) -> None:
        with T.parallel(batch * depth) as plane, T.serial(pixels) as pixel, T.serial(LANES) as lane:
            channel = plane % depth * LANES + lane
            value = x[(plane // depth * channels + channel) * pixels + pixel]
            inside = value if channels % LANES == 0 else tirx.if_then_else(channel < channels, value, zero(dtype))
            T.buffer_store(y, inside, [(plane * pixels + pixel) * LANES + lane])

    return function({"x": shape, "y": blocked_shape(shape)}, body, dtype)


def unblock(shape: tuple[int, ...], dtype: str = "float32") -> tirx.PrimFunc:
    """Blocked to plain ``shape``."""
    batch, channels = shape[:2]
    pixels, depth = math.prod(shape[2:]), blocks(channels)

    def body(x: Any, y: Any) -> None:
        with T.parallel(batch * channels) as plane, T.serial(pixels) as pixel:
            image, channel = plane // channels, plane % channels
            at = ((image * depth + channel // LANES) * pixels + pixel) * LANES + channel % LANES
            T.buffer_store(y, x[at], [plane * pixels + pixel])

    return function({"x": blocked_shape(shape), "y": shape}, body, dtype)


@dataclass(frozen=True)
class Axis:
    """One axis of a window: output ``i`` is input ``start + i*step`` where ``low <= i < high``, else the fill value."""

    start: int
    step: int
    size: int
    low: int
    high: int

    @classmethod
    def whole(cls, size: int) -> Axis:
        return cls(0, 1, size, 0, size)

    def slice(self, start: int, stop: int, step: int) -> Axis:
        """``[start:stop:step]`` of this axis (bounds already resolved)."""
        size = max(0, -(-(stop - start) // step))
        low = max(0, -(-(self.low - start) // step))
        high = min(size, -(-(self.high - start) // step))
        return Axis(self.start + start * self.step, self.step * step, size, low, high)

    def pad(self, before: int, after: int) -> Axis:
        """``before`` and ``after`` positions added (or, where negative, cut off)."""
        size = self.size + before + after
        low, high = max(0, self.low + before), min(size, self.high + before)
        return Axis(self.start - before * self.step, self.step, size, low, high)


@dataclass(frozen=True)
class Window:
    """A view of a blocked ``[N, C, H, W]``: channels, rows and columns sliced, strided and padded with ``fill``."""

    batch: int
    source: tuple[int, int, int]  # C, H, W
    axes: tuple[Axis, Axis, Axis]
    fill: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """The plain shape of the result."""
        return (self.batch, *(axis.size for axis in self.axes))


def window(view: Window, dtype: str = "float32") -> tirx.PrimFunc:
    """The kernel that copies ``view``: arguments ``x, y``."""
    channels, height, width = view.source
    of_channel, of_row, of_column = view.axes
    out, rows, columns = of_channel.size, of_row.size, of_column.size
    depth, source_depth = blocks(out), blocks(channels)
    aligned = of_channel.step == 1 and of_channel.start % LANES == 0

    def inside(axis: Axis, i: Any) -> Any:
        return tirx.all(i >= axis.low, i < axis.high)

    def body(x: Any, y: Any) -> None:
        with T.parallel(view.batch * depth * rows) as line, T.serial(columns) as j:
            image, b, i = line // (depth * rows), line // rows % depth, line % rows
            pixel = (of_row.start + i * of_row.step) * width + of_column.start + j * of_column.step
            valid = tirx.all(inside(of_row, i), inside(of_column, j))

            def value(lane: Any) -> Any:
                o = b * LANES + lane
                channel = of_channel.start + o * of_channel.step
                if aligned:
                    at = (image * source_depth + of_channel.start // LANES + b) * height * width * LANES
                    element = x[at + pixel * LANES + lane]
                else:
                    at = (image * source_depth + channel // LANES) * height * width * LANES
                    element = x[at + pixel * LANES + channel % LANES]
                present = tirx.all(valid, inside(of_channel, o))
                found = tirx.if_then_else(present, element, tirx.const(view.fill, dtype))
                return found if view.fill == 0 else tirx.if_then_else(o < out, found, zero(dtype))

            at = (line * columns + j) * LANES
            with T.serial(LANES) as lane:
                T.buffer_store(y, value(lane), [at + lane])

    source = (view.batch, source_depth, height, width, LANES)
    return function({"x": source, "y": blocked_shape(view.shape)}, body, dtype)


def _lane(buffer: Any, start: Any, lane: Any) -> Any:
    return buffer[start + lane]


def concatenate(batch: int, channels: tuple[int, ...], size: tuple[int, int], dtype: str = "float32") -> tirx.PrimFunc:
    """Blocked tensors joined along the channels: arguments ``x0, x1, ..., y``."""
    pixels, total = math.prod(size), sum(channels)
    depth = blocks(total)

    def body(y: Any, **parts: Any) -> None:
        with T.parallel(batch) as image:
            begin = 0
            for part, count in zip(parts.values(), channels, strict=True):
                if begin % LANES == 0:
                    with T.serial(blocks(count) * pixels) as pixel:
                        source = (image * blocks(count) * pixels + pixel) * LANES
                        target = ((image * depth + begin // LANES) * pixels + pixel) * LANES
                        store(y, target, functools.partial(_lane, part, source))
                else:
                    _scatter(y, part, image, begin, count)
                begin += count

    def _scatter(y: Any, part: Any, image: Any, begin: int, count: int) -> None:
        """Channels that begin inside a block, which an earlier part opened; a block they open is cleared first."""
        opened = -(-begin // LANES)
        if blocks(begin + count) > opened:
            with T.serial((blocks(begin + count) - opened) * pixels) as pixel:
                store(y, ((image * depth + opened) * pixels + pixel) * LANES, zero(dtype))
        with T.serial(count) as c, T.serial(pixels) as pixel:
            source = ((image * blocks(count) + c // LANES) * pixels + pixel) * LANES + c % LANES
            channel = begin + c
            target = ((image * depth + channel // LANES) * pixels + pixel) * LANES + channel % LANES
            T.buffer_store(y, part[source], [target])

    shapes = {f"x{i}": blocked_shape((batch, count, *size)) for i, count in enumerate(channels)}
    return function({**shapes, "y": blocked_shape((batch, total, *size))}, body, dtype)
