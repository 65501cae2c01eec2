"""Second stage of calibration: all layers together, end to end, to the teacher's logits and layer outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anncvt.passes.fit_blocks import input_spread
from anncvt.passes.objectives import output_loss, unexplained
from anncvt.passes.pairing import Pair, outputs_of
from anncvt.passes.stages import StageState, train
from anncvt.progress import SILENT, Progress

#: More time than this many times the configured steps take is left to what comes after.
ROOM = 3


@dataclass(frozen=True)
class JointFit:
    """How all layers are fitted together; rates between those tried (benchmarks/RESULTS.md)."""

    steps: int = 300
    least_steps: int = 50  # with less time, the stage is left out
    batch_size: int = 64
    lr: float = 5e-4  # Adam, of everything but adder weights
    weight_lr: float = 0.003  # Adam, of adder weights, relative to the standard deviation of each layer's input
    temperature: float = 2.0
    feature_weight: float = 1.0
    mirror: bool = True


def fit_jointly(
    teacher: nn.Module,
    student: nn.Module,
    paired: list[Pair],
    batch: Callable[[int, bool], Tensor],
    how: JointFit,
    state: StageState,
    deadline: float | None = None,
    on_step: Callable[[], None] = lambda: None,
    progress: Progress = SILENT,
    *,
    outputs: bool = True,
) -> None:
    """Train ``student`` from ``state`` to the end; ``state`` follows.

    Args:
        batch: the next images, so many, mirrored at random or not.
        deadline: on the monotonic clock; the number of steps follows from it, but where there is time for
            :data:`ROOM` times ``how.steps``, only those are taken, and none where there is none for
            ``how.least_steps``. ``None``: ``how.steps``.
        on_step: called after every step.
        outputs: compare what the networks return, too, and not the layers alone.

    Raises:
        AnncvtError: the loss is not finite any more.
    """
    student.eval()
    if state.spread is None:
        state.spread = input_spread(paired, lambda: student(batch(how.batch_size, False)))
    groups = [{"params": [p.adder.weight], "lr": how.weight_lr * state.spread.get(p.name, 1.0)} for p in paired]
    optimizer = torch.optim.Adam([*groups, {"params": others(student, paired), "lr": how.lr}])
    train_mode(student, paired)
    r2: dict[str, float] = {}

    train(
        "fit jointly",
        optimizer,
        lambda: joint_loss(teacher, student, paired, batch(how.batch_size, how.mirror), how, r2, outputs),
        state,
        how.steps,
        deadline,
        chosen=lambda fit: how.steps if fit >= ROOM * how.steps else fit if fit >= how.least_steps else 0,
        on_step=on_step,
        shown=lambda: {"r2": sum(r2.values()) / max(1, len(r2))},
        progress=progress,
    )


def joint_loss(
    teacher: nn.Module,
    student: nn.Module,
    paired: list[Pair],
    x: Tensor,
    how: JointFit,
    r2: dict[str, float],
    outputs: bool,
) -> Tensor:
    """What ``student`` misses of its teacher's outputs and layers on the images ``x``; ``r2`` of the layers follows."""
    missed, got, wanted = _missed(teacher, student, paired, x)
    r2.update({name: 1 - float(share.detach()) for name, share in missed.items()})
    loss = output_loss(got, wanted, how.temperature) if outputs else torch.zeros(())
    return loss + how.feature_weight * torch.stack(list(missed.values())).mean() if missed else loss


def _missed(
    teacher: nn.Module, student: nn.Module, paired: list[Pair], x: Tensor
) -> tuple[dict[str, Tensor], Any, Any]:
    """Of each layer that both come through, the share of the teacher's variance that it misses; what both return."""
    with outputs_of([pair.conv_end for pair in paired] + [pair.adder_end for pair in paired]) as outputs:
        with torch.no_grad():
            wanted = teacher(x)
        got = student(x)
    ends = {pair.name: (outputs[pair.adder_end], outputs[pair.conv_end]) for pair in paired}
    missed = {name: unexplained(mine[0], other[0]) for name, (mine, other) in ends.items() if mine and other}
    return missed, got, wanted


@torch.no_grad()
def explained(teacher: nn.Module, student: nn.Module, paired: list[Pair], x: Tensor) -> dict[str, float]:
    """R^2 of each layer's output on the images ``x``, in the modes the networks are in."""
    return {name: 1 - float(share) for name, share in _missed(teacher, student, paired, x)[0].items()}


@torch.no_grad()
def refresh_statistics(student: nn.Module, paired: list[Pair], batches: Iterable[Tensor]) -> None:
    """Cumulative statistics of the fitted norms over ``batches``."""
    norms = [pair.norm for pair in paired if isinstance(pair.norm, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    train_mode(student, paired)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    for batch in batches:
        student(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def train_mode(student: nn.Module, paired: list[Pair]) -> None:
    """Batch statistics in the fitted norms; everything else (dropout, the kept layers) as at inference."""
    student.eval()
    for pair in paired:
        pair.norm.train()


def others(student: nn.Module, paired: list[Pair]) -> list[nn.Parameter]:
    """Every parameter that is not an adder's weight."""
    weights = {pair.adder.weight for pair in paired}
    return [parameter for parameter in student.parameters() if parameter not in weights]
