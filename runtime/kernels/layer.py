"""What an inference kernel computes: the description the kernel generator, the tiling and the lowering share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anncvt.runtime.geometry import NO_PADDING, Padding, output_size

#: Channels of one block: activations are ``[N, ceil(C/16), H, W, 16]`` (NCHW16c), lanes beyond C are zero.
LANES = 16

#: Name and parameters of an elementwise function, ``("clamp", 0.0, 6.0)``; empty: the value itself.
Activation = tuple[Any, ...]


@dataclass(frozen=True)
class Layer:
    """What one kernel computes: ``y = activation(scale * window(x, w) + shift [+ residual])``.

    ``mode``: ``"max"`` and ``"abs"`` are the adder ``-sum |x-w|`` (fast form; direct form, exact where ``|x|`` is much
    larger than ``|x-w|``), ``"fixed"`` is the same in 16-bit fixed point, ``"conv"`` the convolution ``sum x*w``.
    Grouped layers whose groups are not multiples of 16 channels (depthwise among them) have no patch sum to share:
    their adder is always computed directly.
    """

    mode: str
    batch: int
    in_channels: int
    size: tuple[int, int]  # input height, width
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: Padding = NO_PADDING
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: Activation = ()
    residual: bool = False
    blocked: bool = True  # False: x is plain [N, C, H, W] (the network's input); dense layers only

    @property
    def out_size(self) -> tuple[int, int]:
        return output_size(self.size, self.kernel, self.stride, self.padding, self.dilation)

    @property
    def in_shape(self) -> tuple[int, ...]:
        if not self.blocked:
            return (self.batch, self.in_channels, *self.size)
        return (self.batch, blocks(self.in_channels), *self.size, LANES)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (self.batch, blocks(self.out_channels), *self.out_size, LANES)

    @property
    def per_lane(self) -> bool:
        """Whether every output lane reads input channels of its own (depthwise and other small groups)."""
        return self.groups > 1 and bool(
            self.in_channels // self.groups % LANES or self.out_channels // self.groups % LANES
        )

    @property
    def form(self) -> str:
        """The mode that is really used."""
        return "abs" if self.mode == "max" and self.per_lane else self.mode

    @property
    def pointwise(self) -> bool:
        """A 1x1 window: the image is one long row of pixels."""
        return self.kernel == (1, 1)

    @property
    def copied(self) -> bool:
        """Whether the kernel works on a copy of its input (padded, reordered, or subsampled to contiguous pixels)."""
        return (
            self.mode == "fixed" or not self.blocked or any(self.padding) or (self.pointwise and self.stride != (1, 1))
        )


def blocks(channels: int) -> int:
    """Number of 16-channel blocks."""
    return -(-channels // LANES)
