"""What follows a layer in inference, while its sums are in registers: ``clip(scale*y + shift + r, low, high)``.

Scale and shift are of each output channel (a folded BatchNorm), ``r`` is a residual, the limits are those of ReLU or
ReLU6. Arguments ``scale``, ``shift`` ``[O]`` float32; ``r`` like ``y``, not read unless ``added``.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from anncvt.runtime.kernels.cuda import emit
from anncvt.runtime.kernels.cuda.emit import held, mod, registers, when
from anncvt.runtime.kernels.cuda.variant import Variant


def scaled(
    vector: int, a: dict[str, Any], sums: Any, places: list[int], channel: Any, known: Any = None, sign: int = 1
) -> None:
    """In ``sums``, ``vector`` neighbouring channels at each of ``places``: ``shift + sign * scale * sum``.

    Args:
        channel: the entry of ``scale`` and ``shift``.
        known: whether there are such channels; they are if not told.
    """
    known = tirx.const(True, "bool") if known is None else known
    scale, shift = registers(vector), registers(vector)
    for name, line in (("scale", scale), ("shift", shift)):
        emit.take(line, 0, a[name], channel, vector, known)
    for at in places:
        for lane in range(vector):
            change = sums[at + lane] * scale[lane]
            T.buffer_store(sums, shift[lane] + change if sign > 0 else shift[lane] - change, [at + lane])


def finished(variant: Variant, a: dict[str, Any], sums: Any, at: int, entry: Any) -> list[Any]:
    """The results of neighbouring channels, from what :func:`scaled` left of their sums; ``entry`` is that of ``y``."""
    vector = variant.vector
    raw, results = registers(vector, emit.stored(variant.out)), registers(vector)
    emit.take(raw, 0, a["r"], entry, vector, a["added"] > 0)
    for lane in range(vector):
        T.buffer_store(results, sums[at + lane] + emit.loaded(raw[lane], variant.out), [lane])
        # Comparisons, which are false of a NaN: it stays.
        T.buffer_store(results, T.Select(results[lane] < a["low"], a["low"], results[lane]), [lane])
        T.buffer_store(results, T.Select(results[lane] > a["high"], a["high"], results[lane]), [lane])
    return [results[lane] for lane in range(vector)]


def finish(variant: Variant) -> tirx.PrimFunc:
    """``y`` from ``x[split][entry]``, sums in parts, which are added in their order."""

    def body(block: list[Any], thread: Any, **a: Any) -> None:
        vector = variant.vector
        entry = held(block[0] * variant.tile.threads + thread)
        with when(entry < a["entries"]):
            sums, part = emit.cleared(vector), registers(vector)
            with T.serial(a["splits"]) as split:
                emit.take(part, 0, a["x"], split * a["entries"] + entry, vector, tirx.const(True, "bool"))
                for lane in range(vector):
                    T.buffer_store(sums, sums[lane] + part[lane], [lane])
            scaled(vector, a, sums, [0], mod(entry, a["depth"]))
            emit.give(a["y"], entry, finished(variant, a, sums, 0, entry), variant.out)

    return emit.function(variant, dict.fromkeys(variant.pointers, variant.vector), body)
