"""Integer inference kernels: adder layers of uint8 operands, convolutions of uint8 and int8, requantised in the end.

The output channels of one pixel are the lanes of a few vectors of sums (a panel); a tile of pixels is kept in
registers, and a few input channels of a pixel, broadcast, meet the weights of all lanes in one step (see
:mod:`anncvt.runtime.kernels.integer_forms`).
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from tvm import tirx
from tvm.tirx.script.builder import ir as B

from anncvt.runtime.kernels.flat import function, prefetch, ramp, spread
from anncvt.runtime.kernels.integer_forms import ORIGIN, Form
from anncvt.runtime.kernels.integer_input import Cells, Input
from anncvt.runtime.kernels.integer_layer import IntegerLayer
from anncvt.runtime.kernels.integer_output import DTYPES, Output, arguments
from anncvt.runtime.kernels.integer_tiling import IntegerTiling, panels_of, spans
from anncvt.runtime.kernels.integer_windows import window_sums
from anncvt.runtime.kernels.layer import LANES, blocks


def build(layer: IntegerLayer, form: Form, cut: IntegerTiling) -> tirx.PrimFunc:
    """The kernel of a layer that is not depthwise, for any batch.

    Arguments: see :meth:`anncvt.runtime.kernels.integer_plan.Plan.build`.
    """
    return _Kernel(layer, form, cut).function()


def cells_of(layer: IntegerLayer, form: Form) -> Cells:
    """How the input channels of a group are cut: whole blocks, or what the steps of ``form`` need."""
    depth, (_, columns) = layer.depth, layer.kernel
    if layer.in_place:
        return Cells(LANES, blocks(depth), depth, LANES, columns)
    if layer.mode == "conv" and layer.copies == 1 and layer.dilation[1] == 1 and depth * columns <= MOST_SPANNED:
        return Cells(-(-depth * columns // form.group) * form.group, 1, depth, depth, 1)
    size = -(-min(depth, LANES) // form.group) * form.group
    return Cells(size, -(-depth // size), depth, size, columns)


#: Weights beyond this are not in the second-level cache when their turn comes.
STREAM_BYTES = 256 << 10
LINE_BYTES = 64
#: Elements of a cell that spans kernel columns: its steps are all written out.
MOST_SPANNED = 48


class _Tile(NamedTuple):
    """Output pixels summed in registers, relative to the work item."""

    top: Any
    left: Any
    tall: int
    wide: int


class _Kernel:
    """Builds one PrimFunc. All buffers are addressed flat, so index arithmetic is written once, here."""

    def __init__(self, layer: IntegerLayer, form: Form, cut: IntegerTiling) -> None:
        self.layer, self.form, self.cut = layer, form, cut
        self.height, self.width = layer.out_size
        self.row_blocks = -(-self.height // cut.rows)
        self.panel = cut.vectors * form.lanes
        self.panels = panels_of(layer, form, cut.vectors)
        self.all_panels = layer.groups * self.panels
        self.parts = -(-self.all_panels // cut.panels)
        self.item_groups = 1 if layer.groups == 1 else cut.panels // self.panels
        self.cells = cells_of(layer, form)
        self.input = Input(layer, form.source, self.cells, cut.rows, self.item_groups)

    def function(self) -> tirx.PrimFunc:
        batch = tirx.Var("n", "int32")
        shapes, dtypes = signature(self.layer, self.form, self.cut, batch)
        return function(shapes, lambda **buffers: self._body(batch, buffers), dtypes)

    def _body(self, batch: Any, buffers: dict[str, Any]) -> None:
        form, cut = self.form, self.cut
        self.weight = buffers["weight"]
        self.output = Output(self.layer, self.form, buffers)
        with B.parallel(batch * (self.row_blocks * self.parts)) as item:
            image = item // (self.row_blocks * self.parts)
            row = tirx.min(item // self.parts % self.row_blocks * cut.rows, self.height - cut.rows)
            first = tirx.min(item % self.parts * cut.panels, self.all_panels - cut.panels)
            group = first // self.panels if self.layer.groups > 1 else tirx.const(0, "int32")
            source, base = self.input.read(buffers["x"], buffers["parameters"], image, row, group)
            sums = None
            if form.quads is not None:
                origin = ORIGIN if form.narrows(self.layer) else 0
                sums = window_sums(self.layer, form.quads, self.input, source, base, cut.rows, origin)
            with B.serial(cut.panels) as panel:
                self._panel(image, row, first + panel, panel // self.panels, source, base, sums)
            self._clear(image, row, item % self.parts)

    def _panel(self, image: Any, row: Any, panel: Any, group: Any, source: Any, base: Any, sums: Any) -> None:
        """All pixels of a work item for the output channels of one panel; ``group`` counts within the item."""
        cut = self.cut
        rows, width = (1, cut.rows * self.width) if self.layer.pointwise else (cut.rows, self.width)
        group = group if self.layer.groups > 1 else tirx.const(0, "int32")
        before, tiles = 0, -(-rows // cut.height) * -(-width // cut.width)
        for (y0, tall_tiles, tall), (x0, wide_tiles, wide) in itertools.product(
            spans(rows, cut.height), spans(width, cut.width)
        ):
            with B.serial(tall_tiles) as i, B.serial(wide_tiles) as j:
                tile = _Tile(y0 + i * tall, x0 + j * wide, tall, wide)
                starts = self._starts(group, sums, tile)
                totals = self._beginning([] if self.layer.doubling else starts, tile)
                at = base + group * (self.cells.number * self.input.plane)
                with B.serial(self.layer.reads) as copy:
                    if self.layer.doubling:
                        self._double(totals, starts, tile.tall * tile.wide, copy)
                    self._taps(totals, copy, panel, at, source, tile, before + i * wide_tiles + j, tiles)
                self._results(totals, image, row, panel, tile)
            before += tall_tiles * wide_tiles

    def _starts(self, group: Any, sums: Any, tile: _Tile) -> list[Any]:
        """Per pixel of a tile, what the window takes from ``sum 2*max(x, w)``, where sums are of maxima."""
        if sums is None:
            return []
        first = (group * self.cut.rows + tile.top) * self.width + tile.left
        return [sums[first + i * self.width + j] for i, j in itertools.product(range(tile.tall), range(tile.wide))]

    def _beginning(self, starts: list[Any], tile: _Tile) -> list[Any]:
        """A buffer for each vector of a pixel, with what the sums of a tile start with: zero if nothing is given."""
        form, pixels = self.form, tile.tall * tile.wide
        result = [B.alloc_buffer((pixels * form.lanes,), form.sums) for _ in range(self.cut.vectors)]
        for pixel, start in enumerate(starts or [tirx.const(0, form.sums)] * pixels):
            for own in result:
                B.buffer_store(own, spread(start, form.lanes), [self._sum(pixel)])
        return result

    def _double(self, totals: list[Any], starts: list[Any], pixels: int, copy: Any) -> None:
        """What copies before gave counts twice as much; the last one, which counts once, brings the start."""
        for pixel in range(pixels):
            at = self._sum(pixel)
            for own in totals:
                doubled = own[at] + own[at]
                if starts:
                    start = tirx.Select(copy >= self.layer.reads - 1, starts[pixel], tirx.const(0, "int32"))
                    doubled = doubled + spread(start, self.form.lanes)
                B.buffer_store(own, doubled, [at])

    def _expect(self, panel: Any, slot: Any, slots: int) -> None:
        """Ask for a part of the weights of the next panel, where they come from beyond the second-level cache.

        ``slot`` counts the ``slots`` times that the innermost loop is left in a panel: asked for all at once, lines
        would keep the loop waiting.
        """
        size = self.layer.reads * self.cells.number * self.layer.kernel[0] * self.cells.columns
        size *= self.cells.size * self.panel
        each = LINE_BYTES // (2 if self.form.weight == "int16" else 1)
        lines = -(-size // each)
        if size * (LINE_BYTES // each) * self.all_panels <= STREAM_BYTES:
            return
        for line in range(-(-lines // slots)):
            at = slot * -(-lines // slots) + line if lines > slots else slot >> (slots // lines).bit_length() - 1
            prefetch(self.weight, (panel + 1) * size + at * each)

    def _sum(self, pixel: int) -> Any:
        return ramp(pixel * self.form.lanes, self.form.lanes)

    def _taps(
        self, totals: list[Any], copy: Any, panel: Any, base: Any, source: Any, tile: _Tile, number: Any, tiles: int
    ) -> None:
        """Add up one copy of the input."""
        layer, form, vectors = self.layer, self.form, self.cut.vectors
        kh, kw = layer.kernel[0], self.cells.columns
        operand = form.group * form.lanes
        cells = self.cells.number
        with B.serial(cells) as c, B.serial(kh) as r, B.serial(kw) as s:
            turn, turns = ((copy * cells + c) * kh + r) * kw + s, layer.reads * cells * kh * kw
            self._expect(panel, number * turns + turn, tiles * turns)
            weights = (panel * turns + turn) * (self.cells.size * self.panel)
            origin = base + c * self.input.plane
            origin = origin + (tile.top * self.input.stride[0] + r * layer.dilation[0]) * (
                self.input.width * self.cells.pitch
            )
            origin = origin + (tile.left * self.input.stride[1] + s * layer.dilation[1]) * self.cells.pitch
            for step, i, j in itertools.product(
                range(self.cells.size // form.group), range(tile.tall), range(tile.wide)
            ):
                pixel = (i * self.input.stride[0] * self.input.width + j * self.input.stride[1]) * self.cells.pitch
                x = source[ramp(origin + pixel + step * form.group, form.group)]
                for v in range(vectors):
                    w = self.weight[ramp(weights + (step * vectors + v) * operand, operand)]
                    at = self._sum(i * tile.wide + j)
                    combine = form.alternate if form.alternate and step % 2 else form.step
                    B.buffer_store(totals[v], combine(totals[v][at], x, w), [at])

    def _results(self, totals: list[Any], image: Any, row: Any, panel: Any, tile: _Tile) -> None:
        layer, constants = self.layer, panel * self.panel
        for i in range(tile.tall):
            line = [[own[self._sum(i * tile.wide + j)] for own in totals] for j in range(tile.wide)]
            if layer.out_in_place:
                self._store(line, constants, image, row + tile.top + i, tile.left)
                continue
            channel = panel % self.panels * self.panel
            valid, plane = layer.filters - channel, self.height * self.width * LANES
            for j, found in enumerate(line):
                at = self.output.address(image, 0, row + tile.top + i, tile.left + j)
                first = panel // self.panels * layer.filters + channel
                self.output.scatter(found, constants, first, valid, at, plane)

    def _store(self, line: list[list[Any]], constants: Any, image: Any, row: Any, column: Any) -> None:
        """Panels are whole blocks or parts of one; those of a group follow each other without a gap."""
        piece = min(LANES, self.panel) // self.form.lanes
        for v in range(0, self.cut.vectors, piece):
            first = constants + v * self.form.lanes
            at = self.output.address(image, first // LANES, row, column) + first % LANES
            self.output.store([found[v : v + piece] for found in line], first, first, at)

    def _clear(self, image: Any, row: Any, part: Any) -> None:
        """The lanes beyond the last channel that no panel covers."""
        layer = self.layer
        covered = self.all_panels * self.panel if layer.out_in_place else layer.out_channels
        if covered < blocks(layer.out_channels) * LANES:
            with B.If(part == self.parts - 1), B.Then(), B.serial(self.cut.rows) as h, B.serial(self.width) as w:
                self.output.clear(image, row + h, w, covered)


def signature(
    layer: IntegerLayer, form: Form, cut: IntegerTiling, batch: Any
) -> tuple[dict[str, tuple[Any, ...]], dict[str, str]]:
    """Shapes and dtypes of a kernel's arguments, in order."""
    panels = layer.groups * panels_of(layer, form, cut.vectors)
    panel = cut.vectors * form.lanes
    cells = cells_of(layer, form)
    steps = (layer.reads * cells.number, layer.kernel[0], cells.columns, cells.size // form.group)
    shapes: dict[str, tuple[Any, ...]] = {
        "x": (batch, *layer.in_shape),
        "weight": (panels, *steps, panel * form.group),
    }
    return arguments(layer, shapes, panels * panel, batch), {**DTYPES, "weight": form.weight, "y": layer.result}
