"""The integer layers in numpy's int64, and random ones of every kind."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from anncvt.runtime.geometry import Padding
from anncvt.runtime.kernels.integer_layer import IntegerLayer
from anncvt.runtime.kernels.integer_pack import Requantisation, narrow, totals_of
from anncvt.runtime.kernels.layer import LANES, blocks

LENGTHS = ("short", "long", "wide")


class Case(NamedTuple):
    """One layer with operands, and its result; ``layer`` says whether it is narrow."""

    layer: IntegerLayer
    x: np.ndarray
    weight: np.ndarray
    zero: int
    end: Requantisation | None
    residual: np.ndarray | None
    expected: np.ndarray


def sums(layer: IntegerLayer, x: np.ndarray, weight: np.ndarray, zero: int) -> np.ndarray:
    """``-sum |x-w|`` or ``sum (x-zero)*w``, ``[N, O, H', W']`` int64; padded pixels are ``zero``."""
    pad, (height, width) = layer.padding, layer.out_size
    sides = ((0, 0), (0, 0), (pad.top, pad.bottom), (pad.left, pad.right))
    image = np.pad(x.astype(np.int64), sides, constant_values=zero)
    total = np.zeros((len(x), layer.out_channels, height, width), np.int64)
    for o, taps in enumerate(weight.astype(np.int64)):
        first = o // layer.filters * layer.depth
        for (c, r, s), w in np.ndenumerate(taps):
            top, left = r * layer.dilation[0], s * layer.dilation[1]
            rows = slice(top, top + (height - 1) * layer.stride[0] + 1, layer.stride[0])
            columns = slice(left, left + (width - 1) * layer.stride[1] + 1, layer.stride[1])
            pixels = image[:, first + c % layer.depth, rows, columns]
            total[:, o] += -np.abs(pixels - w) if layer.mode == "adder" else (pixels - zero) * w
    return total


def requantised(total: np.ndarray, end: Requantisation, residual: np.ndarray | None) -> np.ndarray:
    """What ``end`` makes of int64 sums, uint8."""
    channel = (None, slice(None), None, None)
    value = total * end.multiplier.astype(np.int64)[channel] + end.offset.astype(np.int64)[channel]
    if residual is not None:
        value = value + residual.astype(np.int64) * end.residual
    return np.clip((value + (1 << (end.shift - 1))) >> end.shift, end.low, end.high).astype(np.uint8)


def case(layer: IntegerLayer, *, batch: int = 1, values: str = "all", zero: int = 7, low: int = 0) -> Case:
    """Random operands: of ``"all"`` values, or only the ``"extreme"`` ones; results spread over 0..255 and beyond."""
    random = np.random.default_rng(0)

    def draw(shape: tuple[int, ...], dtype: type) -> np.ndarray:
        choice = random.integers(0, 256, shape) if values == "all" else random.choice([0, 255], shape)
        return choice.astype(np.uint8).view(dtype)

    x = draw((batch, layer.in_channels, *layer.size), np.uint8)
    shape = (layer.out_channels, layer.copies * layer.depth, *layer.kernel)
    weight = draw(shape, np.uint8 if layer.mode == "adder" else np.int8)
    if values == "extreme" and layer.mode == "conv":
        weight = random.choice([-128, 127], shape).astype(np.int8)
    if layer.doubling:
        first = [(1 << (at + 1).bit_length() - 1) - 1 for at in range(layer.copies)]
        weight = np.concatenate([np.split(weight, layer.copies, 1)[at] for at in first], 1)
    total = sums(layer, x, weight, zero)
    if layer.result == "int32":
        return Case(layer, x, weight, zero, None, None, total.astype(np.int32))
    spread = max(1, int(np.ptp(total)) if total.size else 1)
    wide = layer.totals == "wide"
    shift = {"short": 7, "long": 16, "wide": 1}[layer.totals]
    multiplier = random.integers(2**31 - 2**20, 2**31, layer.out_channels)
    if not wide:
        multiplier = random.integers(1, 3, layer.out_channels) * max(1, (256 << shift) // spread)
    centre = int(total.mean()) if total.size else 0
    offset = (128 << shift) - centre * multiplier + random.integers(-(30 << shift), 30 << shift, layer.out_channels)
    low, high = (low, 250) if layer.clamped else (0, 255)
    end = Requantisation(multiplier.astype(np.int32), offset, shift, low, high, (1 << shift) // 4 - 3)
    layer = dataclasses.replace(layer, narrow=narrow(layer.mode, weight, end))
    assert LENGTHS.index(totals_of(layer.mode, weight, end)) <= LENGTHS.index(layer.totals)
    residual = draw((batch, layer.out_channels, *layer.out_size), np.uint8) if layer.residual else None
    return Case(layer, x, weight, zero, end, residual, requantised(total, end, residual))


def blocked(x: np.ndarray) -> np.ndarray:
    """``[N, C, H, W]`` as ``[N, ceil(C/16), H, W, 16]``, lanes beyond the last channel zero."""
    n, c, h, w = x.shape
    full = np.zeros((n, blocks(c) * LANES, h, w), x.dtype)
    full[:, :c] = x
    return np.ascontiguousarray(full.reshape(n, -1, LANES, h, w).transpose(0, 1, 3, 4, 2))


@st.composite
def layers(draw: st.DrawFn) -> IntegerLayer:
    """Layers of every kind, the output at least one pixel."""

    def pair(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.tuples(st.integers(low, high), st.integers(low, high))

    kernel, dilation = draw(st.one_of(st.just((1, 1)), pair(1, 4))), draw(pair(1, 2))
    padding = Padding(*draw(st.one_of(st.just((0,) * 4), st.tuples(*[st.integers(0, 2)] * 4))))
    smallest = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    extra = draw(pair(0, 9))
    groups, depth, filters = draw(
        st.one_of(
            st.tuples(st.just(1), st.sampled_from([1, 3, 16, 20, 40, 64]), st.sampled_from([1, 10, 16, 33, 48, 64])),
            st.tuples(st.sampled_from([2, 3]), st.sampled_from([1, 4, 16, 18, 32]), st.sampled_from([1, 5, 16, 32])),
            st.tuples(st.sampled_from([16, 21]), st.just(1), st.just(1)),
        )
    )
    result = draw(st.sampled_from(["uint8", "uint8", "int32"]))
    repeated = st.sampled_from([(1, False), (1, False), (2, False), (3, True), (7, True)])
    copies, doubling = draw(repeated) if groups == 1 else (1, False)
    return IntegerLayer(
        draw(st.sampled_from(["adder", "adder", "conv"])),
        groups * depth,
        (smallest[0] + extra[0], smallest[1] + extra[1]),
        groups * filters,
        kernel,
        draw(pair(1, 2)),
        padding,
        dilation,
        groups,
        copies,
        doubling,
        result,
        residual=result == "uint8" and draw(st.booleans()),
        clamped=draw(st.booleans()),
        totals=draw(st.sampled_from(LENGTHS)) if result == "uint8" else "long",
        blocked=draw(st.sampled_from([True, True, True, False])),
    )
