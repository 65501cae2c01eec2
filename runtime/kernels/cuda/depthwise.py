"""Generators of the depthwise kernels: each channel meets itself alone, so there is nothing to share in a tile.

A thread computes ``vector`` neighbouring channels of one pixel, in the weight gradient of one tap; neighbours in a warp
are neighbours in memory. Weights are ``[tap][channel]``.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from anncvt.runtime.kernels.cuda import emit
from anncvt.runtime.kernels.cuda.emit import div, held, mod, registers, variable, when
from anncvt.runtime.kernels.cuda.epilogue import finished, scaled
from anncvt.runtime.kernels.cuda.tiles import Shared, sync
from anncvt.runtime.kernels.cuda.variant import LANES, STRIPES, Variant


def depthwise(variant: Variant) -> tirx.PrimFunc:
    """``depthwise_forward``, ``_fused``, ``_dx`` or ``_dw``, with the geometry of the tiled kernels."""
    body = _weight_gradient if variant.kind == "depthwise_dw" else _walk
    lanes = dict.fromkeys(variant.pointers, variant.vector)
    return emit.function(variant, lanes, lambda block, thread, **args: body(variant, block, thread, args))


def _walk(variant: Variant, block: list[Any], thread: Any, a: dict[str, Any]) -> None:
    vector, depth = variant.vector, a["depth"]
    at = held(block[0] * variant.tile.threads + thread)
    m = held(div(at, depth))
    c = held(at - m * depth)
    line = held(div(m, a["PW"]))
    n = held(div(line, a["PH"]))
    i, j = held(line - n * a["PH"]), held(m - line * a["PW"])
    alive = m < a["M"]
    sums, w = emit.cleared(vector), registers(vector)
    raw, values = registers(vector, emit.stored(variant.dtype)), registers(vector)
    place = held(n * a["yn"] + i * a["yh"] + j * a["yw"] + c)
    if variant.kind == "depthwise_dx":
        emit.take(raw, 0, a["r"], place, vector, alive)
        for lane in range(vector):
            T.buffer_store(values, emit.loaded(raw[lane], variant.dtype), [lane])
    with T.serial(a["taps_h"]) as y, T.serial(a["taps_w"]) as x:
        h = held(i * a["mul_h"] + a["off_h"] + y * a["delta_h"])
        v = held(j * a["mul_w"] + a["off_w"] + x * a["delta_w"])
        inside = tirx.all(alive, h >= 0, h < a["SH"], v >= 0, v < a["SW"])
        emit.take(raw, 0, a["x"], n * a["xn"] + h * a["xh"] + v * a["xw"] + c, vector, inside)
        emit.take(w, 0, a["w"], (y * a["taps_w"] + x) * depth + c, vector, alive)
        for lane in range(vector):
            met = emit.loaded(raw[lane], variant.dtype)
            if variant.kind == "depthwise_dx":
                change = met * _centred(w[lane] - values[lane], a["sharpness"])
            else:
                change = tirx.const(0.0, "float32") - T.abs(met - w[lane])
            T.buffer_store(sums, sums[lane] + change, [lane])
    with when(alive):
        if variant.kind == "depthwise_fused":
            scaled(vector, a, sums, [0], c)
            results = finished(variant, a, sums, 0, place)
        else:
            results = [sums[lane] for lane in range(vector)]
        emit.give(a["y"], place, results, variant.out)


def _weight_gradient(variant: Variant, block: list[Any], thread: Any, a: dict[str, Any]) -> None:
    """Blocks are (tap, channels, split); stripes of a block take turns with the pixels and are added at the end."""
    vector, depth = variant.vector, a["depth"]
    lane_at, stripe = mod(thread, LANES), div(thread, LANES)
    c, tap = held(block[1] * LANES + lane_at), block[0]
    down = held(div(tap, a["taps_w"]) * a["delta_h"] + a["off_h"])
    right = held(mod(tap, a["taps_w"]) * a["delta_w"] + a["off_w"])
    first = held(block[2] * a["per"])
    last = held(tirx.min(first + a["per"], a["pixels"]))
    sums, w = emit.cleared(vector), registers(vector)
    g, x = (registers(vector, emit.stored(variant.dtype)) for _ in range(2))
    emit.take(w, 0, a["w"], tap * depth + c, vector, c < depth)
    pixel = variable(first + stripe)
    with T.serial(div(a["per"] + STRIPES - 1, STRIPES)):
        p = held(pixel[0])
        line = held(div(p, a["OW"]))
        n = held(div(line, a["OH"]))
        i, j = held(line - n * a["OH"]), held(p - line * a["OW"])
        alive = tirx.all(p < last, c < depth)
        emit.take(g, 0, a["g"], n * a["gn"] + i * a["gh"] + j * a["gw"] + c, vector, alive)
        h, v = held(i * a["mul_h"] + down), held(j * a["mul_w"] + right)
        inside = tirx.all(alive, h >= 0, h < a["SH"], v >= 0, v < a["SW"])
        emit.take(x, 0, a["x"], n * a["xn"] + h * a["xh"] + v * a["xw"] + c, vector, inside)
        for lane in range(vector):
            difference = emit.loaded(x[lane], variant.dtype) - w[lane]
            change = emit.loaded(g[lane], variant.dtype) * _centred(difference, a["sharpness"])
            T.buffer_store(sums, sums[lane] + change, [lane])
        emit.put(pixel, p + STRIPES)
    shared = Shared(STRIPES, LANES * vector, "float32")
    for lane in range(vector):
        shared.put(stripe, lane_at * vector + lane, sums[lane])
    sync()
    with when(tirx.all(stripe == 0, c < depth)):
        for lane in range(vector):
            for other in range(1, STRIPES):
                T.buffer_store(sums, sums[lane] + shared.get(other, lane_at * vector + lane), [lane])
        place = block[2] * a["part"] + tap * depth + c
        emit.give(a["y"], place, [sums[lane] for lane in range(vector)], variant.out)


def _centred(difference: Any, sharpness: Any) -> Any:
    return tirx.const(2.0, "float32") * emit.slope(difference, sharpness) - tirx.const(1.0, "float32")
