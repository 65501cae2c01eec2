"""Generator of the exact weight gradient: ``sum over pixels of g * sign(x - w)``, one tap and one group to a block.

Rows of a tile are output channels, columns input channels; a step is ``depth`` pixels of the output, whose gradients
and the pixels of the image they meet are neighbours in memory as they are in shared memory. The pixels are many and the
tiles few: ``splits`` blocks share them. Sums are of ``g * saturate(..)``: the caller doubles them and subtracts the sum
of g.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from anncvt.runtime.kernels.cuda import emit
from anncvt.runtime.kernels.cuda.emit import div, held, mod, registers, variable, when
from anncvt.runtime.kernels.cuda.tiles import Shared, column_of, pipeline, row_of
from anncvt.runtime.kernels.cuda.variant import Variant


def weight_gradient(variant: Variant) -> tirx.PrimFunc:
    """``dw``: ``w`` and ``y`` are ``[group][row][tap][column]``, ``y`` once for each split."""
    lanes = dict.fromkeys("gwxy", variant.vector)
    return emit.function(variant, lanes, lambda block, thread, **args: _emit(variant, block, thread, args))


def _emit(variant: Variant, block: list[Any], thread: Any, a: dict[str, Any]) -> None:
    tile, vector = variant.tile, variant.vector
    rows, cols = held(div(a["rows"], vector)), held(div(a["cols"], vector))
    tap = held(div(block[0], a["col_tiles"]))
    group = held(div(block[2], a["splits"]))
    split = held(block[2] - group * a["splits"])
    row, column = held(block[1] * tile.rows), held((block[0] - tap * a["col_tiles"]) * tile.columns)
    down = held(div(tap, a["taps_w"]) * a["delta_h"] + a["off_h"])
    right = held(mod(tap, a["taps_w"]) * a["delta_w"] + a["off_w"])
    first = held(split * a["per"])
    count = held(tirx.min(first + a["per"], a["steps"]) - first)
    wide = tile.columns // vector  # tiles are square
    fetches = tile.depth * wide // tile.threads
    beside = mod(thread, wide)
    g_raw, x_raw = (registers(fetches * vector, emit.stored(variant.dtype)) for _ in range(2))
    pixel = variable(first * tile.depth + div(thread, wide))
    below = tile.threads // wide

    def fetch(_: Any) -> None:
        for v in range(fetches):
            p = held(pixel[0] + v * below)
            line = held(div(p, a["OW"]))
            n = held(div(line, a["OH"]))
            i, j = held(line - n * a["OH"]), held(p - line * a["OW"])
            g_at, x_at = div(row, vector) + beside, div(column, vector) + beside
            entry = n * a["gn"] + i * a["gh"] + j * a["gw"] + group * rows + g_at
            emit.take(g_raw, v * vector, a["g"], entry, vector, tirx.all(p < a["pixels"], g_at < rows))
            h, w = held(i * a["mul_h"] + down), held(j * a["mul_w"] + right)
            inside = tirx.all(p < a["pixels"], x_at < cols, h >= 0, h < a["SH"], w >= 0, w < a["SW"])
            entry = n * a["xn"] + h * a["xh"] + w * a["xw"] + group * cols + x_at
            emit.take(x_raw, v * vector, a["x"], entry, vector, inside)
        emit.put(pixel, pixel[0] + tile.depth)

    def stash(at: Any) -> None:
        for v in range(fetches):
            for raw, shared in ((g_raw, gs), (x_raw, xs)):
                for lane in range(vector):
                    value = emit.loaded(raw[v * vector + lane], variant.dtype)
                    shared.put(at + div(thread, wide) + v * below, beside * vector + lane, value)

    def places() -> Iterator[tuple[int, int, Any, Any]]:
        for i in range(tile.height):
            o = held(row + row_of(tile, thread, i))
            base = held(((group * a["rows"] + o) * a["taps"] + tap) * cols)
            for j in range(0, tile.width, vector):
                c = div(column + column_of(tile, thread, j), vector)
                yield i, j, base + c, tirx.all(o < a["rows"], c < cols)

    def update(i: int, j: int, g: Any, x: Any) -> None:
        at = i * tile.width + j
        T.buffer_store(sums, sums[at] + g * emit.slope(x - weights[at], a["sharpness"]), [at])

    gs, xs = (Shared(2 * tile.depth, tile.columns, "float32") for _ in range(2))
    sums, weights = emit.cleared(tile.height * tile.width), registers(tile.height * tile.width)
    for i, j, entry, inside in places():
        emit.take(weights, i * tile.width + j, a["w"], entry, vector, inside)
    pipeline(tile, count, fetch, stash, gs, xs, thread, update)
    for i, j, entry, inside in places():
        with when(inside):
            values = [sums[i * tile.width + j + lane] for lane in range(vector)]
            emit.give(a["y"], split * a["part"] + entry, values, variant.out)
