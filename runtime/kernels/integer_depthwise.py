"""Depthwise integer kernels: the 16 channels of a block are the lanes and meet only their own weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as B

from anncvt.runtime.kernels.flat import function, ramp, splat
from anncvt.runtime.kernels.integer_forms import Form
from anncvt.runtime.kernels.integer_input import Cells, Input
from anncvt.runtime.kernels.integer_layer import IntegerLayer
from anncvt.runtime.kernels.integer_output import DTYPES, Output, arguments
from anncvt.runtime.kernels.integer_tiling import IntegerTiling, spans
from anncvt.runtime.kernels.layer import LANES, blocks

#: Absolute differences of bytes that can be added up in 16 bits.
SHORT_TAPS = 65535 // 255
#: Output pixels of a register tile.
PIXELS = 4
#: One block of channels after the other, for as many rows as :data:`ITEM_BYTES` allow.
CUT = IntegerTiling(rows=0, panels=1, height=1, width=PIXELS, vectors=1)
#: Bytes of input of a work item.
ITEM_BYTES = 32 << 10


def form_of(layer: IntegerLayer, features: tuple[str, ...]) -> Form:
    """One channel per step: widened differences of bytes, or products of 16 bits.

    Args:
        layer: a depthwise layer.
        features: instruction sets (LLVM's names).
    """
    packs = "avx512bw" in features
    if layer.mode == "conv":
        return Form("depthwise", LANES, 1, PIXELS, 1, _product, source="int16", weight="int16", packs=packs)
    short = layer.kernel[0] * layer.kernel[1] <= SHORT_TAPS
    return Form("depthwise", LANES, 1, PIXELS, 1, _difference, sums="uint16" if short else "int32", packs=packs)


def build(layer: IntegerLayer, form: Form) -> tirx.PrimFunc:
    """The kernel, for any batch; arguments: see :meth:`anncvt.runtime.kernels.integer_plan.Plan.build`."""
    batch = tirx.Var("n", "int32")
    planes = blocks(layer.out_channels)
    shapes = {"x": (batch, *layer.in_shape), "weight": (planes, 1, *layer.kernel, 1, LANES)}
    shapes = arguments(layer, shapes, planes * LANES, batch)
    dtypes = {**DTYPES, "weight": form.weight, "y": layer.result}
    return function(shapes, lambda **buffers: _emit(layer, form, batch, buffers), dtypes)


def pack_weight(layer: IntegerLayer, form: Form, weight: np.ndarray) -> np.ndarray:
    """``[C, 1, kh, kw]`` as ``[blocks, 1, kh, kw, 1, 16]``."""
    full = np.zeros((blocks(layer.out_channels) * LANES, *layer.kernel), form.weight)
    full[: layer.out_channels] = weight[:, 0]
    split = full.reshape(-1, 1, LANES, 1, *layer.kernel)
    return np.ascontiguousarray(split.transpose(0, 1, 4, 5, 3, 2))


def weight_cells(layer: IntegerLayer) -> Cells:
    """How the input channels of a filter, which is one, lie in its weights."""
    return Cells(1, 1, 1, 1, layer.kernel[1])


def _rows(layer: IntegerLayer) -> int:
    """Output rows of one work item."""
    height = layer.out_size[0]
    limit = max(1, ITEM_BYTES // (layer.size[1] * LANES * layer.stride[0]))
    return max(rows for rows in range(1, height + 1) if rows <= limit and (height % rows == 0 or rows == 1))


def _emit(layer: IntegerLayer, form: Form, batch: Any, buffers: dict[str, Any]) -> None:
    planes, rows = blocks(layer.out_channels), _rows(layer)
    height, width = layer.out_size
    row_blocks = -(-height // rows)
    source = Input(layer, form.source, Cells(LANES, 1, LANES, LANES, layer.kernel[1]), rows, 1)
    output = Output(layer, form, buffers)
    with B.parallel(batch * (planes * row_blocks)) as item:
        image, plane = item // (planes * row_blocks), item // row_blocks % planes
        row = item % row_blocks * rows
        x, base = source.read(buffers["x"], buffers["parameters"], image, row, plane)
        with B.serial(rows) as h:
            for start, count, pixels in spans(width, PIXELS):
                with B.serial(count) as tile:
                    left = start + tile * pixels
                    sums = B.alloc_buffer((pixels * LANES,), form.sums)
                    for p in range(pixels):
                        B.buffer_store(sums, splat(0, form.sums, LANES), [ramp(p * LANES, LANES)])
                    _taps(layer, form, source, sums, x, base, buffers["weight"], plane, h, left, pixels)
                    totals = [[sums[ramp(p * LANES, LANES)].astype(f"int32x{LANES}")] for p in range(pixels)]
                    at = output.address(image, plane, row + h, left)
                    output.store(totals, plane * LANES, plane * LANES, at)


def _taps(
    layer: IntegerLayer,
    form: Form,
    source: Input,
    sums: Any,
    x: Any,
    base: Any,
    weight: Any,
    plane: Any,
    row: Any,
    left: Any,
    pixels: int,
) -> None:
    kh, kw = layer.kernel
    with B.serial(kh) as r, B.serial(kw) as s:
        w = weight[ramp(((plane * kh + r) * kw + s) * LANES, LANES)]
        line = (row * source.stride[0] + r * layer.dilation[0]) * source.width
        for p in range(pixels):
            column = (left + p) * source.stride[1] + s * layer.dilation[1]
            own = x[ramp(base + (line + column) * LANES, LANES)]
            at = [ramp(p * LANES, LANES)]
            B.buffer_store(sums, form.step(sums[at[0]], own, w), at)


def _difference(sums: Any, x: Any, w: Any) -> Any:
    return sums + (tirx.max(w, x) - tirx.min(w, x)).astype(sums.ty.dtype)


def _product(sums: Any, x: Any, w: Any) -> Any:
    return sums + x.astype(f"int32x{LANES}") * w.astype(f"int32x{LANES}")
