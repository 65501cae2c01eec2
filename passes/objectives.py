"""Losses that compare a student with its teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from anncvt.errors import AnncvtError, first_line


def divergence(got: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """KL divergence of softened logits, times ``temperature**2`` (Hinton et al., arXiv 1503.02531, section 2).

    ``[N, classes]``, or per pixel ``[N, classes, *]``; the mean over images (and pixels).
    """
    kl = F.kl_div(
        F.log_softmax(got / temperature, 1), F.log_softmax(wanted / temperature, 1), reduction="none", log_target=True
    )
    return temperature**2 * kl.sum(1).mean()


def output_loss(got: Any, wanted: Any, temperature: float) -> Tensor:
    """How far what one network returns is from what another does, summed over the tensors in it.

    :func:`divergence` where there are class scores, :func:`unexplained` where there is one number an image (or pixel).
    Tensors of different shapes, such as lists of detected objects, are left out.
    """
    loss = torch.zeros(())
    for mine, other in zip(tree_leaves(got), tree_leaves(wanted), strict=False):
        if isinstance(mine, Tensor) and isinstance(other, Tensor) and mine.shape == other.shape and mine.requires_grad:
            scores = mine.dim() > 1 and mine.shape[1] > 1
            loss = loss + (divergence(mine, other, temperature) if scores else unexplained(mine, other))
    return loss


def backward(loss: Tensor) -> None:
    """``loss.backward()``.

    Raises:
        AnncvtError: the network's own code lets no gradient through, which only shows here.
    """
    try:
        loss.backward()
    except RuntimeError as error:
        if "inplace operation" not in str(error) and "does not require grad" not in str(error):
            raise
        raise AnncvtError(
            f"the network cannot be trained: {first_line(error)}",
            fix="in its forward, do not overwrite what a layer has read, and do not turn gradients off",
        ) from error


def unexplained(got: Tensor, wanted: Tensor) -> Tensor:
    """Share of the variance of ``wanted`` that ``got`` misses, 1 - R^2 over the whole tensor."""
    return F.mse_loss(got, wanted) / wanted.var().clamp_min(1e-12)


@dataclass(frozen=True)
class LayerLoss:
    """What a layer misses of its targets, and ``weight`` times how much of that is seen behind its activation."""

    activation: Callable[[Tensor], Tensor] | None  # that follows, element by element
    weight: float

    def __call__(self, got: Tensor, wanted: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Share of the variance of ``wanted`` that ``got`` misses, and the loss.

        ``residual``: what the network adds to both before the activation.
        """
        error = unexplained(got, wanted)
        if self.activation is None:
            return error, error
        if residual is not None:
            got, wanted = got + residual, wanted + residual
        return error, error + self.weight * unexplained(self.activation(got), self.activation(wanted))
