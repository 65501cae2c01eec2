"""Histograms of weights and activations, with the Gaussian and the Laplace distribution that fit them best.

AdderNet (arXiv 1912.13200) finds the weights of adder networks Laplace-distributed and those of CNNs Gaussian.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

BINS = 48
#: Values beyond so many standard deviations are in the end bins.
REACH = 4.5


@dataclass(frozen=True)
class Distribution:
    """Of one tensor.

    Attributes:
        low, high: edges of the histogram.
        density: of its bins, integrating to 1.
        mean, deviation: of the Gaussian of maximum likelihood.
        median, spread: of the Laplace distribution of maximum likelihood, ``exp(-|x - median| / spread) / (2 spread)``.
        gaussian, laplace: mean log-likelihood of the values under each, in nats; the greater fits better.
    """

    low: float
    high: float
    density: tuple[float, ...]
    mean: float
    deviation: float
    median: float
    spread: float
    gaussian: float
    laplace: float

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "density": list(self.density)}


def distribution(values: Tensor) -> Distribution | None:
    """Of ``values``, any shape; None where they are all the same."""
    x = values.detach().flatten().double()
    if len(x) == 0 or float(x.min()) == float(x.max()):
        return None
    mean, deviation = float(x.mean()), float(x.std(unbiased=False))
    median = float(x.median())
    spread = float((x - median).abs().mean())
    low, high = max(float(x.min()), mean - REACH * deviation), min(float(x.max()), mean + REACH * deviation)
    counts = torch.histc(x.clamp(low, high), BINS, low, high)
    density = counts / counts.sum() * BINS / (high - low)
    # At the maximum the exponents average to -1/2 and -1.
    gaussian = -0.5 * math.log(2 * math.pi * deviation**2) - 0.5
    laplace = -math.log(2 * spread) - 1
    return Distribution(low, high, tuple(density.tolist()), mean, deviation, median, spread, gaussian, laplace)


def standardised(tensors: list[Tensor]) -> Tensor:
    """Each tensor at mean 0 and deviation 1, all in one: layers of different scale can be looked at together."""
    parts = []
    for tensor in tensors:
        x = tensor.detach().flatten().double()
        deviation = x.std(unbiased=False)
        if float(deviation) > 0:
            parts.append((x - x.mean()) / deviation)
    return torch.cat(parts) if parts else torch.zeros(0)
