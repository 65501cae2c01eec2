"""The meaning of an 8-bit adder network, in integers: slow, obvious, and what everything else equals bit for bit.

Feature maps are ``[N, C, H, W]`` uint8 with a scale and a zero point per tensor (:class:`Grid`). Accumulators are
int32, the requantisation behind them is int64. numpy alone, no torch: this is also what a chip is compared with.

Source of the shared scale and of the shift by a zero point, ``|x - w| = |(x + z) - (w + z)|``: Redistribution of
Weights and Activations for AdderNet Quantization, NeurIPS 2022.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from anncvt.runtime.geometry import Padding, expand_padding, output_size

Array = np.ndarray


@dataclass(frozen=True)
class Grid:
    """What the integers of a tensor stand for: ``value = scale * (q - zero)``, ``0 <= q < 2**bits``."""

    scale: float
    zero: int
    bits: int = 8

    @property
    def top(self) -> int:
        """The largest integer."""
        return 2**self.bits - 1

    @property
    def low(self) -> float:
        """The value of the smallest integer."""
        return -self.scale * self.zero

    @property
    def high(self) -> float:
        """The value of the largest integer."""
        return self.scale * (self.top - self.zero)

    def quantise(self, values: Array) -> Array:
        """The nearest integers (ties to even), clamped to the grid, uint8."""
        return np.clip(np.rint(np.asarray(values, np.float64) / self.scale) + self.zero, 0, self.top).astype(np.uint8)

    def values(self, integers: Array) -> Array:
        """What ``integers`` stand for, float64."""
        return self.scale * (np.asarray(integers, np.float64) - self.zero)


@dataclass(frozen=True)
class Window:
    """How a sliding window moves; ``padding`` is (top, left, bottom, right), the rest (height, width)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, int]:
        """Height and width of the output over an input of ``size``."""
        return output_size(size, kernel, self.stride, self.padding, self.dilation)


@dataclass(frozen=True)
class Epilogue:
    """What follows an accumulator: BatchNorm, residual, activation and the next grid as one multiply, add and shift.

    ``y = clamp((acc * multiplier[o] + bias[o] + r * residual_multiplier + 2**(shift-1)) >> shift, low, high)``, all
    int64, with an arithmetic shift: ties round up. Zero points of the output and of the residual are inside ``bias``;
    ``low`` and ``high`` are the range of the output, narrower where an activation clips.
    """

    multiplier: Array  # [O] int32
    bias: Array  # [O] int64
    shift: int  # 1..31
    low: int
    high: int
    residual_multiplier: int = 0  # int32

    def apply(self, accumulators: Array, residual: Array | None = None) -> Array:
        """``[N, O, H, W]`` int32 -> uint8 (int32 where ``low`` and ``high`` do not fit uint8)."""
        per_channel = (1, -1, 1, 1)
        total = accumulators.astype(np.int64) * self.multiplier.astype(np.int64).reshape(per_channel)
        total += self.bias.reshape(per_channel)
        if residual is not None:
            total += residual.astype(np.int64) * self.residual_multiplier
        shifted = (total + (1 << (self.shift - 1))) >> self.shift
        small = self.low >= 0 and self.high <= 255
        return np.clip(shifted, self.low, self.high).astype(np.uint8 if small else np.int32)


@dataclass(frozen=True)
class Step:
    """One operation of an integer network; :data:`OPS` says which there are. Its output is known by its name."""

    name: str
    op: str
    inputs: tuple[str, ...]
    shape: tuple[int, int, int]  # of the output: C, H, W
    grid: Grid  # of the output
    window: Window = field(default_factory=Window)
    kernel: tuple[int, int] = (1, 1)
    weight: Array | None = None  # [O, C/groups, kh, kw]: uint8 on the input's grid (adder), int8 (convolution)
    filter_group: Array | None = None  # [O] uint8, adder: which of ``inputs`` each filter reads
    pad_values: tuple[int, ...] = ()  # per input: what padding holds
    epilogue: Epilogue | None = None
    residual: str | None = None
    channels: tuple[int, int] = (0, 0)  # before and behind: that "pad" adds, that "slice" leaves out
    clamp: Array | None = (
        None  # [O] float32, adder: what clamping the weights left, in accumulators; in the bias already
    )


#: adder, convolution: see there. sum_pool: sums over windows. rescale: the input itself. These four have an epilogue.
#: The others keep the grid of their input: max_pool; slice, every ``stride``-th pixel of channels side by side; pad;
#: flatten; concatenate, the channels of all ``inputs``, which have one grid; shuffle, the first channel of each of
#: ``groups``, then the second of each, and so on.
OPS = ("adder", "convolution", "sum_pool", "rescale", "max_pool", "slice", "pad", "flatten", "concatenate", "shuffle")
#: Of these, the ones with an accumulator and an epilogue.
ACCUMULATING = OPS[:4]


def adder(x: Array, w: Array, window: Window, pad_value: int) -> Array:
    """``acc[n,o,p] = -sum_{c,k} |x[n,c,p*stride+k*dilation-pad] - w[o,c,k]|``; a padded tap gives ``-|pad_value - w|``.

    Args:
        x: ``[N, C, H, W]`` uint8.
        w: ``[O, C/groups, kh, kw]`` uint8, on the same grid.

    Returns:
        ``[N, O, H', W']`` int32.
    """
    accumulators = _empty(x, w, window)
    for filters, taps, pixels in _taps(x, w, window, pad_value):
        for o, tap in zip(filters, taps, strict=True):
            accumulators[:, o] -= np.abs(pixels - tap.astype(np.int32)[None, :, None, None]).sum(1)
    return accumulators


