"""Coordinate descent: tap by tap, the weight of least error among candidates, for all outputs of an adder at once.

What a layer misses, ``|target - b - s * sum_t -|x_t - w_t||^2``, is no smooth function of its weights, and a
gradient of signs says little of how far to go. In a single tap it can be minimised exactly. With the responses
``T[g] = -|x_t - c_g|`` to ``G`` candidates at ``P`` positions, what any change of weight gains follows from ``R T'``
(``R [O, P]``: what is missing) and the Gram matrix ``T T'``: two products of matrices for all ``O`` outputs. A sweep
over all taps costs as much as ``2 G`` convolutions of that shape at these positions, and has no learning rate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Candidates per tap, two of them beyond all activations.
CANDIDATES = 32
#: How often a sweep fits the scales anew.
REFRESHES = 4


def candidates(samples: Tensor, count: int = CANDIDATES) -> Tensor:
    """``[C, count]`` weights worth trying for inputs distributed like ``samples`` ``[C, S]``, ascending.

    Evenly spread over the distinct values, so that zeros behind a ReLU count once; the first and the last lie beyond
    all of them, where the response is a line.
    """
    rows = []
    for row in samples:
        distinct = row.unique()
        margin = 0.02 * (distinct[-1] - distinct[0]).clamp_min(1e-3)
        at = torch.linspace(0, len(distinct) - 1, count - 2, device=row.device).round().long()
        rows.append(torch.cat([distinct[:1] - margin, distinct[at], distinct[-1:] + margin]))
    return torch.stack(rows)


class CoordinateDescent:
    """One adder (a group of it) and the line ``y = scale * (response - its mean) + mean of the targets`` behind it.

    Args:
        weight: ``[O, K, T]``, ``K`` of them per tap and output, the k-th for ``2^k`` times the input; starts at the
            candidates next to it and is changed in place.
        scale: ``[O]``, from the response to the targets, to start with; changed in place.
        taps: the input of every tap at all positions, ``[T, P]``.
        grids: the candidates of every tap, ``[T, G]``.
        targets: ``[O, P]``.
    """

    @torch.no_grad()
    def __init__(self, weight: Tensor, scale: Tensor, taps: Tensor, grids: Tensor, targets: Tensor) -> None:
        self.weight, self.scale, self.taps, self.grids = weight, scale, taps, grids
        self.mean, self._variance = targets.mean(1), targets.var().clamp_min(1e-12)
        self._targets = targets - self.mean[:, None]
        self._missing = self._targets.clone()
        #: Per output, what is not worth a change: float32 does not tell it from nothing.
        self._least_gain = 1e-6 * self._targets.square().sum(1)
        #: Indices of candidates, ``[T, O, K]``, and of every tap's candidates the mean response, ``[T, G]``.
        self._sizes = 2.0 ** torch.arange(weight.shape[1], device=weight.device)
        unsized = (weight / self._sizes[:, None]).permute(2, 0, 1)
        self._chosen = (unsized[..., None] - grids[:, None, None]).abs().argmin(-1)
        self._means = torch.stack([_responses(*tap).mean(1) for tap in zip(taps, grids, strict=True)])
        for tap, chosen in enumerate(self._chosen):
            self._missing.addmm_(scale[:, None] * self._counts(chosen), self._centred(tap), alpha=-1)
            self._write(tap)

    @torch.no_grad()
    def sweep(self, generator: torch.Generator) -> float:
        """Go over all taps once in random order; return the share of the weights that changed."""
        changed, every = 0, max(1, len(self.taps) // REFRESHES)
        for at, tap in enumerate(torch.randperm(len(self.taps), generator=generator).tolist()):
            if at % every == 0:
                self._fit_scale()
            responses = self._centred(tap)
            gram = responses @ responses.T
            for copy, size in enumerate(self._sizes):
                changed += self._choose(self._chosen[tap, :, copy], size, responses, gram)
            self._write(tap)
        self._fit_scale()
        return changed / self._chosen.numel()

    def r2(self) -> float:
        """Share of the variance of all targets together that is explained."""
        return 1 - float(self._missing.square().mean() / self._variance)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the adder's response, ``[O]`` each."""
        mean = sum(means[chosen] @ self._sizes for means, chosen in zip(self._means, self._chosen, strict=True))
        assert isinstance(mean, Tensor)
        variance = (self._targets - self._missing).var(1) / self.scale.square()
        return mean, torch.where(variance.isfinite(), variance, torch.ones_like(variance))

    def _centred(self, tap: int) -> Tensor:
        return _responses(self.taps[tap], self.grids[tap]).sub_(self._means[tap][:, None])

    def _write(self, tap: int) -> None:
        self.weight[:, :, tap] = self.grids[tap][self._chosen[tap]] * self._sizes

    def _counts(self, chosen: Tensor) -> Tensor:
        """``[O, G]``: how much of every candidate's response there is, with those chosen, ``[O, K]``."""
        counts = torch.zeros(len(chosen), self.grids.shape[1], device=chosen.device)
        return counts.scatter_add_(1, chosen, self._sizes.expand(chosen.shape))

    def _fit_scale(self) -> None:
        """By least squares."""
        response = self._targets - self._missing
        share = (self._missing * response).sum(1) / response.square().sum(1).clamp_min(1e-12)
        self._missing.sub_(share[:, None] * response)
        self.scale *= 1 + share

    def _choose(self, chosen: Tensor, size: Tensor, responses: Tensor, gram: Tensor) -> int:
        """The best candidate of one tap for every output; ``chosen`` ``[O]`` and what is missing follow."""
        own, scale = gram.diagonal(), size * self.scale[:, None]
        distance = own - 2 * gram[chosen] + own[chosen][:, None]  # [O, G], between the responses
        gain = self._missing @ responses.T
        gain = gain - gain.gather(1, chosen[:, None])
        least, best = (scale * (scale * distance - 2 * gain)).min(1)
        rows = ((best != chosen) & (least < -self._least_gain)).nonzero().flatten()
        if len(rows):
            swap = F.one_hot(best[rows], len(own)) - F.one_hot(chosen[rows], len(own))
            self._missing.index_add_(0, rows, (scale[rows] * swap) @ responses, alpha=-1)
            chosen[rows] = best[rows]
        return len(rows)


def _responses(x: Tensor, grid: Tensor) -> Tensor:
    """``[G, P]``."""
    return (x - grid[:, None]).abs_().neg_()
