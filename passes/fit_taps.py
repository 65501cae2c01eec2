"""A layer's weights by coordinate descent (:mod:`anncvt.passes.coordinate_descent`) at random places of its output."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from anncvt.passes.coordinate_descent import CANDIDATES, CoordinateDescent, candidates
from anncvt.passes.examples import Examples
from anncvt.passes.pairing import Pair
from anncvt.passes.places import Places

#: Values per input channel that the candidates are taken from.
SAMPLES = 4096
#: Places are so many, or so many per weight of an output if that is more: fewer would be learnt by heart.
PLACES, PLACES_PER_WEIGHT = 8192, 8
#: A sweep that changes a smaller share of the weights is the last one.
SETTLED = 0.01


def sweep_cost(pair: Pair) -> float:
    """Time of a sweep, in multiply-adds: of every tap, what is done once takes as long as some 90 outputs."""
    weight = pair.adder.weight  # [O, copies * C/G, *]
    taps = pair.adder.in_channels // pair.adder.groups * math.prod(weight.shape[2:])
    outputs = len(weight) * weight[0].numel() // taps
    return _places(weight) * 2 * CANDIDATES * taps * (outputs + 90 * pair.adder.groups)


def _places(weight: Tensor) -> int:
    return max(PLACES, PLACES_PER_WEIGHT * weight[0].numel())


@torch.no_grad()
def fit_taps(
    pair: Pair,
    examples: Examples,
    most: int,
    memory: int,
    generator: torch.Generator,
    seconds: float | None = None,
    on_sweep: Callable[[float], None] = lambda r2: None,
) -> int:
    """Improve weights and norm (in eval mode) of ``pair`` on ``examples``; return the number of sweeps.

    What counts is the plain error: with that behind an activation, responses to candidates would not add up.

    Args:
        most: sweeps, at most.
        memory: bytes for inputs and outputs at the places.
        generator: of the places and of the order of the taps.
        seconds: no sweep begins that would end later, but for the first.
        on_sweep: called with R^2 after every sweep.
    """
    begin = time.monotonic()
    adder, norm = pair.adder, cast(_BatchNorm, pair.norm)
    assert norm.running_mean is not None and norm.running_var is not None
    at = Places(adder, examples, _places(adder.weight), memory, generator)
    grids = candidates(at.channels(SAMPLES)).repeat_interleave(at.each, 0).view(adder.groups, -1, CANDIDATES)
    # A copy where a weight is laid out otherwise (channels_last).
    weight = adder.weight.reshape(adder.groups, adder.out_channels // adder.groups, -1, at.taps.shape[1])
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).view(adder.groups, -1)
    descents = [CoordinateDescent(*group) for group in zip(weight, scale, at.taps, grids, at.targets, strict=True)]
    done, changed = 0, 1.0
    while done < most and changed >= SETTLED:
        if done and seconds is not None and (time.monotonic() - begin) * (done + 1) > seconds * done:
            break
        changed = sum(descent.sweep(generator) for descent in descents) / len(descents)
        done += 1
        on_sweep(sum(descent.r2() for descent in descents) / len(descents))
    adder.weight.copy_(weight.reshape_as(adder.weight))
    mean, variance = (torch.cat(parts) for parts in zip(*(descent.statistics() for descent in descents), strict=True))
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_(scale.flatten() * (variance + norm.eps).sqrt())
    norm.bias.copy_(torch.cat([descent.mean for descent in descents]))
    return done
