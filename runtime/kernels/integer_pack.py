"""The constants of an integer kernel: weights in the order they are read, and what turns sums into results."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anncvt.errors import AnncvtError
from anncvt.runtime.kernels.integer import cells_of
from anncvt.runtime.kernels.integer_forms import ORIGIN, Form
from anncvt.runtime.kernels.integer_layer import IntegerLayer, totals
from anncvt.runtime.kernels.integer_tiling import IntegerTiling, panels_of

#: Taps of one output whose sums, twice over, fit int32.
MOST_TAPS = 1 << 22


@dataclass(frozen=True)
class Requantisation:
    """``y = clamp((t + 2^(shift-1)) >> shift, low, high)``, ``t = sum*multiplier + offset [+ r*residual]``, in int64.

    Zero points of the output and of the residual are part of ``offset``.
    """

    multiplier: np.ndarray  # int32 [O]
    offset: np.ndarray  # int64 [O]
    shift: int  # 1..31
    low: int = 0
    high: int = 255
    residual: int = 0  # int32

    def __post_init__(self) -> None:
        if not 1 <= self.shift <= 31 or not 0 <= self.low <= self.high <= 255:
            raise AnncvtError(
                f"shift {self.shift}, range {self.low}..{self.high}",
                where="requantisation",
                fix="give a shift of 1 to 31 and a range within 0..255",
            )

    @property
    def narrow(self) -> bool:
        """Whether the range is less than that of uint8."""
        return (self.low, self.high) != (0, 255)


def check(weight: np.ndarray, zero: int) -> None:
    """Whether the sums fit int32 and the zero point uint8.

    Raises:
        AnncvtError: they do not.
    """
    if not 0 <= zero <= 255:
        raise AnncvtError(f"zero point {zero}", where="integer layer", fix="give one of 0..255")
    taps = weight[0].size
    if taps > MOST_TAPS:
        raise AnncvtError(
            f"{taps} taps, at most {MOST_TAPS} can be added up", where="integer layer", fix="keep this layer in float32"
        )


def totals_of(mode: str, weight: np.ndarray, end: Requantisation) -> str:
    """How long the totals of a layer may become, see :class:`anncvt.runtime.kernels.integer_layer.IntegerLayer`.

    Raises:
        AnncvtError: what is shifted may not fit int64.
    """
    taps = weight[0].size
    factor = int(np.abs(weight.astype(np.int64)).reshape(len(weight), -1).sum(1).max()) if mode == "conv" else taps
    multiplier = max(abs(int(m)) for m in end.multiplier)
    bias = max(abs(int(b)) for b in end.offset)
    if 2 * 255 * factor * multiplier + bias + 255 * abs(end.residual) + (1 << end.shift) >= 1 << 63:
        raise AnncvtError("the result before the shift may not fit int64", where="requantisation", fix="scale it down")
    return totals(factor, multiplier, bias, end.residual, end.shift)


def narrow(mode: str, weight: np.ndarray, end: Requantisation) -> bool:
    """Whether the sums of a layer, and what they are multiplied by, fit 16 bits, see the class
    :class:`anncvt.runtime.kernels.integer_layer.IntegerLayer`."""
    largest = np.maximum(2 * weight.astype(np.int64), 255).reshape(len(weight), -1).sum(1).max()
    factors = max(int(np.abs(end.multiplier.astype(np.int64)).max()), abs(end.residual))
    return mode == "adder" and bool(largest < 1 << 16) and factors < 1 << 15


def pack_weight(layer: IntegerLayer, form: Form, cut: IntegerTiling, weight: np.ndarray) -> np.ndarray:
    """``[O, copies*C/groups, kh, kw]`` as ``[panels, cells, kh, kw, steps, lanes...]``; what is added is zero."""
    cells = cells_of(layer, form)
    panels, together = panels_of(layer, form, cut.vectors), form.together or form.group
    if cells.columns != layer.kernel[1]:  # cells span the columns
        weight = weight.transpose(0, 3, 1, 2).reshape(layer.out_channels, -1, layer.kernel[0], 1)
    weight = weight.reshape(layer.groups, layer.filters, layer.copies, -1, *weight.shape[2:])
    if layer.doubling:  # one of each, those that count most first
        weight = weight[:, :, [2**k - 1 for k in reversed(range(layer.reads))]]
    *_, depth, kh, kw = weight.shape
    outputs, channels = panels * cut.vectors * form.lanes, cells.number * cells.size
    full = np.zeros((layer.groups, outputs, layer.reads, channels, kh, kw), form.weight)
    full[:, : layer.filters, :, :depth] = weight
    full = _ordered(full, form, cut)
    steps = (layer.reads * cells.number, cells.size // form.group)
    split = full.reshape(layer.groups * panels, cut.vectors, form.lanes, *steps, -1, together, kh, kw)
    packed = split.transpose(0, 3, 7, 8, 4, 1, 5, 2, 6)
    return np.ascontiguousarray(packed).reshape(*packed.shape[:5], -1)


def pack_constants(
    layer: IntegerLayer, form: Form, cut: IntegerTiling, weight: np.ndarray, zero: int, end: Requantisation | None
) -> list[np.ndarray]:
    """``multiplier`` and ``offset``, or ``base``, and ``parameters``.

    Args:
        layer, form, cut: what the kernel was built with.
        weight: ``[O, C/groups, kh, kw]``.
        zero: value of a padded pixel; zero point of the input of a convolution.
        end: None for an int32 result.
    """
    sums = weight.astype(np.int64).reshape(len(weight), -1).sum(1)
    correction = np.zeros_like(sums)
    if form.maxima:
        correction = sums
    elif layer.mode == "conv" and form.source == "uint8":
        correction = -zero * sums
    lanes = panels_of(layer, form, cut.vectors) * cut.vectors * form.lanes

    def spread(values: np.ndarray, dtype: str) -> np.ndarray:
        full = np.zeros((layer.groups, lanes), dtype)
        full[:, : layer.filters] = values.reshape(layer.groups, layer.filters)
        return _ordered(full, form, cut).reshape(-1)

    if end is None:
        return [spread(correction, "int32"), np.array([zero, 0, 0, 0, 0], np.int32)]
    multiplier = end.multiplier.astype(np.int64)
    narrows = form.narrows(layer)
    correction = correction - ORIGIN * narrows
    offset = end.offset.astype(np.int64) + correction * multiplier + (1 << (end.shift - 1))
    if narrows:  # products are added, and the upper halves are no factors
        multiplier = -multiplier & 0xFFFF
    parameters = np.array([zero, end.shift, end.low, end.high, end.residual], np.int32)
    return [spread(multiplier, "int32"), spread(offset, "int64"), parameters]


def _ordered(values: np.ndarray, form: Form, cut: IntegerTiling) -> np.ndarray:
    """``[groups, outputs, ...]`` in the order of the lanes that sum them."""
    panels = values.reshape(values.shape[0], -1, cut.vectors * form.lanes, *values.shape[2:])
    return panels[:, :, form.order(cut.vectors)].reshape(values.shape)
