"""Generators of the kernels with shared tiles: every output a sum over taps and channels of ``f(x, w)``.

Rows of a tile are pixels, columns output channels, both of one group. Per step a block fetches ``depth`` channels of
one tap into registers while it computes with those of the step before, which lie in shared memory as ``[channel][row]``
and ``[channel][column]``; a thread keeps ``height`` x ``width`` sums in registers. The image is never unfolded.

One walk over pixels serves the output and the gradient of the input: pixel (a, b) meets, at tap (i, j), the pixel
``(a*mul_h + off_h + i*delta_h, b*mul_w + off_w + j*delta_w)`` of the tensor that is summed over. Outside of it that
tensor is zero (``pad`` for integers): padding is part of the sum. Channels beyond the last are zero on both sides.

``splits`` blocks may share the steps of a tile; each writes sums of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from anncvt.runtime.kernels.cuda import emit
from anncvt.runtime.kernels.cuda.emit import div, held, mod, put, registers, variable, when
from anncvt.runtime.kernels.cuda.variant import Tile, Variant

#: Behind each row of the shared x, which is written across rows: neighbours then lie in different banks.
_GAP = 4
_NOWHERE = -(2**30)


def walk(variant: Variant) -> tirx.PrimFunc:
    """``forward``, ``dx`` or ``integer``: ``w[group][tap][channel][column]``, with zeros up to whole tiles.

    ``x`` is what is summed over (for ``dx`` the output's gradient), ``r`` the image a ``dx`` belongs to; all tensors
    but ``w`` are addressed by the distances of their images, rows and pixels, in entries of ``vector`` channels.
    """
    lanes = {"x": variant.vector, "y": variant.vector, "r": variant.vector, "w": 4}
    return emit.function(variant, lanes, lambda block, thread, **args: _Walk(variant, block, thread, args).emit())


class Shared:
    """A table in shared memory. Its indices must be made of loop variables and the thread, not of registers.

    One long row, since TVM would cut columns that no one uses, and they are there to spread rows over the banks.
    """

    def __init__(self, rows: int, columns: int, dtype: str) -> None:
        self.dtype, self._columns = dtype, columns
        self._cells = T.alloc_shared((rows * columns,), dtype)

    def put(self, row: Any, column: Any, value: Any, lanes: int = 1) -> None:
        """``self[row, column:column+lanes] = value``."""
        T.buffer_store(self._cells, value, [emit.whole(row * self._columns + column, lanes)])

    def get(self, row: Any, column: Any, lanes: int = 1) -> Any:
        """``self[row, column:column+lanes]``."""
        return self._cells[emit.whole(row * self._columns + column, lanes)]


class _Walk:
    def __init__(self, variant: Variant, block: list[Any], thread: Any, args: dict[str, Any]) -> None:
        self.variant, self.tile, self.a, self.thread = variant, variant.tile, args, thread
        self.place = held(block[0] * self.tile.rows)
        self.column = held(block[1] * self.tile.columns)
        self.group = held(div(block[2], args["splits"]))
        self.split = held(block[2] - self.group * args["splits"])
        self.compute = "uint32" if variant.kind == "integer" else "float32"

    def emit(self) -> None:
        tile, a, kind = self.tile, self.a, self.variant.kind
        self._locate(held(self.split * a["per"]))
        xs = Shared(tile.depth, tile.rows + _GAP, self.compute)
        ws = Shared(tile.depth, tile.columns, self.compute)
        sums = emit.cleared(tile.height * tile.width, self.compute)
        values = self._beside() if kind == "dx" else None
        self._fetch()
        with T.serial(a["per"]):
            sync()  # the tile of the step before has been used
            self._stash(xs, ws)
            sync()
            self._advance()
            self._fetch()
            combine(tile, self.thread, xs, ws, lambda i, j, x, w: self._update(sums, values, i * tile.width + j, x, w))
        shares = self._shares(xs) if kind == "dx" else None
        self._finish(sums, shares)

    def _locate(self, first: Any) -> None:
        """Which pixels and channels this thread fetches, and the tap of step ``first``."""
        tile, a, vector = self.tile, self.a, self.variant.vector
        self.per_row = tile.depth // vector
        fetches = tile.rows * self.per_row // tile.threads
        if vector == 1:  # a thread keeps to one row: few channels are read from many pixels
            self.beside = tile.threads // tile.rows  # threads of a row
            self.row = [mod(self.thread, tile.rows)] * fetches
            at = div(self.thread, tile.rows)
            self.channel = [at + v * self.beside for v in range(fetches)]
        else:  # neighbours read neighbours
            self.beside = self.per_row
            below = tile.threads // self.per_row
            self.row = [div(self.thread, self.per_row) + v * below for v in range(fetches)]
            self.channel = [mod(self.thread, self.per_row)] * fetches
        rows = self.row[:1] if vector == 1 else self.row
        corners = [self._corner(self.place + row) for row in rows]
        self.corner = corners * fetches if vector == 1 else corners
        tap = held(div(first, a["chunks"]))
        self.at_channel = variable((first - tap * a["chunks"]) * self.per_row)
        self.tap_h, self.tap_w = variable(div(tap, a["taps_w"])), variable(mod(tap, a["taps_w"]))
        self.x_raw = registers(fetches * vector, emit.stored(self.variant.dtype))
        across = tile.columns // 4
        self.w_fetches = -(-tile.depth * across // tile.threads)
        self.w_cell = div(self.thread, across), mod(self.thread, across) * 4
        self.w_below = tile.threads // across
        w_row = (self.group * a["steps"] + first) * tile.depth + self.w_cell[0]
        self.w_at = variable(w_row * a["w_wide"] + div(self.column + self.w_cell[1], 4))
        self.w_raw = registers(self.w_fetches * 4, self.compute)

    def _corner(self, m: Any) -> tuple[Any, Any, Any]:
        """Of row ``m``: where its image begins, and the pixel its first tap meets."""
        a = self.a
        n, i, j = self._pixel(m)
        top = T.Select(m < a["M"], i * a["mul_h"] + a["off_h"], _NOWHERE)
        return held(n * a["xn"] + self.group * a["depth"]), held(top), held(j * a["mul_w"] + a["off_w"])

    def _pixel(self, m: Any) -> tuple[Any, Any, Any]:
        a = self.a
        line = held(div(m, a["PW"]))
        n = held(div(line, a["PH"]))
        return n, line - n * a["PH"], m - line * a["PW"]

    def _fetch(self) -> None:
        """The next step's values from memory into registers; behind the last tap, zeros."""
        tile, a, variant = self.tile, self.a, self.variant
        alive = self.tap_h[0] < a["taps_h"]
        for v, ((base, top, left), channel) in enumerate(zip(self.corner, self.channel, strict=True)):
            h, w = top + self.tap_h[0] * a["delta_h"], left + self.tap_w[0] * a["delta_w"]
            c = self.at_channel[0] + channel
            known = tirx.all(alive, c < a["depth"])
            inside = tirx.all(known, h >= 0, h < a["SH"], w >= 0, w < a["SW"])
            outside = T.Select(known, a["pad"].astype("uint32"), tirx.const(0, "uint32")) if "pad" in a else None
            entry = base + h * a["xh"] + w * a["xw"] + c
            emit.take(self.x_raw, v * variant.vector, a["x"], entry, variant.vector, inside, outside)
        for v in range(self.w_fetches):
            inside = tirx.all(alive, self.w_cell[0] + v * self.w_below < tile.depth)
            emit.take(self.w_raw, v * 4, a["w"], self.w_at[0] + v * self.w_below * a["w_wide"], 4, inside)

    def _stash(self, xs: Any, ws: Any) -> None:
        """From registers to shared memory."""
        variant, tile = self.variant, self.tile
        for v, (row, channel) in enumerate(zip(self.row, self.channel, strict=True)):
            for i in range(variant.vector):
                value = emit.loaded(self.x_raw[v * variant.vector + i], variant.dtype)
                xs.put(channel * variant.vector + i, row, value)
                if variant.kind == "dx":
                    at = 0 if variant.vector == 1 else v
                    T.buffer_store(self.share, self.share[at] + value, [at])
        for v in range(self.w_fetches):
            k = self.w_cell[0] + v * self.w_below
            some = tile.depth < self.w_below  # fewer cells than threads
            with when(k < tile.depth) if some else contextlib.nullcontext():
                ws.put(k, self.w_cell[1], self.w_raw[T.ramp(v * 4, 1, 4)], 4)

    def _advance(self) -> None:
        a = self.a
        put(self.w_at, self.w_at[0] + self.tile.depth * a["w_wide"])
        put(self.at_channel, self.at_channel[0] + self.per_row)
        with when(self.at_channel[0] >= a["depth"]):
            put(self.at_channel, 0)
            put(self.tap_w, self.tap_w[0] + 1)
            with when(self.tap_w[0] == a["taps_w"]):
                put(self.tap_w, 0)
                put(self.tap_h, self.tap_h[0] + 1)

    def _update(self, sums: Any, values: Any, at: int, x: Any, w: Any) -> None:
        if self.variant.kind == "integer":
            result = tirx.call_pure_extern("uint32", "anncvt_absdiff4", x, w, sums[at])
        elif values is None:
            result = sums[at] + T.abs(x - w)
        else:
            result = sums[at] + x * emit.slope(w - values[at], self.a["sharpness"])
        T.buffer_store(sums, result, [at])

    def _results(self) -> Iterator[tuple[int, int, Any, Any]]:
        """``(i, j, entry, inside)`` of what the thread's results lie in, one for each entry of memory.

        A row at a time: places computed all at once would take registers that the sums need.
        """
        tile, a, vector = self.tile, self.a, self.variant.vector
        for i in range(tile.height):
            m = held(self.place + row_of(tile, self.thread, i))
            n, line, pixel = self._pixel(m)
            base = held(n * a["yn"] + line * a["yh"] + pixel * a["yw"] + self.group * a["y_wide"])
            for j in range(0, tile.width, vector):
                column = div(self.column + column_of(tile, self.thread, j), vector)
                yield i, j, base + column, tirx.all(m < a["M"], column < a["y_wide"])

    def _beside(self) -> Any:
        """The image at the thread's results, and room for the sums of what this thread fetches."""
        variant, tile = self.variant, self.tile
        self.share = emit.cleared(1 if variant.vector == 1 else len(self.row))
        raw = registers(variant.vector, emit.stored(variant.dtype))
        values = registers(tile.height * tile.width)
        for i, j, entry, inside in self._results():
            emit.take(raw, 0, self.a["r"], entry, variant.vector, inside)
            for lane in range(variant.vector):
                T.buffer_store(values, emit.loaded(raw[lane], variant.dtype), [i * tile.width + j + lane])
        return values

    def _shares(self, xs: Any) -> Any:
        """The sum of ``x`` over the steps, for each row of the thread's results: ``2*saturate(..) - 1`` needs it once.

        Threads that fetch for a row add up what they fetched.
        """
        tile = self.tile
        sync()
        for at, row in enumerate(self.row[:1] if self.variant.vector == 1 else self.row):
            slot = div(self.thread, tile.rows) if self.variant.vector == 1 else self.channel[0]
            xs.put(slot, row, self.share[at])
        sync()
        shares = emit.cleared(tile.height)
        for i in range(tile.height):
            for slot in range(self.beside):
                T.buffer_store(shares, shares[i] + xs.get(slot, row_of(tile, self.thread, i)), [i])
        return shares

    def _finish(self, sums: Any, shares: Any) -> None:
        variant, tile = self.variant, self.tile

        def result(i: int, j: int) -> Any:
            total = sums[i * tile.width + j]
            if shares is not None:
                return tirx.const(2.0, "float32") * total - shares[i]
            return tirx.const(0, variant.out if variant.kind == "integer" else "float32") - (
                total.astype("int32") if variant.kind == "integer" else total
            )

        for i, j, entry, inside in self._results():
            with when(inside):
                values = [result(i, j + lane) for lane in range(variant.vector)]
                emit.give(self.a["y"], self.split * self.a["part"] + entry, values, variant.out)


def row_of(tile: Tile, thread: Any, i: int) -> Any:
    """The row, within a tile, of a thread's ``i``-th: four neighbours, then four half a tile further."""
    span = min(tile.height, 4)
    across = tile.columns // tile.width
    return (i // span) * (tile.rows // tile.height * span) + div(thread, across) * span + i % span


def column_of(tile: Tile, thread: Any, j: int) -> Any:
    """The column, within a tile, of a thread's ``j``-th."""
    span = min(tile.width, 4)
    across = tile.columns // tile.width
    return (j // span) * (across * span) + mod(thread, across) * span + j % span


def combine(tile: Tile, thread: Any, xs: Any, ws: Any, update: Callable[[int, int, Any, Any], None]) -> None:
    """``update(i, j, x, w)`` for each tap in shared memory and each of a thread's results."""
    x, w = registers(tile.height, xs.dtype), registers(tile.width, ws.dtype)
    with T.unroll(tile.depth) as k:
        for array, shared, size, place in ((x, xs, tile.height, row_of), (w, ws, tile.width, column_of)):
            span = min(size, 4)
            for i in range(0, size, span):
                T.buffer_store(array, shared.get(k, place(tile, thread, i), span), [emit.whole(i, span)])
        for i in range(tile.height):
            for j in range(tile.width):
                update(i, j, x[i], w[j])


def sync() -> None:
    """Wait for the other threads of the block, and see what they wrote to shared memory."""
    T.evaluate(T.tvm_storage_sync("shared"))
