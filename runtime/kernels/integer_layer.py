"""What an integer kernel computes: the description that generator, tiling and packing share.

Activations are blocked, ``[N, ceil(C/16), H, W, 16]`` uint8 (NCHW16c); lanes beyond ``C`` are zero in every blocked
tensor, and all kernels keep it so.
"""

from __future__ import annotations

from dataclasses import dataclass

from anncvt.runtime.geometry import NO_PADDING, Padding, output_size
from anncvt.runtime.kernels.layer import LANES, blocks

#: Entries of a kernel's ``parameters`` (int32).
PARAMETERS = ("zero", "shift", "low", "high", "residual")


def totals(factor: int, multiplier: int, bias: int, share: int, shift: int) -> str:
    """How long the totals of a layer may become, see :class:`IntegerLayer`.

    Args:
        factor: the most that a sum may be of the largest input: taps, or the sum of a filter's absolute weights.
        multiplier, bias, share: the largest of the layer, by magnitude (``share``: what a residual is multiplied by).
        shift: 1 to 31.
    """
    # Sums of maxima, and the corrections they need, are up to twice the result.
    sums, rest = 2 * 255 * factor * multiplier, bias + 255 * abs(share) + (1 << shift)
    if max(sums, sums // 2 + rest) < 1 << 31:
        return "short"
    return "long" if (sums + rest) >> shift < (1 << 31) - 2 else "wide"


@dataclass(frozen=True)
class IntegerLayer:
    """One layer for any batch size.

    ``mode``: ``"adder"``, ``-sum |x-w|`` of uint8 operands, where a padded pixel has the value ``zero``; or ``"conv"``,
    ``sum (x-zero)*w`` of uint8 and int8, where it counts 0.

    ``copies``: how often the input channels are read, one after the other, each time with weights of their own
    (``[O, copies * C, kh, kw]``; of layers without groups): an adder with several weights per input.
    ``doubling``: of these copies the second and third have the same weights, and so do the next four, eight, ...; one
    of each is read, and counts as often.

    ``result``: ``"int32"``, those sums; or ``"uint8"``, requantised: ``clamp((t + 2^(shift-1)) >> shift, low, high)``
    of ``t = sum*multiplier + offset [+ r*residual]`` with a uint8 residual ``r``, in int64.

    ``totals``: ``"short"``, ``t`` and what it is made of fit int32; ``"long"``, what is left after the shift does;
    ``"wide"``, not even that does, so that it is clamped before it is narrowed.

    ``narrow``: of an adder whose totals are short, every ``sum 2*max(x, w) - sum x`` is less than 2^16, and what sums
    and residual are multiplied by fits int16.
    """

    mode: str
    in_channels: int
    size: tuple[int, int]  # input height, width
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: Padding = NO_PADDING
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    copies: int = 1
    doubling: bool = False
    result: str = "uint8"
    residual: bool = False
    clamped: bool = True  # False: the range is 0..255, to which bytes are saturated anyway
    totals: str = "long"
    narrow: bool = False
    blocked: bool = True  # False: x is plain [N, C, H, W] (the network's input)

    @property
    def kind(self) -> str:
        """The name of such kernels."""
        return f"integer_{self.mode}"

    @property
    def out_size(self) -> tuple[int, int]:
        return output_size(self.size, self.kernel, self.stride, self.padding, self.dilation)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Without the batch."""
        return (blocks(self.in_channels), *self.size, LANES) if self.blocked else (self.in_channels, *self.size)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Without the batch."""
        return (blocks(self.out_channels), *self.out_size, LANES)

    @property
    def depth(self) -> int:
        """Input channels of one group."""
        return self.in_channels // self.groups

    @property
    def taps(self) -> int:
        """Weights of one output that are read."""
        return self.reads * self.depth * self.kernel[0] * self.kernel[1]

    @property
    def reads(self) -> int:
        """How often the input channels are read in fact."""
        return self.copies.bit_length() if self.doubling else self.copies

    @property
    def filters(self) -> int:
        """Output channels of one group."""
        return self.out_channels // self.groups

    @property
    def depthwise(self) -> bool:
        """Whether channels meet only themselves: they are the lanes then."""
        return self.blocked and self.groups > 1 and self.depth == self.filters == 1

    @property
    def pointwise(self) -> bool:
        """A 1x1 window: the image is one long row of pixels."""
        return self.kernel == (1, 1)

    @property
    def in_place(self) -> bool:
        """Whether blocks of input channels are not shared by groups, so that they can be read as they are stored."""
        return self.blocked and (self.groups == 1 or self.depth % LANES == 0 or self.depthwise)

    @property
    def read_as_stored(self) -> bool:
        """Whether bytes need no copy of the input: all pixels are there, and all are used."""
        skips = self.pointwise and self.stride != (1, 1)
        return self.in_place and not any(self.padding) and not skips

    @property
    def out_in_place(self) -> bool:
        """The same of the output."""
        return self.groups == 1 or self.filters % LANES == 0