def convolution(x: Array, w: Array, window: Window, x_zero: int) -> Array:
    """``acc[n,o,p] = sum_{c,k} (x[n,c,p*stride+k*dilation-pad] - x_zero) * w[o,c,k]``; padding is ``x_zero``.

    Args:
        x: ``[N, C, H, W]`` uint8.
        w: ``[O, C/groups, kh, kw]`` int8.

    Returns:
        ``[N, O, H', W']`` int32.
    """
    accumulators = _empty(x, w, window)
    for filters, taps, pixels in _taps(x, w, window, x_zero):
        centred = pixels - x_zero
        for o, tap in zip(filters, taps, strict=True):
            accumulators[:, o] += (centred * tap.astype(np.int32)[None, :, None, None]).sum(1)
    return accumulators


def sum_pool(x: Array, kernel: tuple[int, int], window: Window, x_zero: int) -> Array:
    """Sums over windows, ``[N, C, H', W']`` int32; padding counts as ``x_zero``. The epilogue divides."""
    total = np.zeros((*x.shape[:2], *window.output_size(x.shape[2:], kernel)), np.int32)
    for pixels in _pixels(x, kernel, window, x_zero):
        total += pixels
    return total


def max_pool(x: Array, kernel: tuple[int, int], window: Window) -> Array:
    """Maxima over windows, uint8; padding never wins."""
    highest = np.zeros((*x.shape[:2], *window.output_size(x.shape[2:], kernel)), np.int32)
    for pixels in _pixels(x, kernel, window, 0):
        np.maximum(highest, pixels, out=highest)
    return highest.astype(np.uint8)


def accumulate(step: Step, inputs: Sequence[Array]) -> Array:
    """The accumulators of a step of :data:`ACCUMULATING`, ``[N, C, H, W]`` int32."""
    if step.op == "adder":
        assert step.weight is not None and step.filter_group is not None
        result = np.empty((len(inputs[0]), *step.shape), np.int32)
        for at, (x, pad_value) in enumerate(zip(inputs, step.pad_values, strict=True)):
            chosen = step.filter_group == at
            result[:, chosen] = adder(x, step.weight[chosen], step.window, pad_value)
        return result
    if step.op == "convolution":
        assert step.weight is not None
        return convolution(inputs[0], step.weight, step.window, step.pad_values[0])
    if step.op == "sum_pool":
        return sum_pool(inputs[0], step.kernel, step.window, step.pad_values[0])
    return inputs[0].astype(np.int32)


def rearrange(step: Step, inputs: Sequence[Array]) -> Array:
    """The output of a step that has no accumulator: the integers of its inputs, fewer or elsewhere."""
    x = inputs[0]
    if step.op == "max_pool":
        return max_pool(x, step.kernel, step.window)
    if step.op == "slice":
        first = step.channels[0]
        taken = x[:, first : first + step.shape[0], :: step.window.stride[0], :: step.window.stride[1]]
        return np.ascontiguousarray(taken)
    if step.op == "pad":
        return _padded(x, Padding(*step.window.padding), step.pad_values[0], step.channels)
    if step.op == "concatenate":
        return np.concatenate(inputs, 1)
    if step.op == "shuffle":
        groups = x.reshape(len(x), step.window.groups, -1, *x.shape[2:])
        return np.ascontiguousarray(groups.swapaxes(1, 2)).reshape(x.shape)
    return x.reshape(len(x), *step.shape)


def execute(step: Step, inputs: Sequence[Array], residual: Array | None) -> tuple[Array, Array | None]:
    """The output of a step and, where it has one, its accumulators."""
    if step.epilogue is None:
        return rearrange(step, inputs), None
    accumulators = accumulate(step, inputs)
    return step.epilogue.apply(accumulators, residual), accumulators


def _empty(x: Array, w: Array, window: Window) -> Array:
    return np.zeros((len(x), len(w), *window.output_size(x.shape[2:], w.shape[2:])), np.int32)


def _taps(x: Array, w: Array, window: Window, pad_value: int) -> Iterator[tuple[range, Array, Array]]:
    """For each channel group and kernel position: its filters, their weights ``[., C/g]``, the pixels they see."""
    width, each = x.shape[1] // window.groups, len(w) // window.groups
    kernel = (w.shape[2], w.shape[3])
    for group in range(window.groups):
        filters = range(group * each, (group + 1) * each)
        part = x[:, group * width : (group + 1) * width]
        for at, pixels in enumerate(_pixels(part, kernel, window, pad_value)):
            yield filters, w[filters.start : filters.stop, :, at // kernel[1], at % kernel[1]], pixels


def _pixels(x: Array, kernel: tuple[int, int], window: Window, pad_value: int) -> Iterator[Array]:
    """For each kernel position, row by row: the pixels it sees at every output position, int32."""
    padded = _padded(x, expand_padding(window.padding), pad_value).astype(np.int32)
    height, width = window.output_size(x.shape[2:], kernel)
    (down, across), (gap_down, gap_across) = window.stride, window.dilation
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            rows = slice(i * gap_down, i * gap_down + (height - 1) * down + 1, down)
            yield padded[:, :, rows, j * gap_across : j * gap_across + (width - 1) * across + 1 : across]


def _padded(x: Array, pad: Padding, value: int, channels: tuple[int, int] = (0, 0)) -> Array:
    sides = ((0, 0), channels, (pad.top, pad.bottom), (pad.left, pad.right))
    return np.pad(x, sides, constant_values=value)
