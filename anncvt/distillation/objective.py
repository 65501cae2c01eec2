"""What the student minimises, term by term."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anncvt.distillation.batches import Batch
from anncvt.distillation.config import DistillConfig
from anncvt.distillation.features import FeatureLoss
from anncvt.distillation.processes import Processes
from anncvt.nn import channels_first
from anncvt.passes.objectives import divergence
from anncvt.passes.pairing import Pair, outputs_of


class Objective(nn.Module):
    """``CE(student, labels) + alpha * KL(teacher || student) + beta * L_mid``; its parameters are those of ``L_mid``.

    Args:
        paired: the swapped layers of the student.
        teaching: the convolutions they stand for.
    """

    def __init__(
        self, paired: Sequence[Pair], teaching: Sequence[nn.Module], config: DistillConfig, processes: Processes
    ) -> None:
        super().__init__()
        # In tuples, which hide them from nn.Module: the networks' parameters are not this one's.
        self._adders, self._convolutions = tuple(pair.adder for pair in paired), tuple(teaching)
        self._config = config
        self.features: FeatureLoss | None = None
        if config.feature_loss != "none":
            channels = [adder.out_channels for adder in self._adders]
            self.features = FeatureLoss(channels, config.feature_loss, processes if config.sync_bn else None)

    def forward(
        self, student: nn.Module, teacher: nn.Module, batch: Batch, *, teacher_learns: bool, dtype: torch.dtype | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """The terms ("ce", "kd", "mid") and, where it learns, the teacher's own loss.

        Args:
            dtype: of the networks' layers that autocast lowers; None: float32.
        """
        compared = [] if self.features is None else [*self._adders, *self._convolutions]
        lowered = torch.autocast(batch.x.device.type, dtype or torch.bfloat16, enabled=dtype is not None)
        # Only around these two passes: an evaluation inside would keep the outputs of all test images.
        with outputs_of(compared) as outputs, lowered:
            with torch.set_grad_enabled(teacher_learns):
                wanted = teacher(batch.x).float()
            got = student(batch.x).float()
        terms = {
            "ce": self.cross_entropy(got, batch),
            "kd": self._config.alpha * divergence(got, wanted.detach(), self._config.temperature),
        }
        if self.features is not None:
            adders = [channels_first(adder, outputs[adder][0]).float() for adder in self._adders]
            convolutions = [
                channels_first(adder, outputs[module][0]).float()
                for adder, module in zip(self._adders, self._convolutions, strict=True)
            ]
            terms["mid"] = self._config.beta * self.features(adders, convolutions)
        return terms, self.cross_entropy(wanted, batch) if teacher_learns else None

    def cross_entropy(self, logits: Tensor, batch: Batch) -> Tensor:
        """With smoothed labels, those of mixed images by their shares; the mean over the batch."""
        smoothing = self._config.label_smoothing
        own = F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)
        if batch.share == 1:
            return own
        return batch.share * own + (1 - batch.share) * F.cross_entropy(logits, batch.others, label_smoothing=smoothing)
