"""Losses that compare a student with its teacher."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def divergence(got: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """KL divergence of softened logits, times ``temperature**2`` (Hinton et al., arXiv 1503.02531, section 2).

    ``[N, classes]``, or per pixel ``[N, classes, *]``; the mean over images (and pixels).
    """
    kl = F.kl_div(
        F.log_softmax(got / temperature, 1), F.log_softmax(wanted / temperature, 1), reduction="none", log_target=True
    )
    return temperature**2 * kl.sum(1).mean()


def unexplained(got: Tensor, wanted: Tensor) -> Tensor:
    """Share of the variance of ``wanted`` that ``got`` misses, 1 - R^2 over the whole tensor."""
    return F.mse_loss(got, wanted) / wanted.var().clamp_min(1e-12)
