"""Sums over the windows of an input: what kernels need that add up ``max(x, w)``, since all filters share it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as B

from anncvt.runtime.kernels.flat import ramp, splat, workspace
from anncvt.runtime.kernels.integer_input import Input
from anncvt.runtime.kernels.integer_layer import IntegerLayer

Quads = Callable[[Any, Any], Any]

#: Sums of a vector; vectors that are summed at once, so that none waits for its own last addition.
LANES, AT_ONCE = 16, 4
#: Bytes of one sum of a vector.
QUAD = 4


def window_sums(layer: IntegerLayer, quads: Quads, image: Input, source: Any, base: Any, rows: int, origin: int) -> Any:
    """``-origin - sum x`` over the window of each output pixel, of all copies: ``[groups, rows, output width]`` int32.

    Args:
        layer: the layer.
        quads: see :class:`anncvt.runtime.kernels.integer_forms.Form`.
        image: the input of the work item.
        source, base: where it begins.
        rows: output rows of the work item.
        origin: what the sums are counted from.
    """
    width = layer.out_size[1]
    result = workspace(image.groups * rows * width, "int32")
    with B.serial(image.groups) as group:
        found = _pixel_sums(quads, image, source, base + group * (image.cells.number * image.plane))
        with B.serial(rows) as h, B.serial(width) as w:
            first = h * image.stride[0] * image.width + w * image.stride[1]
            taps = [
                found[first + r * layer.dilation[0] * image.width + s * layer.dilation[1]]
                for r in range(layer.kernel[0])
                for s in range(layer.kernel[1])
            ]
            B.buffer_store(result, -origin - sum(taps[1:], taps[0]) * layer.copies, [(group * rows + h) * width + w])
    return result


def _pixel_sums(quads: Quads, image: Input, source: Any, base: Any) -> Any:
    """Sums over the channels of each pixel of one group."""
    pixels, each = image.rows * image.width, image.cells.pitch // QUAD
    parts = _quads(quads, image, source, base, pixels * each)
    if each == 1:
        return parts
    result = workspace(pixels, "int32")
    with B.serial(pixels) as pixel:
        own = [parts[pixel * each + k] for k in range(each)]
        B.buffer_store(result, sum(own[1:], own[0]), [pixel])
    return result


def _quads(quads: Quads, image: Input, source: Any, base: Any, count: int) -> Any:
    """Sums of four bytes side by side, over all cells: ``count`` of them."""
    result = workspace(count, "int32")
    if count < LANES:
        with B.serial(count) as quad:
            B.buffer_store(result, tirx.const(0, "int32"), [quad])
            with B.serial(image.cells.number) as cell:
                own = [source[base + cell * image.plane + quad * QUAD + k].astype("int32") for k in range(QUAD)]
                B.buffer_store(result, sum(own, result[quad]), [quad])
        return result
    vectors = AT_ONCE if count >= AT_ONCE * LANES else 1
    places = [ramp(v * LANES, LANES) for v in range(vectors)]
    with B.serial(-(-count // (vectors * LANES))) as part:
        first = tirx.min(part * (vectors * LANES), count - vectors * LANES)  # the last one may overlap the one before
        sums = B.alloc_buffer((vectors * LANES,), "int32")
        for place in places:
            B.buffer_store(sums, splat(0, "int32", LANES), [place])
        with B.serial(image.cells.number) as cell:
            at = base + cell * image.plane + first * QUAD
            for v, place in enumerate(places):
                x = source[ramp(at + v * (LANES * QUAD), LANES * QUAD)]
                B.buffer_store(sums, quads(sums[place], x), [place])
        for v, place in enumerate(places):
            B.buffer_store(result, sums[place], [ramp(first + v * LANES, LANES)])
    return result
