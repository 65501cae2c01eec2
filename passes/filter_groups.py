"""Filters of one layer that share a scale: groups by their largest weight.

Source: Redistribution of Weights and Activations for AdderNet Quantization, NeurIPS 2022.
"""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 50


def filter_groups(weight: Tensor, groups: int) -> Tensor:
    """k-means (Lloyd) of the filters by ``max |w|``, from evenly spread quantiles.

    Args:
        weight: ``[O, ...]``.
        groups: at most so many; filters with equal maxima stay together.

    Returns:
        ``[O]`` int64, the group of each filter, ascending with its maximum, none empty.
    """
    largest = weight.flatten(1).abs().amax(1).double()
    centres = torch.quantile(largest, (torch.arange(groups, dtype=torch.float64) + 0.5) / groups).unique()
    for _ in range(ITERATIONS):
        # By the middles between centres: distances from them, rounded, may have another order than the filters.
        nearest = torch.searchsorted((centres[1:] + centres[:-1]) / 2, largest)
        moved = torch.stack([largest[nearest == at].mean() for at in nearest.unique()])
        if len(moved) == len(centres) and torch.equal(moved, centres):
            break
        centres = moved
    return nearest.unique(return_inverse=True)[1]
