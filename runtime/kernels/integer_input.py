"""How an integer kernel reads its input: as it is stored, or the rows of a work item as a copy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from anncvt.runtime.kernels.flat import ramp, splat, spread, workspace
from anncvt.runtime.kernels.integer_layer import PARAMETERS, IntegerLayer
from anncvt.runtime.kernels.layer import LANES, blocks


class Cells(NamedTuple):
    """``number`` cells of ``size`` elements hold the ``depth`` channels of one group; the rest is zero.

    Where channels are few, a cell of a convolution spans the columns of its kernel, which lie side by side: ``pitch``
    elements from one column to the next, ``columns`` cells in a row of the kernel.
    """

    size: int
    number: int
    depth: int
    pitch: int
    columns: int

    @property
    def full(self) -> bool:
        return self.pitch * self.number == self.depth


class Input:
    """The input of one work item: ``rows`` output rows of ``groups`` groups.

    Attributes:
        stride: how far the window moves (a copy for a 1x1 window takes only the pixels it needs).
        rows, width: of the input that is read.
        plane: elements of one cell over all rows.
    """

    def __init__(self, layer: IntegerLayer, source: str, cells: Cells, rows: int, groups: int) -> None:
        self.layer, self.source, self.cells, self.groups = layer, source, cells, groups
        reach = tuple((k - 1) * d + 1 for k, d in zip(layer.kernel, layer.dilation, strict=True))
        self._copied = source != "uint8" or not layer.read_as_stored
        self._picked, self.stride = (layer.stride, (1, 1)) if layer.pointwise else ((1, 1), layer.stride)
        self.rows = (rows - 1) * self.stride[0] + reach[0]
        self.width = (layer.out_size[1] - 1) * self.stride[1] + reach[1] if self._copied else layer.size[1]
        self.plane = (self.rows if self._copied else layer.size[0]) * self.width * cells.pitch

    def read(self, x: Any, parameters: Any, image: Any, row: Any, group: Any) -> tuple[Any, Any]:
        """A buffer of ``[groups, cells, rows, columns, cell]`` and where that begins in it.

        Args:
            x, parameters: the kernel's arguments.
            image: number of the image.
            row: first output row.
            group: first group.
        """
        if self._copied:
            zero = parameters[PARAMETERS.index("zero")]
            return self._copy(x, zero, image, row, group), tirx.const(0, "int32")
        block = image * blocks(self.layer.in_channels) + group * self.cells.number
        return x, (block * self.layer.size[0] + row * self.layer.stride[0]) * (self.width * LANES)

    def _copy(self, x: Any, zero: Any, image: Any, row: Any, group: Any) -> Any:
        layer, count, size = self.layer, self.cells.number, self.cells.pitch
        # The last cell of a row that spans columns may reach beyond it, where its weights are zero.
        copy = workspace(self.groups * count * self.plane + self.cells.size, self.source)
        if self.cells.size > size:  # what lies beyond has to be defined all the same
            end = self.groups * count * self.plane
            B.buffer_store(copy, splat(0, self.source, self.cells.size), [ramp(end, self.cells.size)])
        step, left = self._picked[1], layer.padding.left
        first, last = -(-left // step), min(self.width, (left + layer.size[1] - 1) // step + 1)
        with B.serial(self.groups) as g, B.serial(count) as c, B.serial(self.rows) as h:
            source_row = row * layer.stride[0] + h * self._picked[0] - layer.padding.top
            target = (g * count + c) * self.plane + h * (self.width * size)

            def border(begin: int, end: int, c: Any = c, target: Any = target) -> None:
                with B.serial(end - begin) as w:
                    B.buffer_store(copy, self._border(zero, c), [ramp(target + (begin + w) * size, size)])

            with B.If(tirx.all(source_row >= 0, source_row < layer.size[0])):
                with B.Then():
                    border(0, first)
                    for begin, times, pixels in self._runs(first, last):
                        with B.serial(times) as run:
                            w = begin + run * pixels
                            found = self._pixels(x, zero, image, group + g, c, source_row, w * step - left, pixels)
                            B.buffer_store(copy, found, [ramp(target + w * size, pixels * size)])
                    border(max(first, last), self.width)
                with B.Else():
                    border(0, self.width)
        return copy

    def _runs(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Columns from ``first`` to ``last`` as runs of pixels that are copied at once: begin, runs, pixels of each."""
        most = 1
        if self._picked[1] == 1 and self.source == "uint8":
            if self.layer.in_place:
                most = 4
            elif not self.layer.blocked and self.groups == 1 and self.cells.pitch <= 4 and self.cells.full:
                most = 16
        while first < last:
            pixels = min(most, last - first)
            times = (last - first) // pixels
            yield first, times, pixels
            first += times * pixels

    def _pixels(self, x: Any, zero: Any, image: Any, group: Any, cell: Any, row: Any, column: Any, count: int) -> Any:
        """``count`` pixels side by side."""
        layer = self.layer
        height, width = layer.size
        if count == 1:
            return self._pixel(x, zero, image, group, cell, row, column)
        if layer.in_place:
            block = image * blocks(layer.in_channels) + group * self.cells.number + cell
            return x[ramp(((block * height + row) * width + column) * LANES, count * LANES)]
        planes = [((image * layer.in_channels + c) * height + row) * width + column for c in range(self.cells.depth)]
        order = [c * count + pixel for pixel in range(count) for c in range(self.cells.depth)]
        return tirx.Shuffle([x[ramp(plane, count)] for plane in planes], order)

    def _pixel(self, x: Any, zero: Any, image: Any, group: Any, cell: Any, row: Any, column: Any) -> Any:
        layer, count, depth, size = self.layer, self.cells.number, self.cells.depth, self.cells.pitch
        height, width = layer.size
        if layer.in_place:
            block = image * blocks(layer.in_channels) + group * count + cell
            return self._widened(x[ramp(((block * height + row) * width + column) * LANES, LANES)], zero, LANES)
        lanes = B.alloc_buffer((size,), self.source)
        for lane in range(size):
            channel = group * depth + cell * size + lane
            if layer.blocked:
                block = image * blocks(layer.in_channels) + channel // LANES
                at = ((block * height + row) * width + column) * LANES + channel % LANES
            else:
                at = ((image * layer.in_channels + channel) * height + row) * width + column
            value = self._widened(x[at], zero, 1)
            if not self.cells.full:
                value = T.if_then_else(cell * size + lane < depth, value, tirx.const(0, self.source))
            B.buffer_store(lanes, value, [lane])
        return lanes[ramp(0, size)]

    def _widened(self, value: Any, zero: Any, lanes: int) -> Any:
        if self.source == "uint8":
            return value
        kind = f"int16x{lanes}" if lanes > 1 else "int16"
        return value.astype(kind) - spread(zero.astype("int16"), lanes)

    def _border(self, zero: Any, cell: Any) -> Any:
        """A padded pixel; channels beyond the last stay zero."""
        size, depth = self.cells.pitch, self.cells.depth
        if self.source == "int16":
            return splat(0, "int16", size)
        value = spread(zero.astype("uint8"), size)
        if self.cells.full:
            return value
        channel = ramp(cell * size, size)
        return T.Select(channel < splat(depth, "int32", size), value, splat(0, "uint8", size))
