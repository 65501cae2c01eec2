"""The adaptive step of AdderNet, for training and calibration alike."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn


@torch.no_grad()
def adaptive_adder_step(weights: Iterable[nn.Parameter], eta: float) -> None:
    """Scale each adder layer's weight gradient to ``eta * sqrt(numel) / ||dw||_2`` (arXiv 1912.13200, eq. 12-13).

    The gradients of adder layers differ by orders of magnitude between layers; this gives all the same step. To be
    called after gradient accumulation and all-reduce: inside backward, as the paper's code has it, it breaks both.
    """
    for weight in weights:
        if weight.grad is not None:
            norm = weight.grad.norm().clamp_min(1e-12)
            weight.grad.mul_(eta * math.sqrt(weight.numel()) / norm)
