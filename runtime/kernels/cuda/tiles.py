"""Generators of the kernels with shared tiles: every output a sum over taps and channels of ``f(x, w)``.

Rows of a tile are pixels, columns output channels, both of one group. What is summed over, the channels of one tap
after those of another, is cut into steps of ``depth``; only the last is not full, however few channels a group has.
Per step a block fetches the next one into registers while it computes with this one, which lies in shared memory as
``[channel][row]`` and ``[channel][column]``; then it stores the next beside it, so that threads wait for each other
once a step. A thread keeps ``height`` x ``width`` sums in registers. The image is never unfolded.

One walk over pixels serves the output and the gradient of the input: pixel (a, b) meets, at tap (i, j), the pixel
``(a*mul_h + off_h + i*delta_h, b*mul_w + off_w + j*delta_w)`` of the tensor that is summed over. Outside of it that
tensor is zero (``pad`` for integers): padding is part of the sum. Behind the last tap both sides are zero.

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
from anncvt.runtime.kernels.cuda.epilogue import finished, scaled
from anncvt.runtime.kernels.cuda.variant import Tile, Variant

#: Behind each row of the shared x, which is written across rows: neighbours then lie in different banks.
_GAP = 4
_NOWHERE = -(2**30)


def walk(variant: Variant) -> tirx.PrimFunc:
    """``forward``, ``fused``, ``dx``, ``integer``: ``w[group][tap and channel][column]``, with zeros up to whole tiles.

    ``x`` is what is summed over (for ``dx`` the output's gradient), ``r`` the image a ``dx`` belongs to, or what a
    ``fused`` one adds; they are addressed by the distances of their images, rows and pixels, in entries of ``vector``
    channels, ``r`` like ``y``.
    """
    lanes = dict.fromkeys(variant.pointers, variant.vector) | {"w": 4}
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
        first = held(self.split * a["per"])
        self._locate(first)
        xs = Shared(2 * tile.depth, tile.rows + _GAP, self.compute)
        ws = Shared(2 * tile.depth, tile.columns, self.compute)
        sums = emit.cleared(tile.height * tile.width, self.compute)
        values = self._beside() if kind == "dx" else None

        def update(i: int, j: int, x: Any, w: Any) -> None:
            self._update(sums, values, i * tile.width + j, x, w)

        count = held(tirx.min(a["per"], a["steps"] - first))
        more = self._share if kind == "dx" else lambda: None
        pipeline(tile, count, self._fetch, lambda at: self._stash(xs, ws, at), xs, ws, self.thread, update, more)
        shares = self._shares(xs) if kind == "dx" else None
        self._finish(sums, shares)

    def _locate(self, first: Any) -> None:
        """Which pixels and channels this thread fetches, and the tap it begins with at step ``first``."""
        tile, a, vector = self.tile, self.a, self.variant.vector
        self.per_row = tile.depth // vector
        below = tile.threads // self.per_row
        self.slot = mod(self.thread, self.per_row)  # neighbours read neighbours
        self.rows = [div(self.thread, self.per_row) + v * below for v in range(tile.rows // below)]
        self.corners = [self._corner(self.place + row) for row in self.rows]
        k = held(first * self.per_row + self.slot)
        tap = held(div(k, a["depth"]))
        self.channel = variable(k - tap * a["depth"])
        self.tap_h, self.tap_w = variable(div(tap, a["taps_w"])), variable(mod(tap, a["taps_w"]))
        self.x_raw = registers(len(self.rows) * vector, emit.stored(self.variant.dtype))
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

    def _fetch(self, more: Any) -> None:
        """The next step's values from memory into registers; behind the last tap, and unless ``more``, zeros."""
        tile, a, variant = self.tile, self.a, self.variant
        known = self.tap_h[0] < a["taps_h"]
        outside = T.Select(known, a["pad"].astype("uint32"), tirx.const(0, "uint32")) if "pad" in a else None
        for v, (base, top, left) in enumerate(self.corners):
            h, w = top + self.tap_h[0] * a["delta_h"], left + self.tap_w[0] * a["delta_w"]
            inside = tirx.all(known, h >= 0, h < a["SH"], w >= 0, w < a["SW"])
            entry = base + h * a["xh"] + w * a["xw"] + self.channel[0]
            emit.take(self.x_raw, v * variant.vector, a["x"], entry, variant.vector, inside, outside)
        for v in range(self.w_fetches):
            inside = tirx.all(more, self.w_cell[0] + v * self.w_below < tile.depth)
            emit.take(self.w_raw, v * 4, a["w"], self.w_at[0] + v * self.w_below * a["w_wide"], 4, inside)
        put(self.w_at, self.w_at[0] + tile.depth * a["w_wide"])
        put(self.channel, self.channel[0] + self.per_row)
        _carry(self.channel, a["depth"], self.tap_w)
        _carry(self.tap_w, a["taps_w"], self.tap_h)

    def _stash(self, xs: Shared, ws: Shared, at: Any) -> None:
        """From registers to shared memory, from row ``at`` on."""
        variant, tile = self.variant, self.tile
        for v, row in enumerate(self.rows):
            for i in range(variant.vector):
                value = emit.loaded(self.x_raw[v * variant.vector + i], variant.dtype)
                xs.put(at + self.slot * variant.vector + i, row, value)
        for v in range(self.w_fetches):
            k = self.w_cell[0] + v * self.w_below
            some = tile.depth < self.w_below  # fewer cells than threads
            with when(k < tile.depth) if some else contextlib.nullcontext():
                ws.put(at + k, self.w_cell[1], self.w_raw[T.ramp(v * 4, 1, 4)], 4)

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
        self.share = emit.cleared(len(self.rows))
        raw = registers(variant.vector, emit.stored(variant.dtype))
        values = registers(tile.height * tile.width)
        for i, j, entry, inside in self._results():
            emit.take(raw, 0, self.a["r"], entry, variant.vector, inside)
            for lane in range(variant.vector):
                T.buffer_store(values, emit.loaded(raw[lane], variant.dtype), [i * tile.width + j + lane])
        return values

    def _share(self) -> None:
        """Add up what this thread fetched for each of its rows."""
        for v in range(len(self.rows)):
            for i in range(self.variant.vector):
                value = emit.loaded(self.x_raw[v * self.variant.vector + i], self.variant.dtype)
                T.buffer_store(self.share, self.share[v] + value, [v])

    def _shares(self, xs: Any) -> Any:
        """The sum of ``x`` over the steps, for each row of the thread's results: ``2*saturate(..) - 1`` needs it once.

        Threads that fetch for a row add up what they fetched.
        """
        tile = self.tile
        sync()
        for v, row in enumerate(self.rows):
            xs.put(self.slot, row, self.share[v])
        sync()
        shares = emit.cleared(tile.height)
        for i in range(tile.height):
            for slot in range(self.per_row):
                T.buffer_store(shares, shares[i] + xs.get(slot, row_of(tile, self.thread, i)), [i])
        return shares

    def _scale(self, sums: Any) -> None:
        """The line of an epilogue, a column of the thread's results at a time."""
        tile, vector, wide = self.tile, self.variant.vector, self.a["y_wide"]
        for j in range(0, tile.width, vector):
            column = div(self.column + column_of(tile, self.thread, j), vector)
            places = [i * tile.width + j for i in range(tile.height)]
            scaled(vector, self.a, sums, places, self.group * wide + column, column < wide, sign=-1)

    def _finish(self, sums: Any, shares: Any) -> None:
        variant, tile = self.variant, self.tile

        if variant.kind == "fused":
            self._scale(sums)

        def result(i: int, j: int) -> Any:
            total = sums[i * tile.width + j]
            if shares is not None:
                return tirx.const(2.0, "float32") * total - shares[i]
            return tirx.const(0, variant.out if variant.kind == "integer" else "float32") - (
                total.astype("int32") if variant.kind == "integer" else total
            )

        for i, j, entry, inside in self._results():
            with when(inside):
                if variant.kind == "fused":
                    values = finished(variant, self.a, sums, i * tile.width + j, entry)
                else:
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


def pipeline(
    tile: Tile,
    count: Any,
    fetch: Callable[[Any], None],
    stash: Callable[[Any], None],
    xs: Shared,
    ws: Shared,
    thread: Any,
    update: Callable[[int, int, Any, Any], None],
    begin: Callable[[], None] = lambda: None,
) -> None:
    """``count`` steps through two buffers: while one is computed with, the next step is on its way to the other.

    Args:
        fetch: loads the next step into registers, which no one waits for yet; is told whether there is one.
        stash: stores them in shared memory, from the row it is given on.
        begin: what else a step does, with its values still in the registers.
        update: see :func:`combine`.
    """
    fetch(count > 0)
    stash(0)
    with T.serial(count) as step:
        sync()  # this step's values are there, and those of the step before have been used
        begin()
        fetch(step + 1 < count)
        combine(tile, thread, xs, ws, mod(step, 2) * tile.depth, update)
        stash(mod(step + 1, 2) * tile.depth)


def combine(
    tile: Tile, thread: Any, xs: Shared, ws: Shared, at: Any, update: Callable[[int, int, Any, Any], None]
) -> None:
    """``update(i, j, x, w)`` for each tap in shared memory from row ``at`` on, and each of a thread's results."""
    x, w = registers(tile.height, xs.dtype), registers(tile.width, ws.dtype)
    with T.unroll(tile.depth) as k:
        for array, shared, size, place in ((x, xs, tile.height, row_of), (w, ws, tile.width, column_of)):
            span = min(size, 4)
            for i in range(0, size, span):
                T.buffer_store(array, shared.get(at + k, place(tile, thread, i), span), [emit.whole(i, span)])
        for i in range(tile.height):
            for j in range(tile.width):
                update(i, j, x[i], w[j])


def _carry(low: Any, limit: Any, high: Any) -> None:
    """Keep ``low`` below ``limit``; how often it went in is added to ``high``."""
    with when(low[0] >= limit):
        put(low, low[0] - limit)
        put(high, high[0] + 1)
        with when(low[0] >= limit):  # seldom: a division is slow
            over = held(div(low[0], limit))
            put(low, low[0] - over * limit)
            put(high, high[0] + over)


def sync() -> None:
    """Wait for the other threads of the block, and see what they wrote to shared memory."""
    T.evaluate(T.tvm_storage_sync("shared"))
