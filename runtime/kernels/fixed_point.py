"""Inference kernels of adder layers in 16-bit fixed point: floats in and out, twice the speed of float32.

A layer's weights span a range ``[low, high]`` (with 0 in it), which 65533 steps ``s`` cut evenly. Of a value ``x`` only
the part ``c`` inside the range has to meet the weights; the rest is the same for all of them::

    |x - w| = |c - w| + |x - c|,   c = min(max(x, low), high)

so that no range of the activations is needed, and values far outside are exact. With ``C = round(c/s)`` and
``W = round(w/s)`` in 16 bits, ``|C-W| = 2*max(C,W) - C - W`` and 32-bit sums, two taps are one instruction each::

    -sum |x-w|  =  sum (s*C - |x-c|)  -  2*s * sum max(C,W)  +  s * sum W

The first sum belongs to the patch and is shared by all output channels, the last is a constant. Rounding changes a tap
by up to ``s``, about 1e-4 of the weights' standard deviation, and in sums those errors average out.

The native library of onnxruntime has :func:`suitable` and :func:`pack` in C (``runtime/ort/fixed.c``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script import tirx as S
from tvm.tirx.script.builder import ir as T

from anncvt.errors import AnncvtError
from anncvt.runtime.kernels.flat import function, prefetch
from anncvt.runtime.kernels.inference import STREAM_BYTES, Item, Kernel, Tile, per_lane
from anncvt.runtime.kernels.integer_forms import Form, call, repeat
from anncvt.runtime.kernels.integer_output import ramp, splat
from anncvt.runtime.kernels.layer import LANES, Layer, blocks
from anncvt.runtime.kernels.tiling import Tiling, tiling

#: Steps on either side of the middle of the range; one is left for the rounding of its ends.
HALF = 32766
#: Taps of one output (channels that are added to fill a block included) whose maxima fit 32 bits.
MOST_TAPS = 1 << 16
#: Weights whose range is more than so many times their mean deviation lose digits: their layer stays in floats.
MOST_SPREAD = 64.0
#: Added to a float below 2^22, it leaves the nearest integer in the low bits.
MAGIC = 1.5 * 2.0**23
#: The kernel's ``range``: ends, steps per unit, what moves a number of steps to its integer, a step, twice that.
RANGE = ("low", "high", "steps", "move", "step", "twice")


def form_of(architecture: str, features: tuple[str, ...]) -> Form | None:
    """The instructions for two taps of ``lanes`` output channels; None: nothing is known to be faster than floats."""
    if architecture != "x86_64":
        return None
    if "avx512vnni" in features:
        return _form(16, 16, 2, lambda sums, maxima, ones: call(_VNNI, "int32x16", sums, maxima, ones))
    if "avx512bw" in features:
        return _form(16, 14, 2, lambda sums, maxima, ones: sums + call(_PAIRS_512, "int32x16", maxima, ones))
    if "avx2" in features:
        return _form(8, 5, 1, lambda sums, maxima, ones: sums + call(_PAIRS_256, "int32x8", maxima, ones))
    return None


_VNNI = "llvm.x86.avx512.vpdpwssd.512"
_PAIRS_512, _PAIRS_256 = "llvm.x86.avx512.pmaddw.d.512", "llvm.x86.avx2.pmadd.wd"


def _form(lanes: int, registers: int, vectors: int, add: Callable[[Any, Any, Any], Any]) -> Form:
    """``registers``: blocks of 16 sums that a tile may have; ``vectors``: of which a pixel's are so many."""

    def step(sums: Any, x: Any, w: Any) -> Any:
        return add(sums, tirx.max(w, repeat(x, lanes)), splat(1, "int16", 2 * lanes))

    return Form("fixed", lanes, 2, registers, vectors, step, source="int16", weight="int16")


def chosen(fixed: bool | None, architecture: str, features: tuple[str, ...]) -> bool:
    """Whether layers that suit it are computed in fixed point on a processor.

    Args:
        fixed: what a user asked for. None: where it takes about half the time of floats, which is with AVX-512; what
            AVX2 gains, a tenth, is not worth the digits unasked.
        architecture, features: of the processor. Where :func:`form_of` has nothing for it, the answer is no.
    """
    form = form_of(architecture, features)
    if form is None:
        return False
    return form.lanes == LANES if fixed is None else fixed


def refusal(target: str) -> AnncvtError:
    """What to say where :func:`form_of` has nothing for a target that a user chose."""
    return AnncvtError(
        f"{target} has no instructions that make 16-bit fixed point faster than floats (AVX2 has)",
        where="compile",
        fix="compile without it, or the integers that `anncvt quantize` makes",
    )


