"""Elementwise work on blocked tensors that no layer in front of it could take into its epilogue."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from anncvt.runtime.kernels.activations import apply, keeps_zero
from anncvt.runtime.kernels.flat import f32, function, store
from anncvt.runtime.kernels.layer import LANES, Activation, blocks

COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "maximum": tirx.max,
    "minimum": tirx.min,
}


@dataclass(frozen=True)
class Elementwise:
    """``y = activation(scale * (x [combine] other) + shift [+ residual])`` on ``[N, C/16, H, W, 16]``.

    ``other`` has the shape of ``x``, or one pixel per channel (``other_pixels`` 1), as squeeze-and-excitation gates do.
    """

    batch: int
    channels: int
    size: tuple[int, int]
    combine: str = ""  # a key of COMBINE; empty: x alone
    other_pixels: int = 0
    affine: bool = True  # False: scale is 1 and shift 0, the kernel takes neither
    residual: bool = False
    activation: Activation = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, blocks(self.channels), *self.size, LANES)


def build(spec: Elementwise) -> tirx.PrimFunc:
    """The kernel: arguments ``x[, other][, scale, shift][, residual], y``."""
    pixels, depth = math.prod(spec.size), blocks(spec.channels)
    shapes = {"x": spec.shape}
    if spec.combine:
        shapes["other"] = spec.shape if spec.other_pixels == pixels else (spec.batch, depth, 1, 1, LANES)
    if spec.affine:
        shapes |= {"scale": (depth, LANES), "shift": (depth, LANES)}
    if spec.residual:
        shapes["residual"] = spec.shape
    shapes["y"] = spec.shape
    clear = spec.channels % LANES and (spec.combine == "div" or not keeps_zero(spec.activation))

    def body(x: Any, y: Any, other: Any = None, scale: Any = None, shift: Any = None, residual: Any = None) -> None:
        with T.parallel(spec.batch * depth) as plane, T.serial(pixels) as pixel:
            at = (plane * pixels + pixel) * LANES
            block = plane % depth

            def value(lane: Any) -> Any:
                result = x[at + lane]
                if other is not None:
                    pair = at if spec.other_pixels == pixels else plane * LANES
                    result = COMBINE[spec.combine](result, other[pair + lane])
                if scale is not None:
                    result = scale[block * LANES + lane] * result + shift[block * LANES + lane]
                if residual is not None:
                    result = result + residual[at + lane]
                result = apply(spec.activation, result)
                if clear:
                    result = tirx.if_then_else(block * LANES + lane < spec.channels, result, f32(0))
                return result

            store(y, at, value)

    return function(shapes, body)
