"""Kernels around the layers of an integer network: pixels come in, channels change places, logits go out."""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from anncvt.runtime.kernels.flat import function, ramp, splat, zero
from anncvt.runtime.kernels.integer_forms import call
from anncvt.runtime.kernels.layer import LANES, blocks
from anncvt.runtime.kernels.layout import blocked_shape

#: Bytes that one instruction looks up.
AT_ONCE = 64


def enter(shape: tuple[int, ...], features: tuple[str, ...] = ()) -> tirx.PrimFunc:
    """Pixels as integers on the input's grid: arguments ``x[N, C, H, W], table[C, 256], y``, all uint8 and plain.

    Args:
        shape: of ``x``.
        features: instruction sets that may be used (LLVM's names).
    """
    batch, channels = shape[:2]
    pixels = math.prod(shape[2:])
    at_once = AT_ONCE if "avx512vbmi" in features and pixels >= AT_ONCE else 1

    def body(x: Any, table: Any, y: Any) -> None:
        with T.parallel(batch * channels) as plane, T.serial(-(-pixels // at_once)) as part:
            # The last vector may overlap the one before.
            at = ramp(plane * pixels + tirx.min(part * at_once, pixels - at_once), at_once)
            values = plane % channels * 256
            found = table[values + x[at].astype("int32")] if at_once == 1 else _looked_up(table, values, x[at])
            T.buffer_store(y, found, [at])

    return function({"x": shape, "table": (channels, 256), "y": shape}, body, "uint8")


def _looked_up(table: Any, begin: Any, index: Any) -> Any:
    """``table[begin + index]`` of 64 bytes: each instruction looks in 128 of the 256, by the lower 7 bits."""
    quarters = [table[ramp(begin + quarter * AT_ONCE, AT_ONCE)] for quarter in range(4)]
    low, high = (
        call("llvm.x86.avx512.vpermi2var.qi.512", "uint8x64", first, index, second)
        for first, second in (quarters[:2], quarters[2:])
    )
    return tirx.Select(index < splat(128, "uint8", AT_ONCE), low, high)


def select(shape: tuple[int, ...], count: int, dtype: str) -> tirx.PrimFunc:
    """``y[n, o] = x[n, channels[o]]`` of a blocked ``[N, C, H, W]``: arguments ``x, channels[count] int32, y``."""
    batch, pixels = shape[0], math.prod(shape[2:])
    source, target = blocks(shape[1]), blocks(count)

    def body(x: Any, channels: Any, y: Any) -> None:
        with T.parallel(batch * target) as plane, T.serial(LANES) as lane, T.serial(pixels) as pixel:
            o = plane % target * LANES + lane
            channel = channels[tirx.min(o, count - 1)]
            at = ((plane // target * source + channel // LANES) * pixels + pixel) * LANES + channel % LANES
            value = tirx.if_then_else(o < count, x[at], zero(dtype))
            T.buffer_store(y, value, [(plane * pixels + pixel) * LANES + lane])

    shapes = {"x": blocked_shape(shape), "channels": (count,), "y": blocked_shape((batch, count, *shape[2:]))}
    return function(shapes, body, {"x": dtype, "channels": "int32", "y": dtype})


def flatten(shape: tuple[int, ...]) -> tirx.PrimFunc:
    """A blocked ``[N, C, H, W]`` uint8 as ``[N, C*H*W, 1, 1]``: arguments ``x, y``."""
    batch, depth, pixels = shape[0], blocks(shape[1]), math.prod(shape[2:])
    count = math.prod(shape[1:])

    def body(x: Any, y: Any) -> None:
        with T.parallel(batch) as image, T.serial(blocks(count) * LANES) as o:
            channel, pixel = o // pixels, o % pixels
            at = ((image * depth + channel // LANES) * pixels + pixel) * LANES + channel % LANES
            value = tirx.if_then_else(o < count, x[at], zero("uint8"))
            T.buffer_store(y, value, [image * (blocks(count) * LANES) + o])

    return function({"x": blocked_shape(shape), "y": blocked_shape((batch, count, 1, 1))}, body, "uint8")


def logits(batch: int, count: int, residual: bool) -> tirx.PrimFunc:
    """Sums become logits: ``clamp((x*multiplier + offset [+ r*scale]) >> shift, low, high)`` in int64, per class.

    Arguments: ``x`` blocked int32 of one pixel; ``multiplier, offset [count]`` int64 (rounding is part of the offset);
    ``parameters`` int64: shift, low, high, scale; with ``residual`` a blocked uint8; ``y[batch, count]`` int32.
    """
    depth = blocks(count) * LANES

    def body(x: Any, multiplier: Any, offset: Any, parameters: Any, y: Any, residual: Any = None) -> None:
        with T.parallel(batch) as image, T.serial(count) as o:
            total = x[image * depth + o].astype("int64") * multiplier[o] + offset[o]
            if residual is not None:
                total = total + residual[image * depth + o].astype("int64") * parameters[3]
            value = tirx.max(tirx.min(total >> parameters[0], parameters[2]), parameters[1])
            T.buffer_store(y, value.astype("int32"), [image * count + o])

    source = (batch, depth // LANES, 1, 1, LANES)
    shapes: dict[str, tuple[int, ...]] = {"x": source, "multiplier": (count,), "offset": (count,), "parameters": (4,)}
    shapes |= {"residual": source} if residual else {}
    kinds = {**dict.fromkeys(shapes, "int64"), "x": "int32", "residual": "uint8", "y": "int32"}
    return function({**shapes, "y": (batch, count)}, body, kinds)
