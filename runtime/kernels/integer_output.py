"""Where an integer kernel stores its results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import DataType, tirx
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from anncvt.runtime.kernels.flat import ramp, splat
from anncvt.runtime.kernels.integer_end import End
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
    """Where the result of ``layer`` goes.

    Args:
        layer: the layer.
        form: how the sums are computed.
        buffers: the kernel's flat arguments by name.
    """

    def __init__(self, layer: IntegerLayer, form: Form, buffers: dict[str, Any]) -> None:
        self.layer, self.buffers, self.lanes = layer, buffers, form.lanes
        self.end = End(layer, form, buffers)
        self.y = buffers["y"]
        self.planes = blocks(layer.out_channels)

    def address(self, image: Any, block: Any, row: Any, column: Any) -> Any:
        """Where the 16 channels ``block`` of an output pixel are."""
        height, width = self.layer.out_size
        return (((image * self.planes + block) * height + row) * width + column) * LANES

    def store(self, pixels: Sequence[Sequence[Any]], constants: Any, channel: Any, at: Any) -> None:
        """Store the results of pixels side by side, for consecutive channels of one block.

        Args:
            pixels: of each its vectors of ``sum |x-w|`` or ``sum x*w``; what is missing to that is in ``offset`` or
                ``base``.
            constants: index of the first channel's constants.
            channel: number of the first channel.
            at: place of the first pixel in ``y``, and in ``residual``.
        """
        count = self.lanes * len(pixels[0])
        together = self.end.pixels if count == LANES else 1
        for first in range(0, len(pixels), together):
            part, place = pixels[first : first + together], at + first * LANES
            residuals = [
                self.buffers["residual"][ramp(place + i * LANES, count)] if self.layer.residual else None
                for i in range(len(part))
            ]
            value = self._masked(self._value(part, constants, residuals), channel, count)
            B.buffer_store(self.y, value, [ramp(place, count * len(part))])

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
        value = self._value([sums], constants, [residual])
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

    def _value(self, pixels: Sequence[Sequence[Any]], constants: Any, residuals: Sequence[Any]) -> Any:
        if self.layer.result == "int32":
            return self.end.exact(pixels[0], constants)
        return self.end.bytes(pixels, constants, residuals)

    def _masked(self, value: Any, channel: Any, count: int) -> Any:
        """Zero beyond the last channel, of every pixel."""
        if self.layer.out_channels % count == 0:
            return value
        result = self.layer.result
        inside = tirx.Ramp(channel, 1, count) < splat(self.layer.out_channels, "int32", count)
        mask = T.Select(inside, splat(255 if result == "uint8" else -1, result, count), splat(0, result, count))
        pixels = DataType(value.ty.dtype).lanes // count
        return value & (mask if pixels == 1 else tirx.Shuffle([mask] * pixels, list(range(count * pixels))))
