"""Inference kernels: one layer of a network (adder or convolution, scale, shift, residual, activation) as a PrimFunc.

Activations are blocked, ``[N, ceil(C/16), H, W, 16]`` (NCHW16c): one vector of 16 output channels is the unit of work,
a tile of output pixels is kept in registers, and the input pixel is a broadcast operand. Lanes beyond ``C`` are zero
in every blocked tensor; all kernels keep it so.

The adder uses ``|x-w| = 2*max(x,w) - x - w``: the patch sum is shared by all output channels, the sum of the weights is
folded into the shift, and one ``max`` and one fused multiply-add remain per tap, the cost of a convolution.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from anncvt.runtime.kernels.activations import apply, keeps_zero
from anncvt.runtime.kernels.flat import f32, function, prefetch, store
from anncvt.runtime.kernels.layer import LANES, Layer, blocks
from anncvt.runtime.kernels.microkernel import SUMS, Microkernel
from anncvt.runtime.kernels.tiling import WIDE, Tiling


def pack(layer: Layer, weight: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, ...]:
    """The kernel's constants: weights in the order they are read, scale and shift per output lane.

    Args:
        layer: the layer.
        weight: ``[O, C/groups, kh, kw]``.
        scale, shift: ``[O]``, float64 (they are folded before rounding).

    Returns:
        float32 ``[O/16, taps..., 16]``, ``[O/16, 16]``, ``[O/16, 16]``; padded output channels are zero.
    """
    out, depth, kh, kw = weight.shape
    lanes = blocks(out) * LANES
    shift = shift.astype(np.float64)
    if layer.form == "max":
        shift = shift + scale * weight.astype(np.float64).sum((1, 2, 3))
    width = LANES if layer.blocked and not layer.per_lane else depth
    full = np.zeros((lanes, blocks(depth) * width if width == LANES else depth, kh, kw), np.float32)
    full[:out, :depth] = weight
    split = full.reshape(lanes // LANES, LANES, -1, width, kh, kw)
    packed = np.ascontiguousarray(split.transpose(0, 2, 4, 5, 3, 1))
    return packed, np.append(per_lane(scale, lanes), np.full((1, LANES), 2, np.float32), 0), per_lane(shift, lanes)


def per_lane(values: np.ndarray, lanes: int) -> np.ndarray:
    """``[O]`` as float32 ``[lanes/16, 16]``, zero beyond the last."""
    full = np.zeros(lanes, np.float32)
    full[: len(values)] = values
    return full.reshape(-1, LANES)


def build(layer: Layer, cut: Tiling, assembly: bool = False) -> tirx.PrimFunc:
    """The kernel: arguments ``x, weight, scale, shift[, residual], y`` (shapes of :func:`pack` and :class:`Layer`).

    ``assembly``: the innermost loops may be AVX2 code (:mod:`anncvt.runtime.kernels.microkernel`).
    """
    return Kernel(layer, cut, assembly).function()


#: Weights beyond this stream from memory: those of the next output block are asked for while this one is computed,
#: because the hardware does not see across pages.
STREAM_BYTES = 256 * 1024


class Tile(NamedTuple):
    """Output pixels summed in registers, relative to the work item."""

    top: Any
    left: Any
    index: Any


class Item(NamedTuple):
    """A work item: its image and first output row, where its input lies, the patch sums to share."""

    image: Any
    row: Any
    source: Any
    base: Any
    sums: Any


class Kernel:
    """Builds one PrimFunc. All buffers are addressed flat, so index arithmetic is written once, here."""

    def __init__(self, layer: Layer, cut: Tiling, assembly: bool) -> None:
        self.layer, self.cut = layer, cut
        self.height, self.width = layer.out_size
        self.out = blocks(layer.out_channels)
        self.cells = LANES if layer.blocked else layer.in_channels  # channels stored side by side
        self.in_blocks = blocks(layer.in_channels) if layer.blocked else 1
        self.row_blocks = -(-self.height // cut.rows)
        self.out_groups = -(-self.out // cut.out_blocks)
        reach = tuple((k - 1) * d + 1 for k, d in zip(layer.kernel, layer.dilation, strict=True))
        # A copy for a 1x1 window takes only the pixels it needs; the window then moves one by one.
        whole = not layer.pointwise
        self.picked, self.stride = ((1, 1), layer.stride) if whole else (layer.stride, (1, 1))
        self.in_rows = (cut.rows - 1) * self.stride[0] + reach[0]
        # Where nothing is copied the kernel reads x itself.
        self.in_width = (self.width - 1) * self.stride[1] + reach[1] if layer.copied else layer.size[1]
        self.plane = (self.in_rows if layer.copied else layer.size[0]) * self.in_width * self.cells
        # Input blocks that one output block sees.
        self.depth = layer.in_channels // layer.groups
        self.dense_blocks = self.depth // LANES if layer.groups > 1 else self.in_blocks
        self.seen = 1 if layer.per_lane else self.dense_blocks
        self.size = cut.height * cut.width * cut.vectors * LANES  # sums of a tile
        self.sums = layer.form in ("max", "fixed")
        self.sum_groups = layer.groups if self.sums else 1
        own = assembly and layer.form in SUMS and not layer.per_lane
        #: By the column that a tile begins at; one for all columns where tiles are rectangles.
        self.micro = {column: self._microkernel(column) for column in self._first_columns()} if own else {}

    def _first_columns(self) -> list[int]:
        """The columns of the image that tiles begin at, where that matters."""
        if not self.cut.linear:
            return [0]
        pixels, wide = self.cut.rows * self.width, self.cut.width
        return sorted({min(start, pixels - wide) % self.width for start in range(0, pixels, wide)})

    def _microkernel(self, column: int) -> Microkernel:
        layer, (kh, kw) = self.layer, self.layer.kernel
        row = self.in_width * self.cells
        rows = (kh, layer.dilation[0] * row)
        connected = layer.dilation[1] == 1  # the columns of a window are neighbours
        if self.cut.linear:
            pixels = [divmod(column + j, self.width) for j in range(self.cut.width)]
        else:
            pixels = list(itertools.product(range(self.cut.height), range(self.cut.width)))
        return Microkernel(
            layer.form,
            tuple(i * self.stride[0] * row + (j - column) * self.stride[1] * self.cells for i, j in pixels),
            (0, LANES // 2),
            LANES,
            self.cells * kw if connected else self.cells,
            (rows,) if connected else (rows, (kw, layer.dilation[1] * self.cells)),
            self.plane,
        )

    def function(self) -> tirx.PrimFunc:
        return function(self._shapes() | {"scale": (self.out + 1, LANES)}, self._body)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the arguments, in order."""
        layer = self.layer
        shapes = {"x": layer.in_shape, "weight": self._weight_shape()}
        shapes |= dict.fromkeys(("scale", "shift"), (self.out, LANES))
        return shapes | dict.fromkeys(("residual", "y") if layer.residual else ("y",), layer.out_shape)

    def _body(self, x: Any, weight: Any, scale: Any, shift: Any, y: Any, residual: Any = None) -> None:
        cut = self.cut
        self.x, self.weight, self.scale, self.shift = x, weight, scale, shift
        self.residual, self.y = residual, y
        items = self.layer.batch * self.row_blocks * self.out_groups
        with contextlib.ExitStack() as stack:
            for micro in self.micro.values():
                stack.enter_context(micro.imported())
            item = stack.enter_context(T.parallel(items))
            image = item // (self.row_blocks * self.out_groups)
            block = item // self.out_groups % self.row_blocks
            group = item % self.out_groups
            row = tirx.min(block * cut.rows, self.height - cut.rows)
            first = tirx.min(group * cut.out_blocks, self.out - cut.out_blocks)
            source, base = self._input(image, row)
            sums = T.alloc_buffer((self.sum_groups * self.in_rows * self.width,), "float32") if self.sums else None
            work = Item(image, row, source, base, sums)
            if cut.depth < self.seen:
                self._in_passes(work, first)
            else:
                self._at_once(work, first)

    def _weight_shape(self) -> tuple[int, ...]:
        if self.layer.per_lane:
            return (self.out, 1, *self.layer.kernel, self.depth, LANES)
        return (self.out, self.dense_blocks, *self.layer.kernel, self.cells, LANES)

    def _input(self, image: Any, row: Any) -> tuple[Any, Any]:
        """The input rows of a work item and where they begin: a padded copy, or ``x`` itself."""
        layer = self.layer
        if not layer.copied:
            return self.x, (image * self.in_blocks * layer.size[0] + row * layer.stride[0]) * self.in_width * self.cells
        copy = T.alloc_buffer((self.in_blocks * self.plane,), "float32")
        with T.serial(self.in_blocks) as b, T.serial(self.in_rows) as h:
            source_row = row * layer.stride[0] + h * self.picked[0] - layer.padding.top
            inside = tirx.all(source_row >= 0, source_row < layer.size[0])
            target = b * self.plane + h * self.in_width * self.cells
            with T.serial(self.in_width) as w:
                column = w * self.picked[1] - layer.padding.left
                valid = tirx.all(inside, column >= 0, column < layer.size[1])
                if layer.blocked:
                    at = (((image * self.in_blocks + b) * layer.size[0] + source_row) * layer.size[1] + column) * LANES
                    with T.If(valid):
                        with T.Then():
                            store(copy, target + w * LANES, lambda lane: self.x[at + lane])
                        with T.Else():
                            store(copy, target + w * LANES, f32(0))
                else:
                    with T.serial(self.cells) as c:
                        at = ((image * self.cells + c) * layer.size[0] + source_row) * layer.size[1] + column
                        value = tirx.if_then_else(valid, self.x[at], f32(0))
                        T.buffer_store(copy, value, [target + w * self.cells + c])
        return copy, tirx.const(0, "int32")

    def _patch_sums(self, work: Item) -> None:
        """``[groups, input rows, output width]``: the sum over channels and kernel columns; kernel rows come later."""
        if work.sums is None:
            return
        rows, source = self.in_rows, work.source
        per_group = self.in_blocks // self.sum_groups
        cells = T.alloc_buffer((self.in_width * self.cells,), "float32")
        line = T.alloc_buffer((self.in_width,), "float32")
        with T.serial(self.sum_groups) as g, T.serial(rows) as h:
            at = work.base + g * per_group * self.plane + h * self.in_width * self.cells
            # Row after row as they lie in memory: one pixel through all blocks would touch a page for each.
            with T.serial(self.in_width) as w:
                store(cells, w * self.cells, lambda lane: source[at + w * self.cells + lane], self.cells)
            with T.serial(per_group - 1) as b, T.serial(self.in_width) as w:
                own, more = w * self.cells, at + (b + 1) * self.plane + w * self.cells
                store(cells, own, lambda lane: cells[own + lane] + source[more + lane], self.cells)
            with T.serial(self.in_width) as w:
                self._sum_cells(cells, line, w)
            self._sum_columns(work, line, g, h)

    def _sum_columns(self, work: Item, line: Any, group: Any, row: Any) -> None:
        """The patch sums of a row of the input, of the sums over channels in ``line``."""
        layer = self.layer
        with T.serial(self.width) as w:
            taps = [line[w * self.stride[1] + k * layer.dilation[1]] for k in range(layer.kernel[1])]
            T.buffer_store(work.sums, sum(taps[1:], taps[0]), [(group * self.in_rows + row) * self.width + w])

    def _sum_cells(self, cells: Any, line: Any, w: Any) -> None:
        """``line[w]``: the sum of the channels stored side by side in ``cells``."""
        lanes = T.alloc_buffer((self.cells,), "float32", scope="local")
        store(lanes, 0, lambda lane: cells[w * self.cells + lane], self.cells)
        half = self.cells // 2
        while self.cells == LANES and half:  # pairwise: a serial sum of lanes would cost 16 dependent additions
            with T.vectorized(half) as lane:
                T.buffer_store(lanes, lanes[lane] + lanes[half + lane], [lane])
            half //= 2
        total = lanes[0] if self.cells == LANES else sum((lanes[c] for c in range(1, self.cells)), lanes[0])
        T.buffer_store(line, total, [w])

    def _at_once(self, work: Item, first: Any) -> None:
        """One tile after the other, over all its taps."""
        self._patch_sums(work)
        memory = T.alloc_buffer((self.size,), "float32") if self.micro else None
        with self._out_blocks(first) as (_, o), self._tiles() as tile:
            self._expect(work, o, tile)
            totals = memory if self.micro else self._accumulator(lambda at: f32(0))
            if not self.micro:
                self._taps(totals, work, o, tile, 0, self.seen)
            else:
                self._call(totals, 0, work, o, tile, 0, self.seen)
            self._epilogue(totals, 0, work, o, tile)

    def _in_passes(self, work: Item, first: Any) -> None:
        """A few input blocks at a time for all tiles: their weights stay in the first-level cache."""
        depth, size = self.cut.depth, self.size
        partial = T.alloc_buffer((math.prod(self._tile_counts()) * size,), "float32")
        with self._out_blocks(first) as (index, o):
            with T.serial(-(-self.seen // depth)) as step, self._tiles() as tile:
                begin, count, place = step * depth, tirx.min(depth, self.seen - step * depth), tile.index * size
                self._expect_weights(o, begin, tile)
                if self.micro:
                    self._call(partial, place, work, o, tile, begin, count)
                else:
                    totals = self._accumulator(lambda at: tirx.Select(step == 0, f32(0), partial[place + at]))
                    self._taps(totals, work, o, tile, begin, count)
                    with self._lanes() as at:
                        T.buffer_store(partial, totals[at], [place + at])
            with T.If(index == 0), T.Then():  # by now the input is in the cache
                self._patch_sums(work)
            with self._tiles() as tile:
                self._epilogue(partial, tile.index * size, work, o, tile)

    @contextlib.contextmanager
    def _out_blocks(self, first: Any) -> Iterator[tuple[Any, Any]]:
        """Opens the loop over the output blocks of a work item, a tile's at a time: its index and the first of them.

        The last ones may overlap their neighbours.
        """
        count, vectors = self.cut.out_blocks, self.cut.vectors
        with T.serial(-(-count // vectors)) as index:
            begin = index * vectors
            yield index, first + (tirx.min(begin, count - vectors) if count % vectors else begin)

    def _call(self, totals: Any, place: Any, work: Item, o: Any, tile: Tile, first: Any, count: Any) -> None:
        """Add ``count`` input blocks from ``first`` to the sums of ``tile`` in memory; the first of all begin them."""
        weights, origin = self._block(work, o, tile, first)
        sums, x, w = (T.address_of(entry) for entry in (totals[place], work.source[origin], self.weight[weights]))
        fresh = tirx.const(1, "int32") if isinstance(first, int) else first == 0
        for column, micro in self.micro.items():
            with contextlib.ExitStack() as stack:
                if len(self.micro) > 1:
                    stack.enter_context(T.If(tile.left % self.width == column))
                    stack.enter_context(T.Then())
                micro.call(sums, x, w, times=count, fresh=fresh)

    def _grid(self) -> tuple[int, int]:
        """Rows and columns of a work item's output; a 1x1 window sees one long row, and so do tiles that go on."""
        long = self.layer.pointwise or self.cut.linear
        return (1, self.cut.rows * self.width) if long else (self.cut.rows, self.width)

    def _tile_counts(self) -> tuple[int, int]:
        (rows, width), cut = self._grid(), self.cut
        return -(-rows // cut.height), -(-width // cut.width)

    @contextlib.contextmanager
    def _tiles(self) -> Iterator[Tile]:
        """Opens the loops over the tiles of a work item. All have one size: the last one may overlap its neighbour."""
        (rows, width), cut, (tall, wide) = self._grid(), self.cut, self._tile_counts()
        # Tiles that go on in the next line differ in where that is: each has code of its own, without a microkernel.
        each = T.unroll if self.cut.linear and not self.micro else T.serial
        with T.serial(tall) as i, each(wide) as j:
            top = tirx.min(i * cut.height, rows - cut.height) if rows % cut.height else i * cut.height
            left = tirx.min(j * cut.width, width - cut.width) if width % cut.width else j * cut.width
            yield Tile(top, left, i * wide + j)

    @contextlib.contextmanager
    def _lanes(self) -> Iterator[Any]:
        """Opens the loops over the sums of a tile: where one is kept."""
        with T.unroll(self.size // LANES) as vector, T.vectorized(LANES) as lane:
            yield vector * LANES + lane

    @contextlib.contextmanager
    def _pixels(self) -> Iterator[tuple[Any, Any, Any]]:
        """Opens the loops over the vectors of a tile: row, column, output block."""
        with T.unroll(self.cut.height) as i, T.unroll(self.cut.width) as j, T.unroll(self.cut.vectors) as v:
            yield i, j, v

    def _kept(self, i: Any, j: Any, v: Any) -> Any:
        """Where the sums of a vector begin."""
        return ((i * self.cut.width + j) * self.cut.vectors + v) * LANES

    def _accumulator(self, begin: Callable[[Any], Any]) -> Any:
        """Registers for the sums of a tile; sum ``at`` begins as ``begin(at)``."""
        accumulator = T.alloc_buffer((self.size,), "float32", scope="local")
        with self._lanes() as at:
            T.buffer_store(accumulator, begin(at), [at])
        return accumulator

    def _pixel(self, work: Item, o: Any, tile: Tile) -> Any:
        """Where the tile begins in ``y`` and in the residual."""
        return (((work.image * self.out + o) * self.height + work.row + tile.top) * self.width + tile.left) * LANES

    def _expect(self, work: Item, o: Any, tile: Tile) -> None:
        """Ask for the cache lines that the epilogue will read and write."""
        if self.residual is None:
            return
        with self._pixels() as (i, j, v):
            at = self._pixel(work, o + v, tile) + (i * self.width + j) * LANES
            prefetch(self.residual, at)
            prefetch(self.y, at, write=True)

    def _expect_weights(self, o: Any, begin: Any, tile: Tile) -> None:
        """Ask for this tile's share of the weights of the next pass."""
        block = self._panel() // self.seen
        if self.out * self._panel() * 4 > STREAM_BYTES:
            lines = -(-block * self.cut.depth // (LANES * math.prod(self._tile_counts())))
            ahead = o * self._panel() + (begin + self.cut.depth) * block
            with T.serial(lines) as line:
                prefetch(self.weight, ahead + (tile.index * lines + line) * LANES)

    def _taps(self, totals: Any, work: Item, o: Any, tile: Tile, first: Any, count: Any) -> None:
        """Add the taps of ``count`` input blocks from ``first``."""
        layer, (kh, kw) = self.layer, self.layer.kernel
        reduced, panel = self._reduced(), self._panel()
        with T.serial(count) as step, T.serial(kh) as r, T.serial(kw) as s:
            weights, origin = self._block(work, o, tile, first + step)
            weights = weights + (r * kw + s) * reduced * LANES
            if self.size >= WIDE * LANES and self.out * panel * 4 > STREAM_BYTES:
                with T.unroll(reduced) as c, T.unroll(self.cut.vectors) as v:
                    prefetch(self.weight, weights + (self.cut.vectors + v) * panel + c * LANES)
            origin = origin + (r * layer.dilation[0] * self.in_width + s * layer.dilation[1]) * self.cells
            with T.serial(reduced) as c, self._pixels() as (i, j, v), T.vectorized(LANES) as lane:
                pixel = origin + self._from_first(tile, i, j)
                x = work.source[pixel + (self._own_channel(o, lane, c) if layer.per_lane else c)]
                w = self.weight[weights + v * panel + c * LANES + lane]
                at = self._kept(i, j, v) + lane
                T.buffer_store(totals, totals[at] + self._tap(x, w), [at])

    def _from_first(self, tile: Tile, i: Any, j: Any) -> Any:
        """How far a pixel of a tile is from its first, in the input."""
        if self.cut.linear:
            (top, left), (row, column) = self._place(0, tile.left), self._place(0, tile.left + j)
            i, j = row - top, column - left
        return (i * self.stride[0] * self.in_width + j * self.stride[1]) * self.cells

    def _reduced(self) -> int:
        """Input channels of one input block (of one group, where groups are small)."""
        return self.depth if self.layer.per_lane else self.cells

    def _panel(self) -> int:
        """Weights of 16 output channels."""
        return self.seen * self.layer.kernel[0] * self.layer.kernel[1] * self._reduced() * LANES

    def _block(self, work: Item, o: Any, tile: Tile, block: Any) -> tuple[Any, Any]:
        """Where the weights of output channels ``o`` and the pixels of ``tile`` begin for an input block."""
        weights = o * self._panel() + block * (self._panel() // self.seen)
        top, left = self._place(tile.top, tile.left)
        origin = work.base + (top * self.stride[0] * self.in_width + left * self.stride[1]) * self.cells
        if self.layer.per_lane:
            return weights, origin
        of_group = 0 if self.layer.groups == 1 else self._group(o) * self.dense_blocks
        return weights, origin + (of_group + block) * self.plane

    def _place(self, row: Any, column: Any) -> tuple[Any, Any]:
        """Row and column in the image of a pixel of the grid."""
        return (column // self.width, column % self.width) if self.cut.linear else (row, column)

    def _group(self, o: Any) -> Any:
        return o // (self.layer.out_channels // self.layer.groups // LANES)

    def _own_channel(self, o: Any, lane: Any, c: Any) -> Any:
        """Offset of input channel ``c`` of the group that output lane ``(o, lane)`` belongs to."""
        layer = self.layer
        if layer.groups == layer.in_channels == layer.out_channels:
            return o * self.plane + lane
        per_group = layer.out_channels // layer.groups
        channel = tirx.min(o * LANES + lane, layer.out_channels - 1) // per_group * self.depth + c
        return channel // LANES * self.plane + channel % LANES

    def _tap(self, x: Any, w: Any) -> Any:
        if self.layer.form == "conv":
            return x * w
        if self.layer.form == "abs":
            return tirx.abs(x - w)
        # The broadcast pixel must come second: LLVM folds it into vmaxps only there. Times 2 makes the accumulation a
        # fused multiply-add, which leaves the adders of the CPU to the maximum.
        return tirx.max(w, x) * self.scale[self.out * LANES]

    def _total(self, kept: Any) -> Any:
        """What a sum kept in a register stands for."""
        return kept

    def _epilogue(self, totals: Any, begin: Any, work: Item, o: Any, tile: Tile) -> None:
        layer = self.layer
        with self._pixels() as (i, j, v), T.vectorized(LANES) as lane:
            total = self._total(totals[begin + self._kept(i, j, v) + lane])
            block = o + v
            if work.sums is not None:
                group = 0 if layer.groups == 1 else self._group(block)
                row, column = self._place(tile.top + i, tile.left + j)
                at = (group * self.in_rows + row * self.stride[0]) * self.width + column
                rows = [work.sums[at + k * layer.dilation[0] * self.width] for k in range(layer.kernel[0])]
                total = sum(rows[1:], rows[0]) - total
            elif layer.form == "abs":
                total = f32(0) - total
            value = self.scale[block * LANES + lane] * total + self.shift[block * LANES + lane]
            at = self._pixel(work, block, tile) + (i * self.width + j) * LANES + lane
            if self.residual is not None:
                value = value + self.residual[at]
            value = apply(layer.activation, value)
            if layer.out_channels % LANES and not keeps_zero(layer.activation):
                value = tirx.if_then_else(block * LANES + lane < layer.out_channels, value, f32(0))
            T.buffer_store(self.y, value, [at])
