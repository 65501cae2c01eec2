"""Which interval of a tensor's values the integers cover: percentile, least squared error, or least lost entropy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import anncvt.runtime.op  # noqa: F401  (registers torch.ops.anncvt.adder2d)
from anncvt.errors import AnncvtError
from anncvt.runtime.integer import Grid, Window

METHODS = ("percentile", "mse", "entropy")
#: Share of the values inside the range, of each side (NeurIPS 2022, Redistribution of Weights and Activations).
PERCENTILE = 0.9997
#: The ranges that are tried, as shares of the whole.
SHRINK = tuple(i / 40 for i in range(4, 41))
#: Bins of the histogram whose entropy is compared.
BINS = 2048


def choose_grid(samples: Tensor, bits: int, method: str, *, power_of_two: bool = False) -> Grid:
    """A grid of ``2**bits`` integers for values like ``samples`` (any shape, floating point).

    Zero is always on the grid, so that padding is exact.

    Args:
        method: one of :data:`METHODS`.
        power_of_two: round the scale up to a power of two.

    Raises:
        AnncvtError: no such method.
    """
    if method not in METHODS:
        raise AnncvtError(f"no such range: {method!r}", fix=f"choose one of {', '.join(METHODS)}")
    values = samples.flatten().double()
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    if method == "percentile":
        low = min(_quantile(values, 1 - PERCENTILE), 0.0)
        high = max(_quantile(values, PERCENTILE), 0.0)
        return grid_over(low, high, bits, power_of_two=power_of_two)
    loss = squared_error if method == "mse" else lost_entropy
    candidates = {grid_over(share * low, share * high, bits, power_of_two=power_of_two) for share in SHRINK}
    return min(sorted(candidates, key=lambda grid: -grid.scale), key=lambda grid: loss(values, grid))


def grid_over(low: float, high: float, bits: int, *, power_of_two: bool = False) -> Grid:
    """The grid whose integers span low..high (which contains 0); an empty span gets a scale of 1."""
    top = 2**bits - 1
    scale = (high - low) / top or 1.0
    if power_of_two:
        scale = 2.0 ** math.ceil(math.log2(scale))
    return Grid(scale, min(max(round(-low / scale), 0), top), bits)


def on_grid(values: Tensor, grid: Grid) -> Tensor:
    """``values`` rounded to the grid and clamped to it, still real numbers."""
    return ((values / grid.scale).round() + grid.zero).clamp(0, grid.top).sub(grid.zero).mul(grid.scale)


def squared_error(values: Tensor, grid: Grid) -> float:
    """Mean squared error of rounding and clamping to the grid."""
    return float((values - on_grid(values, grid)).square().mean())


def lost_entropy(values: Tensor, grid: Grid) -> float:
    """Kullback-Leibler divergence of the values' histogram on the grid from that of the values.

    As in the calibration of TensorRT (S. Migacz, 8-bit inference with TensorRT, GTC 2017): the histogram inside the
    range, with what lies outside added to its end bins, against the same mass spread evenly within each integer's
    interval over those bins that are not empty. Zeros are left out: every grid has them exactly.
    """
    values = values[values != 0]
    if len(values) == 0 or float(values.min()) == float(values.max()):
        return 0.0
    low, high = float(values.min()), float(values.max())
    counts = torch.histc(values, BINS, low, high)
    centres = low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * (high - low) / BINS
    inside = (centres >= grid.low - grid.scale / 2) & (centres <= grid.high + grid.scale / 2)
    if not bool(inside.any()):
        return math.inf
    clipped = torch.where(inside, counts, 0)
    first, last = int(inside.nonzero()[0]), int(inside.nonzero()[-1])
    clipped[first] += counts[:first].sum()
    clipped[last] += counts[last + 1 :].sum()
    level = ((centres / grid.scale).round() + grid.zero).clamp(0, grid.top).long()
    # The quantised histogram knows only what is inside: what was clipped is what is lost.
    occupied = inside & (counts > 0)
    mass = torch.zeros(grid.top + 1, dtype=torch.float64).index_add_(0, level[occupied], counts[occupied])
    bins = torch.bincount(level[occupied], minlength=grid.top + 1).double()
    spread = torch.where(occupied, mass[level] / bins[level].clamp(min=1), 0)
    p, q = clipped / clipped.sum(), spread / spread.sum()
    known = p > 0
    divergence = float((p[known] * (p[known] / q[known].clamp(min=1e-12)).log()).sum())
    # Counts scatter: where p and q are alike, a sample of so many values still shows about this much (Miller, 1955).
    scatter = float(occupied.sum() - (bins > 0).sum()) / (2 * len(values))
    return max(divergence - scatter, 0.0)


def lost_output(x: Tensor, weight: Tensor, window: Window, grid: Grid) -> float:
    """Share of an adder's output variance that is lost when input and weights are on ``grid``, mean over filters.

    A line per filter costs nothing, since the BatchNorm behind it can be any.

    Args:
        x: ``[N, C, H, W]`` float32.
        weight: ``[O, C/groups, kh, kw]`` float32.
    """
    geometry = (list(window.stride), list(window.padding), list(window.dilation), window.groups)
    exact = torch.ops.anncvt.adder2d(x, weight, *geometry).double().transpose(0, 1).flatten(1)
    rounded = torch.ops.anncvt.adder2d(on_grid(x, grid), on_grid(weight, grid), *geometry)
    both = torch.stack([exact, rounded.double().transpose(0, 1).flatten(1)])
    both = both - both.mean(2, keepdim=True)
    power = both.square().sum(2).clamp(min=1e-30)
    explained = (both[0] * both[1]).sum(1).square() / (power[0] * power[1])
    return float((1 - explained).mean())


def _quantile(values: Tensor, share: float) -> float:
    """The ``share`` quantile: a value that is there."""
    rank = min(max(round(share * (len(values) - 1)), 0), len(values) - 1)
    return float(values.kthvalue(rank + 1).values)
