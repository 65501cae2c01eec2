"""What a block is fitted on: its ends for every image, and inputs mixed of two images, for more than there are.

A deep block has more weights than some hundred images have features, and learns them by heart. But the teacher's block
answers whatever it is asked, so that examples can be made: ``m + sqrt(l) (a - m) + sqrt(1 - l) (b - m)`` of the inputs
``a`` and ``b`` of two images, with ``m`` the mean of all and ``l`` even in [0, 1]. Other than the lines of mixup (Zhang
et al., arXiv 1710.09412) this keeps the variances and covariances of the channels, which norms and adders depend on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockExamples:
    """Of every image, what arrives at a block in the teacher and in the student, and what leaves the teacher's."""

    teacher: Tensor  # [N, C, *]
    student: Tensor  # [N, C, *]
    targets: Tensor  # [N, C', *]


class Mixer:
    """Mixes inputs in pairs, with the statistics of those at ``own``."""

    def __init__(self, examples: BlockExamples, own: Tensor) -> None:
        self.own = own
        self.ends = [(x, *_bounds(x[own])) for x in (examples.teacher, examples.student)]

    def mixed(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The teacher's inputs and the student's of ``images``, each mixed with another one, both in the same way."""
        others = self.own[torch.randint(len(self.own), (len(images),), generator=generator)]
        share = torch.rand([len(images)] + [1] * (self.ends[0][0].dim() - 1), generator=generator)
        one, two = share.sqrt(), (1 - share).sqrt()
        # Nothing below what comes otherwise: there is nothing below zero behind a ReLU.
        teacher, student = (
            torch.maximum(mean + one * (x[images] - mean) + two * (x[others] - mean), least)
            for x, mean, least in self.ends
        )
        return teacher, student


def _bounds(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and least value of each channel."""
    over = [0, *range(2, x.dim())]
    return x.mean(over, keepdim=True), x.amin(over, keepdim=True)