def possible(layer: Layer, architecture: str, features: tuple[str, ...]) -> bool:
    """Whether fixed point has a kernel for a layer of mode ``"max"`` on a processor."""
    if layer.mode != "max" or layer.per_lane or not layer.blocked or form_of(architecture, features) is None:
        return False
    return blocks(layer.in_channels // layer.groups) * LANES * math.prod(layer.kernel) <= MOST_TAPS


def suitable(layer: Layer, weight: np.ndarray, architecture: str, features: tuple[str, ...]) -> bool:
    """Whether a layer of mode ``"max"`` is better computed in fixed point, and loses nothing that matters.

    Args:
        layer: the layer.
        weight: ``[O, C/groups, kh, kw]``.
        architecture, features: of the processor.
    """
    low, high = _ends(weight)
    deviation = float(np.abs(weight - weight.mean(dtype=np.float64)).mean(dtype=np.float64))
    return possible(layer, architecture, features) and 0 < high - low <= MOST_SPREAD * deviation


def _ends(weight: np.ndarray) -> tuple[float, float]:
    return min(float(weight.min()), 0.0), max(float(weight.max()), 0.0)


def pack(layer: Layer, weight: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, ...]:
    """The kernel's constants; arguments as of :func:`anncvt.runtime.kernels.inference.pack`.

    Returns:
        int16 ``[O/16, C/16, kh, kw, 8, 32]`` (pairs of input channels, output lanes), float32 ``[O/16, 16]`` twice
        (scale, shift), float32 ``[6]`` (:data:`RANGE`).
    """
    out, depth, kh, kw = weight.shape
    low, high = _ends(weight)
    step = float(np.float32((high - low) / (2 * HALF)))
    middle = round((low + high) / 2 / step)  # in steps: zero is a whole number of them
    full = np.zeros((blocks(out) * LANES, blocks(depth) * LANES, kh, kw))
    full[:out, :depth] = weight
    steps = np.clip(np.rint(full / step) - middle, -HALF - 1, HALF + 1)
    # Lanes and pixels that are added count like any others: their value is 0, and so is their weight.
    constant = step * (steps + middle).sum((1, 2, 3)) - 2 * step * middle * steps[0].size
    packed = steps.reshape(-1, LANES, blocks(depth), LANES // 2, 2, kh, kw).transpose(0, 2, 5, 6, 3, 1, 4)
    ends = [(middle + side * HALF) * step for side in (-1, 1)]
    values = np.array([*ends, 1 / step, MAGIC - middle, step, 2 * step], np.float32)
    return (
        np.ascontiguousarray(packed, np.int16).reshape(*packed.shape[:5], -1),
        per_lane(scale, len(full)),
        per_lane(shift.astype(np.float64) + scale * constant[:out], len(full)),
        values,
    )


def build(layer: Layer, cut: Tiling, form: Form) -> tirx.PrimFunc:
    """The kernel: arguments ``x, weight, scale, shift, range[, residual], y`` (:func:`pack`, :class:`Layer`)."""
    return _FixedPoint(layer, cut, form).function()


def generate(layer: Layer, architecture: str, features: tuple[str, ...]) -> tirx.PrimFunc:
    """:func:`build` for a processor with these instruction sets, which have a form (:func:`suitable`)."""
    form = form_of(architecture, features)
    assert form is not None
    return build(layer, tiling(layer, form.registers, vectors=form.vectors), form)


class _FixedPoint(Kernel):
    def __init__(self, layer: Layer, cut: Tiling, form: Form) -> None:
        super().__init__(layer, cut, assembly=False)
        self.form = form

    def function(self) -> tirx.PrimFunc:
        shapes = self._shapes()
        shapes["weight"] = (self.out, self.dense_blocks, *self.layer.kernel, LANES // 2, 2 * LANES)
        ends: dict[str, tuple[int, ...]] = {key: shapes.pop(key) for key in ("residual", "y") if key in shapes}
        shapes |= {"range": (len(RANGE),)}
        shapes |= ends
        return function(shapes, self._body, dict.fromkeys(shapes, "float32") | {"weight": self.form.weight})

    def _body(
        self, x: Any, weight: Any, scale: Any, shift: Any, y: Any, residual: Any = None, range: Any = None
    ) -> None:
        self.range = range
        super()._body(x, weight, scale, shift, y, residual)

    def _input(self, image: Any, row: Any) -> tuple[Any, Any]:
        """Where the integers of a work item will be; :meth:`_patch_sums` writes them."""
        return T.alloc_buffer((self.in_blocks * self.plane,), self.form.source), tirx.const(0, "int32")

    def _patch_sums(self, work: Item) -> None:
        """Besides, the input becomes integers: each value is read once."""
        layer, rows, per_group = self.layer, self.in_rows, self.in_blocks // self.sum_groups
        cells = T.alloc_buffer((self.in_width * LANES,), "float32")
        line = T.alloc_buffer((self.in_width,), "float32")
        with T.serial(self.sum_groups) as g, T.serial(rows) as h:
            source_row = work.row * layer.stride[0] + h * self.picked[0] - layer.padding.top
            inside = tirx.all(source_row >= 0, source_row < layer.size[0])
            with T.serial(self.in_width) as w:
                T.buffer_store(cells, splat(0, "float32", LANES), [ramp(w * LANES, LANES)])
            with T.serial(per_group) as b, T.serial(self.in_width) as w:
                column = w * self.picked[1] - layer.padding.left
                block = g * per_group + b
                plane = work.image * self.in_blocks + block
                at = ((plane * layer.size[0] + source_row) * layer.size[1] + column) * LANES
                target = ramp(block * self.plane + (h * self.in_width + w) * LANES, LANES)
                with T.If(tirx.all(inside, column >= 0, column < layer.size[1])):
                    with T.Then():
                        self._convert(work.source, target, cells, w, self.x[ramp(at, LANES)])
                    with T.Else():
                        self._integers(work.source, target, splat(0, "float32", LANES))
            with T.serial(self.in_width) as w:
                self._sum_cells(cells, line, w)
            self._sum_columns(work, line, g, h)

    def _convert(self, copy: Any, target: Any, cells: Any, w: Any, x: Any) -> None:
        """Store 16 values ``x`` as integers, and add what is left of them to their column's sums."""
        inside = tirx.min(tirx.max(x, self._constant("low")), self._constant("high"))
        moved = self._integers(copy, target, inside)
        value = (moved - self._constant("move")) * self._constant("step") - tirx.abs(x - inside)
        own = ramp(w * LANES, LANES)
        T.buffer_store(cells, cells[own] + value, [own])

    def _integers(self, copy: Any, target: Any, inside: Any) -> Any:
        """Store the integers of 16 values inside the range; returns them as floats, moved."""
        moved = inside * self._constant("steps") + self._constant("move")
        T.buffer_store(copy, S.reinterpret(f"int32x{LANES}", moved).astype(f"int16x{LANES}"), [target])
        return moved

    def _constant(self, name: str) -> Any:
        return tirx.Broadcast(self.range[RANGE.index(name)], LANES)

    def _accumulator(self, begin: Callable[[Any], Any]) -> Any:
        accumulator = T.alloc_buffer((self.size,), "int32")
        for first in range(0, self.size, LANES):
            T.buffer_store(accumulator, splat(0, "int32", LANES), [ramp(first, LANES)])
        return accumulator

    def _taps(self, totals: Any, work: Item, o: Any, tile: Tile, first: Any, count: Any) -> None:
        layer, (kh, kw), vectors, lanes = self.layer, self.layer.kernel, self.cut.vectors, self.form.lanes
        panel, operand = self._panel(), 2 * LANES
        with T.serial(count) as step, T.serial(kh) as r, T.serial(kw) as s:
            weights, origin = self._block(work, o, tile, first + step)
            weights = weights + (r * kw + s) * LANES * LANES
            origin = origin + (r * layer.dilation[0] * self.in_width + s * layer.dilation[1]) * LANES
            pairs = [(v, c) for v in range(vectors) for c in range(LANES // 2)]
            if self.out * panel * 2 > STREAM_BYTES:
                for v, c in pairs:
                    prefetch(self.weight, weights + (vectors + v) * panel + c * operand)
            for c in range(LANES // 2):
                for i, j in np.ndindex(self.cut.height, self.cut.width):
                    pixel = origin + (i * self.stride[0] * self.in_width + j * self.stride[1]) * LANES
                    x = work.source[ramp(pixel + 2 * c, 2)]
                    for v, lane in itertools.product(range(vectors), range(0, LANES, lanes)):
                        w = self.weight[ramp(weights + v * panel + c * operand + 2 * lane, 2 * lanes)]
                        at = ramp(self._kept(i, j, v) + lane, lanes)
                        T.buffer_store(totals, self.form.step(totals[at], x, w), [at])

    def _total(self, kept: Any) -> Any:
        return kept.astype("float32") * self.range[RANGE.index("twice")]
