"""Last stage of calibration, where there is time for it: distillation of the logits, still without labels.

The joint stage soon gains nothing more: Adam at its low rates stays near what the layers learned. SGD with AdderNet's
adaptive step, as in training, goes further, but first loses: it takes some hundred steps to pay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anncvt.passes.adaptive_step import adaptive_adder_step
from anncvt.passes.fit_jointly import others, train_mode
from anncvt.passes.objectives import output_loss
from anncvt.passes.pairing import Pair
from anncvt.passes.stages import StageState, train
from anncvt.progress import SILENT, Progress


@dataclass(frozen=True)
class LogitFit:
    """How the logits are distilled: the rates of :mod:`anncvt.distill`, which measured best there."""

    steps: int = 0  # without a budget
    least_steps: int = 200  # with less time, the stage is left out
    batch_size: int = 128
    lr: float = 0.006  # SGD
    eta: float = 0.1  # adaptive step of the adder weights
    momentum: float = 0.9
    weight_decay: float = 5e-4  # of the weights of kept layers
    temperature: float = 4.0
    mirror: bool = True


def fit_logits(
    teacher: nn.Module,
    student: nn.Module,
    paired: list[Pair],
    batch: Callable[[int, bool], Tensor],
    how: LogitFit,
    state: StageState,
    deadline: float | None = None,
    on_step: Callable[[], None] = lambda: None,
    progress: Progress = SILENT,
) -> None:
    """Train ``student`` from ``state`` to the end; arguments as for :func:`~anncvt.passes.fit_jointly.fit_jointly`."""
    weights, rest = [pair.adder.weight for pair in paired], others(student, paired)
    groups: list[dict[str, object]] = [
        {"params": [*weights, *(p for p in rest if p.dim() <= 1)]},
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": how.weight_decay},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.SGD(groups, lr=how.lr, momentum=how.momentum)
    train_mode(student, paired)

    def loss() -> Tensor:
        x = batch(how.batch_size, how.mirror)
        with torch.no_grad():
            wanted = teacher(x)
        return output_loss(student(x), wanted, how.temperature)

    train(
        "fit logits",
        optimizer,
        loss,
        state,
        how.steps,
        deadline,
        chosen=lambda fit: fit if fit >= how.least_steps else 0,
        prepare=lambda: adaptive_adder_step(weights, how.eta),
        on_step=on_step,
        progress=progress,
    )
