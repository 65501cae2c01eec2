"""Convolutions that fit what arrives in the student: ridge regressions of what should leave a layer on its input.

The teacher's weights are the best for the teacher's input. What arrives in the student has errors, which differ from
channel to channel, and an adder that imitates a convolution adds noise to every tap, in proportion to its weight. With
``C`` the covariance of the taps, ``D`` its diagonal and ``rho`` the share of a tap that no tent expresses, the expected
error

    |z - W x|^2 + rho sum_t W_t^2 D_t

is least for ``W = cov(z, x) (C + rho D)^-1``: taps that err count less, and correlated ones share their weight, so that
their remainders average out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from anncvt.nn import _AdderNd
from anncvt.passes.examples import Examples
from anncvt.passes.places import Places

#: Places are so many, or so many per weight of an output if that is more.
PLACES, PLACES_PER_WEIGHT = 16384, 8
#: Share of a tap's variance that the best tents leave, by weights per input (benchmarks/taps.py, normal inputs).
REMAINDERS = (0.28, 0.09, 0.027, 0.007)
#: Of layers that stay what they are: where places are few, the teacher's weights are the better guess.
KEPT = ((0.0, 0.02), (0.0, 0.3), (0.0, 3.0))
#: With more weights per output, a regression takes minutes, and gigabytes.
MOST_WEIGHTS = 5000
#: Variances count as so much of their mean, at least: a channel that never varies says nothing.
LEAST_VARIANCE = 1e-3

#: On weights, and on what they differ from the teacher's; both in units of ``D``.
Penalty = tuple[float, float]


def of_adders(copies: int) -> tuple[Penalty, ...]:
    """Penalties worth a try for an adder with so many weights per input."""
    rho = REMAINDERS[copies - 1]
    return (3 * rho, 0.0), (10 * rho, 0.0), (rho, 0.3), (rho, 1.0)


@torch.no_grad()
def regressions(
    layer: _AdderNd,
    examples: Examples,
    weight: Tensor,
    penalties: Sequence[Penalty],
    memory: int,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Weight and bias ``[O]`` of a convolution for each of ``penalties``; none if an output has too many weights, or if
    what arrives is not finite.

    Args:
        layer: says how taps lie in the input.
        weight: the teacher's, ``[O, C/groups, *kernel]``; up to a factor per output, it is what penalties pull to.
        memory: bytes for inputs and outputs at the places.
        generator: of the places.
    """
    if weight[0].numel() > MOST_WEIGHTS:
        return
    at = Places(layer, examples, max(PLACES, PLACES_PER_WEIGHT * weight[0].numel()), memory, generator)
    middle, goal = (values.mean(2, keepdim=True) for values in (at.taps, at.targets))
    x, z = at.taps - middle, at.targets - goal
    covariance, cross = ((values @ x.transpose(1, 2)).double() / x.shape[2] for values in (x, z))
    prior = weight.detach().reshape(layer.groups, len(weight) // layer.groups, -1).double()
    along, square = (prior * cross).sum(2, keepdim=True), ((prior @ covariance) * prior).sum(2, keepdim=True)
    prior = prior * along / square.clamp_min(1e-12)
    variance = covariance.diagonal(dim1=1, dim2=2)
    variance = variance.clamp_min(LEAST_VARIANCE * float(variance.mean()) + 1e-12)
    for shrink, pull in penalties:
        wanted = cross + pull * prior * variance[:, None]
        penalised = covariance + torch.diag_embed((shrink + pull) * variance)
        factor, failed = torch.linalg.cholesky_ex(penalised)
        if bool(failed.any()) or not bool(factor.isfinite().all()):
            return
        found = torch.cholesky_solve(wanted.transpose(1, 2), factor).transpose(1, 2).float()
        yield found.reshape_as(weight), (goal - found @ middle).flatten()
