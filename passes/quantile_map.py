"""Quantile map: the adder weights whose response has the slope of the convolution's weights.

For one input channel with activations ``x``, the tent ``-|x - w|`` regressed on ``x`` has slope
``cov(-|x-w|, x) / var(x)``. It rises from -1 (``w`` below all activations) to +1 (``w`` above them) and is 0 where
``w`` splits the activations evenly. So a convolution weight ``v`` becomes the ``w`` whose slope is ``v / s``; ``s`` is
one scale per output channel, undone by the BatchNorm that follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Scales tried per output channel, as shares of its largest weight. Small: more weights saturate, less residual noise.
SCALES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0)
GRID_POINTS = 257


@dataclass(frozen=True)
class TentTable:
    """Slope and residual variance of the tent at ``G`` candidate weights, for each of ``C`` input channels."""

    weights: Tensor  # [C, G], ascending
    slope: Tensor  # [C, G], ascending in [-1, 1]
    residual: Tensor  # [C, G]: variance of the tent that a line in x does not explain
    variance: Tensor  # [C] of the activations


def tent_table(samples: Tensor) -> TentTable:
    """Tabulate the tent over the range of ``samples`` ``[C, S]`` (activations per input channel), in closed form.

    With ``F``, ``S1``, ``S2`` the share, first and second partial moment of the samples below ``w``, all of
    ``E|x-w|``, ``E x|x-w|`` and ``E|x-w|^2`` are linear in them, so a sort and two running sums are enough.
    """
    ordered = samples.double().contiguous().sort(1).values
    count = ordered.shape[1]
    mean, square = ordered.mean(1, keepdim=True), ordered.square().mean(1, keepdim=True)
    variance = (square - mean.square()).clamp_min(1e-12)
    low, high = ordered[:, :1], ordered[:, -1:]
    reach = (high - low).clamp_min(1e-3)
    w = low + reach * torch.linspace(-0.02, 1.02, GRID_POINTS, dtype=torch.float64, device=samples.device)
    below = torch.searchsorted(ordered, w.contiguous())
    zero = torch.zeros_like(low)
    first = torch.cat([zero, ordered.cumsum(1)], 1).gather(1, below) / count
    second = torch.cat([zero, ordered.square().cumsum(1)], 1).gather(1, below) / count
    share = below / count
    distance = w * (2 * share - 1) + mean - 2 * first
    distance_x = 2 * w * first - 2 * second + square - w * mean
    covariance = distance * mean - distance_x
    tent_variance = square - 2 * w * mean + w.square() - distance.square()
    slope = (covariance / variance).cummax(1).values
    residual = (tent_variance - covariance.square() / variance).clamp_min(0)
    return TentTable(w.float(), slope.float(), residual.float(), variance[:, 0].float())


def quantile_map(weight: Tensor, table: TentTable, groups: int = 1, *, copies: int = 1) -> Tensor:
    """Adder weights for the convolution weights ``weight`` ``[O, C/groups, *kernel]``.

    With ``copies`` there are so many for each, ``[O, copies * C, *kernel]``, the k-th of the input times ``2^k``: from
    the largest on they lie beyond all activations, where they are lines of slope ``2^k`` or ``-2^k``, as the digits of
    a binary number; the first is the tent with the rest of the slope, and all that leaves a residual.

    Per output channel the scale ``s`` minimises ``sum_i (v_i - s*slope_i)^2 var_i + s^2 * residual_i``: the signal lost
    where ``v_i / s`` saturates, plus the part of the tents that no line explains.
    """
    flat = weight.detach().reshape(*weight.shape[:2], -1)  # [O, C/g, K]
    per_group, inputs = weight.shape[0] // groups, copies * flat.shape[1]
    result = flat.new_empty(flat.shape[0], inputs, flat.shape[2])
    for group in range(groups):
        rows = slice(group * per_group, (group + 1) * per_group)
        channels = slice(group * flat.shape[1], (group + 1) * flat.shape[1])
        result[rows] = _map_group(flat[rows], table, channels, copies)
    return result.view(weight.shape[0], inputs, *weight.shape[2:])


def _map_group(v: Tensor, table: TentTable, channels: slice, copies: int) -> Tensor:
    slope, weights = table.slope[channels].contiguous(), table.weights[channels]
    residual, variance = table.residual[channels], table.variance[channels, None, None]
    by_channel = v.transpose(0, 1)  # [C, O, K]
    largest = v.abs().amax((1, 2)).clamp_min(1e-12)
    best_error = torch.full((v.shape[0],), float("inf"), device=v.device)
    best = v.new_zeros(v.shape[0], copies * v.shape[1], v.shape[2])
    for share in SCALES:
        scale = (share * largest)[None, :, None]
        wanted = (by_channel / scale).flatten(1)
        lines: list[Tensor] = []
        for digit in (float(2**k) for k in range(copies - 1, 0, -1)):
            lines.insert(0, torch.where(wanted > 0, digit, -digit))
            wanted = wanted - lines[0]
        wanted = wanted.clamp(-1, 1)
        at = torch.searchsorted(slope, wanted.contiguous()).clamp_max(slope.shape[1] - 1)
        got, noise, mapped = (t.gather(1, at).view_as(by_channel) for t in (slope, residual, weights))
        lines = [line.view_as(by_channel) for line in lines]
        beyond = [line.abs() * torch.where(line > 0, weights[:, -1:, None], weights[:, :1, None]) for line in lines]
        mapped = torch.cat([mapped, *beyond])
        error = ((by_channel - scale * sum(lines, got)).square() * variance + scale.square() * noise).sum((0, 2))
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better[:, None, None], mapped.transpose(0, 1), best)
    return best
