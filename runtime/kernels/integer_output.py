"""The end of an integer kernel: vectors of sums become the layer's result and are stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from anncvt.runtime.kernels.integer_forms import Form
from anncvt.runtime.kernels.integer_layer import PARAMETERS, IntegerLayer
from anncvt.runtime.kernels.layer import LANES, blocks

#: Of the arguments of a kernel (those of ``weight`` and ``y`` depend on it).
DTYPES = {
    "x": "uint8",
    "multiplier": "int32",
    "offset": "int64",
    "base": "int32",
    "parameters": "int32",
    "residual": "uint8",
}


def arguments(
    layer: IntegerLayer, shapes: dict[str, tuple[Any, ...]], lanes: int, batch: Any
) -> dict[str, tuple[Any, ...]]:
    """``shapes`` and those of the arguments that turn sums into results: ``lanes`` of each constant."""
    constants = ("multiplier", "offset") if layer.result == "uint8" else ("base",)
    shapes = {**shapes, **dict.fromkeys(constants, (lanes,)), "parameters": (len(PARAMETERS),)}
    ends = ("residual", "y") if layer.residual else ("y",)
    return {**shapes, **dict.fromkeys(ends, (batch, *layer.out_shape))}


class Output:
    """The result of ``layer``. Constants are stored in the order of the sums (``lanes`` at a time).

    Args:
        layer: the layer.
        form: how the sums are computed.
        buffers: the kernel's flat arguments by name.
    """

    def __init__(self, layer: IntegerLayer, form: Form, buffers: dict[str, Any]) -> None:
        self.layer, self.form, self.buffers = layer, form, buffers
        self.lanes = form.lanes
        self.y = buffers["y"]
        self.planes = blocks(layer.out_channels)

    def address(self, image: Any, block: Any, row: Any, column: Any) -> Any:
        """Where the 16 channels ``block`` of an output pixel are."""
        height, width = self.layer.out_size
        return (((image * self.planes + block) * height + row) * width + column) * LANES

    def store(self, sums: Sequence[Any], constants: Any, channel: Any, at: Any) -> None:
        """Store the result for consecutive channels of one block.

        Args:
            sums: vectors of ``sum |x-w|`` or ``sum x*w``; what is missing to that is in ``offset`` or ``base``.
            constants: index of the first channel's constants.
            channel: number of the first channel.
            at: its place in ``y``, and in ``residual``.
        """
        count = self.lanes * len(sums)
        residual = self._load("residual", at, count) if self.layer.residual else None
        value = self._masked(self._value(sums, constants, residual), channel, count)
        B.buffer_store(self.y, value, [ramp(at, count)])

    def scatter(self, sums: Sequence[Any], constants: Any, channel: Any, valid: Any, at: Any, plane: Any) -> None:
        """Store the first ``valid`` of consecutive channels that share blocks with other groups.

        Args:
            sums, constants, channel: see :meth:`store`.
            valid: how many channels there are.
            at: place of the pixel in block 0; the other blocks are ``plane`` further each.
        """
        count = self.lanes * len(sums)

        def place(lane: Any) -> Any:
            return at + (channel + lane) // LANES * plane + (channel + lane) % LANES

        residual = None
        if self.layer.residual:
            gathered = B.alloc_buffer((count,), "uint8")
            for lane in range(count):
                inside = tirx.const(lane, "int32") < valid
                B.buffer_store(
                    gathered, T.if_then_else(inside, self.buffers["residual"][place(lane)], T.uint8(0)), [lane]
                )
            residual = gathered[ramp(0, count)]
        value = self._value(sums, constants, residual)
        staged = B.alloc_buffer((count,), self.layer.result)
        B.buffer_store(staged, value, [ramp(0, count)])
        for lane in range(count):
            with B.If(tirx.const(lane, "int32") < valid), B.Then():
                B.buffer_store(self.y, staged[lane], [place(lane)])

    def clear(self, image: Any, row: Any, column: Any, first: int) -> None:
        """Zero the lanes of one output pixel from channel ``first`` to the end of the last block."""
        for lane in range(first, self.planes * LANES):
            at = self.address(image, lane // LANES, row, column) + lane % LANES
            B.buffer_store(self.y, tirx.const(0, self.layer.result), [at])

    def _value(self, sums: Sequence[Any], constants: Any, residual: Any) -> Any:
        count, form = self.lanes * len(sums), self.form
        parts = [constants + i * self.lanes for i in range(len(sums))]
        if self.layer.result == "int32":
            total = [self._exact(vector, at) for vector, at in zip(sums, parts, strict=True)]
            return form.narrow(total) if form.sums == "int64" else form.join(total)
        order = form.order(len(sums))
        shifted = []
        for i, (vector, at) in enumerate(zip(sums, parts, strict=True)):
            own = None
            if residual is not None:
                own = tirx.Shuffle([residual], order[i * self.lanes : (i + 1) * self.lanes])
            shifted.append(self._shifted(vector, at, own))
        # Bounds known to the compiler make this a saturating narrowing; the layer's own are applied to bytes.
        value = form.narrow(shifted)
        value = tirx.max(tirx.min(value, splat(255, "int32", count)), splat(0, "int32", count)).astype(f"uint8x{count}")
        if not self.layer.clamped:
            return value
        low, high = (tirx.Broadcast(self._parameter(name).astype("uint8"), count) for name in ("low", "high"))
        return tirx.max(tirx.min(value, high), low)

    def _exact(self, sums: Any, at: Any) -> Any:
        base = self._load("base", at, self.lanes).astype(f"{self.form.sums}x{self.lanes}")
        return base - sums if self.layer.mode == "adder" else base + sums

    def _shifted(self, sums: Any, at: Any, residual: Any) -> Any:
        """int64 ``(offset + sums*multiplier + residual) >> shift``; rounding is part of the offset."""
        narrow, wide = f"int32x{self.lanes}", f"int64x{self.lanes}"
        # Both factors come from 32 bits: one multiplication of 32 by 32 bits where the processor has that.
        product = sums.astype(narrow).astype(wide) * self._load("multiplier", at, self.lanes).astype(wide)
        offset = self._load("offset", at, self.lanes)
        total = offset - product if self.layer.mode == "adder" else offset + product
        if residual is not None:
            scale = tirx.Broadcast(self._parameter("residual").astype("int64"), self.lanes)
            total = total + residual.astype(narrow).astype(wide) * scale
        shift = self._parameter("shift").astype("int64")
        if self.layer.wide:
            value = total >> tirx.Broadcast(shift, self.lanes)
            return tirx.max(tirx.min(value, splat(255, "int64", self.lanes)), splat(0, "int64", self.lanes))
        # The low 32 bits are the same of a logical shift, which more processors have.
        bits = total.astype(f"uint64x{self.lanes}") >> tirx.Broadcast(shift.astype("uint64"), self.lanes)
        return bits.astype(wide)

    def _masked(self, value: Any, channel: Any, count: int) -> Any:
        """Zero beyond the last channel."""
        if self.layer.out_channels % count == 0:
            return value
        inside = tirx.Ramp(channel, 1, count) < splat(self.layer.out_channels, "int32", count)
        return T.Select(inside, value, splat(0, self.layer.result, count))

    def _parameter(self, name: str) -> Any:
        return self.buffers["parameters"][PARAMETERS.index(name)]

    def _load(self, name: str, at: Any, count: int) -> Any:
        return self.buffers[name][ramp(at, count)]


def ramp(at: Any, count: int) -> Any:
    """``count`` indices from ``at``."""
    return tirx.Ramp(at, 1, count) if count > 1 else at


def splat(value: int, dtype: str, count: int) -> Any:
    """A vector of ``count`` times ``value``."""
    return spread(tirx.const(value, dtype), count)


def spread(value: Any, count: int) -> Any:
    """``value`` in every lane."""
    return tirx.Broadcast(value, count) if count > 1 else value
