"""The arithmetic at the end of an integer kernel: vectors of sums become requantised bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from anncvt.runtime.kernels.flat import ramp, splat, spread
from anncvt.runtime.kernels.integer_forms import Form, packed
from anncvt.runtime.kernels.integer_layer import PARAMETERS, IntegerLayer
from anncvt.runtime.kernels.layer import LANES


class End:
    """What ``layer`` makes of its sums. Constants are stored in the order of the sums (``form.lanes`` at a time).

    Attributes:
        pixels: whose 16 channels are narrowed together.
    """

    def __init__(self, layer: IntegerLayer, form: Form, buffers: dict[str, Any]) -> None:
        self.layer, self.form, self.buffers = layer, form, buffers
        self.lanes = form.lanes
        self.pixels = 4 if form.packs and layer.result == "uint8" else 1

    def exact(self, sums: Sequence[Any], constants: Any) -> Any:
        """The int32 result of an int32 layer for consecutive channels of one pixel."""
        total = []
        for i, vector in enumerate(sums):
            base = self._load("base", constants + i * self.lanes).astype(f"{self.form.sums}x{self.lanes}")
            total.append(base - vector if self.layer.mode == "adder" else base + vector)
        return self.form.narrow(total) if self.form.sums == "int64" else self.form.join(total)

    def bytes(self, pixels: Sequence[Sequence[Any]], constants: Any, residuals: Sequence[Any]) -> Any:
        """The bytes of pixels, one after the other (more than one only of 16 channels each, at most :attr:`pixels`).

        Args:
            pixels: of each its vectors of ``sum |x-w|`` or ``sum x*w``; what is missing to that is in ``offset``.
            constants: index of the first channel's constants.
            residuals: of each pixel a vector of uint8, or None.
        """
        values = [self._requantised(*pixel, constants) for pixel in zip(pixels, residuals, strict=True)]
        channels = self.lanes * len(pixels[0])
        count = len(values) * channels
        if self.form.packs and channels == LANES:
            result = packed(values)
        else:
            # Bounds known to the compiler make this a saturating narrowing; the layer's own are applied to bytes.
            result = tirx.max(tirx.min(values[0], splat(255, "int32", count)), splat(0, "int32", count))
            result = result.astype(f"uint8x{count}")
        if not self.layer.clamped:
            return result
        low, high = (tirx.Broadcast(self._parameter(name).astype("uint8"), count) for name in ("low", "high"))
        return tirx.max(tirx.min(result, high), low)

    def _requantised(self, sums: Sequence[Any], residual: Any, constants: Any) -> Any:
        """Shifted totals of one pixel, int32, not yet clamped to bytes."""
        order, shifted = self.form.order(len(sums)), []
        for i, vector in enumerate(sums):
            own = None
            if residual is not None:
                lanes = order[i * self.lanes : (i + 1) * self.lanes]
                own = residual if len(sums) == 1 else tirx.Shuffle([residual], lanes)
                own = own.astype(f"int32x{self.lanes}")
            shifted.append(self._shift(vector, constants + i * self.lanes, own))
        return self.form.join(shifted) if shifted[0].ty.dtype.startswith("int32") else self.form.narrow(shifted)

    def _shift(self, sums: Any, at: Any, residual: Any) -> Any:
        """``(offset + sums*multiplier + residual) >> shift``, int32 or int64; rounding is part of the offset."""
        if self.form.narrows(self.layer):
            return self._narrow(sums, at, residual)
        if self.form.sums != "int64" and self.layer.totals == "short":
            return self._short(sums, at, residual)
        if self.form.packs and self.layer.totals == "long" and self.lanes == LANES:
            return self._alternating(sums, at, residual)
        return self._long(sums, at, residual)

    def _narrow(self, sums: Any, at: Any, residual: Any) -> Any:
        """The upper halves of the constant factors are zero; those of negative sums are not."""
        assert self.form.pairs is not None
        total = self._load("offset", at).astype(f"int32x{self.lanes}")
        if residual is not None:
            total = self.form.pairs(total, residual, self._parameter("residual", self.lanes))
        total = self.form.pairs(total, sums, self._load("multiplier", at))
        return total >> self._parameter("shift", self.lanes)

    def _short(self, sums: Any, at: Any, residual: Any) -> Any:
        kind = f"int32x{self.lanes}"
        total = self._signed(self._load("offset", at).astype(kind), sums * self._load("multiplier", at))
        if residual is not None:
            total = total + residual * self._parameter("residual", self.lanes)
        return total >> self._parameter("shift", self.lanes)

    def _alternating(self, sums: Any, at: Any, residual: Any) -> Any:
        """Even and odd lanes on their own, which 64-bit multiplications take as they lie; two shifts bring the lower
        halves of the totals back to their lanes."""
        offset = self._load("offset", at)
        ends = [tirx.Shuffle([offset], list(range(first, LANES, 2))) for first in (0, 1)]
        factors = [sums, self._load("multiplier", at)]
        totals = [self._signed(end, a * b) for end, a, b in zip(ends, *map(_alternate, factors), strict=True)]
        if residual is not None:
            share = self._parameter("residual", LANES // 2).astype(f"int64x{LANES // 2}")
            totals = [total + own * share for total, own in zip(totals, _alternate(residual), strict=True)]
        even, odd = (T.reinterpret(f"uint64x{LANES // 2}", total) for total in totals)
        shift = self._parameter("shift").astype("uint64")
        even = even >> tirx.Broadcast(shift, LANES // 2)
        odd = odd << tirx.Broadcast(tirx.const(32, "uint64") - shift, LANES // 2)
        parts = [T.reinterpret(f"int32x{LANES}", part) for part in (even, odd)]
        return tirx.Shuffle(parts, [lane + LANES * (lane % 2) for lane in range(LANES)])

    def _long(self, sums: Any, at: Any, residual: Any) -> Any:
        wide = f"int64x{self.lanes}"
        # Both factors come from 32 bits: one multiplication of 32 by 32 bits where the processor has that.
        product = sums.astype(f"int32x{self.lanes}").astype(wide) * self._load("multiplier", at).astype(wide)
        total = self._signed(self._load("offset", at), product)
        if residual is not None:
            total = total + residual.astype(wide) * self._parameter("residual", self.lanes).astype(wide)
        shift = self._parameter("shift").astype("int64")
        if self.layer.totals == "wide":
            value = total >> tirx.Broadcast(shift, self.lanes)
            return tirx.max(tirx.min(value, splat(255, "int64", self.lanes)), splat(0, "int64", self.lanes))
        # The low 32 bits are the same of a logical shift, which more processors have.
        bits = total.astype(f"uint64x{self.lanes}") >> tirx.Broadcast(shift.astype("uint64"), self.lanes)
        return bits.astype(wide)

    def _signed(self, offset: Any, product: Any) -> Any:
        return offset - product if self.layer.mode == "adder" else offset + product

    def _parameter(self, name: str, lanes: int = 1) -> Any:
        return spread(self.buffers["parameters"][PARAMETERS.index(name)], lanes)

    def _load(self, name: str, at: Any) -> Any:
        return self.buffers[name][ramp(at, self.lanes)]


def _alternate(vector: Any) -> tuple[Any, Any]:
    """The even and the odd lanes of an int32 vector, as int64."""
    pairs = T.reinterpret(f"int64x{LANES // 2}", vector)
    half = splat(32, "int64", LANES // 2)
    return (pairs << half) >> half, pairs >> half
