"""The convolution that an adder is to imitate: a ridge regression of what should leave it on what arrives.

The teacher's weights are the best for the teacher's input. What arrives in the student has errors, which differ from
channel to channel, and an adder's own remainders add noise to every tap, in proportion to its weight. With ``C`` the
covariance of the taps, ``D`` its diagonal and ``rho`` the share of a tap that its tents do not express, the expected
error

    |z - W x|^2 + rho sum_t W_t^2 D_t

is least for ``W = cov(z, x) (C + rho D)^-1``: taps that err count less, and correlated ones share their weight, so that
their remainders average out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Share of a tap's variance that the best tents leave, by weights per input (benchmarks/taps.py, normal inputs).
REMAINDERS = (0.28, 0.09, 0.027, 0.007)
#: Penalty on weights, in units of the remainder's share, and on what they differ from the teacher's: where places are
#: few, those are the better guess. Which is best is left to examples that are held back.
PENALTIES = ((3.0, 0.0), (10.0, 0.0), (1.0, 0.3), (1.0, 1.0))
#: Variances count as so much of their mean, at least: a channel that never varies says nothing.
LEAST_VARIANCE = 1e-3


@torch.no_grad()
def regressions(taps: Tensor, targets: Tensor, prior: Tensor, copies: int) -> Iterator[Tensor]:
    """A regression ``[G, O, T]`` for each of :data:`PENALTIES`.

    Args:
        taps: the input of every tap at all places, ``[G, T, P]``.
        targets: ``[G, O, P]``.
        prior: the teacher's weights, ``[G, O, T]``, up to a factor per output.
        copies: weights per input of the adder.
    """
    x, z = (values - values.mean(2, keepdim=True) for values in (taps, targets))
    covariance, cross = ((values @ x.transpose(1, 2)).double() / x.shape[2] for values in (x, z))
    prior = prior.double()
    along, square = (prior * cross).sum(2, keepdim=True), ((prior @ covariance) * prior).sum(2, keepdim=True)
    prior = prior * along / square.clamp_min(1e-12)
    variance = covariance.diagonal(dim1=1, dim2=2)
    variance = variance.clamp_min(LEAST_VARIANCE * float(variance.mean()) + 1e-12)
    for shrink, pull in PENALTIES:
        penalty = shrink * REMAINDERS[copies - 1] + pull
        wanted = cross + pull * prior * variance[:, None]
        found = torch.linalg.solve(covariance + torch.diag_embed(penalty * variance), wanted.transpose(1, 2))
        yield found.transpose(1, 2).float()
