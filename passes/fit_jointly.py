"""Second stage of calibration: all layers together, end to end, to the teacher's logits and layer outputs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anncvt.errors import AnncvtError
from anncvt.passes.fit_blocks import input_spread
from anncvt.passes.objectives import divergence, unexplained
from anncvt.passes.pairing import Pair, outputs_of
from anncvt.passes.schedule import cosine, set_rates, steps_within
from anncvt.progress import SILENT, Progress


@dataclass(frozen=True)
class JointFit:
    """How all layers are fitted together; the rates measured best before there were blocks (benchmarks/RESULTS.md)."""

    steps: int = 300
    batch_size: int = 64
    lr: float = 3e-4  # Adam, of everything but adder weights
    weight_lr: float = 0.001  # Adam, of adder weights, relative to the standard deviation of each layer's input
    temperature: float = 2.0
    feature_weight: float = 1.0
    augment: bool = True


@dataclass
class JointState:
    """Where an interrupted run stands, for the next one to go on from."""

    step: int = 0
    steps: int | None = None  # in all, once that is decided
    spread: dict[str, float] | None = None  # of each layer's input at the start
    optimizer: dict[str, Any] | None = None


def fit_jointly(
    teacher: nn.Module,
    student: nn.Module,
    paired: list[Pair],
    batch: Callable[[bool], Tensor],
    how: JointFit,
    state: JointState,
    deadline: float | None = None,
    on_step: Callable[[], None] = lambda: None,
    progress: Progress = SILENT,
) -> dict[str, float]:
    """Train ``student`` from ``state`` to the end; ``state`` follows.

    Args:
        batch: the next images, augmented or not.
        deadline: on the monotonic clock; the number of steps follows from it. ``None``: ``how.steps``.
        on_step: called after every step.

    Returns:
        R^2 per layer on the last batch.

    Raises:
        AnncvtError: the loss is not finite any more.
    """
    student.eval()
    if state.spread is None:
        state.spread = input_spread(paired, lambda: student(batch(False)))
    groups = [{"params": [p.adder.weight], "lr": how.weight_lr * state.spread[p.name]} for p in paired]
    weights = {pair.adder.weight for pair in paired}
    others = [parameter for parameter in student.parameters() if parameter not in weights]
    optimizer = torch.optim.Adam([*groups, {"params": others, "lr": how.lr}])
    peaks = [group["lr"] for group in optimizer.param_groups]
    if state.optimizer is not None:
        optimizer.load_state_dict(state.optimizer)
    train_mode(student, paired)
    r2: dict[str, float] = {}

    def step(factor: float) -> float:
        set_rates(optimizer, peaks, factor)
        loss = _loss(teacher, student, paired, batch(how.augment), how, r2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    if state.steps is None:
        state.steps = how.steps
        if deadline is not None:
            state.steps = steps_within(deadline - time.monotonic(), lambda: step(0.0))
    with progress.task("fit jointly", state.steps) as task:
        task.advance(state.step)
        while state.step < state.steps:
            loss = step(cosine(state.step, state.steps))
            if not math.isfinite(loss):
                raise AnncvtError(
                    f"calibration diverged: the loss is {loss} at step {state.step + 1} of {state.steps}",
                    fix="use images like those the network was trained on, and check --mean and --std",
                )
            state.step += 1
            state.optimizer = optimizer.state_dict()
            task.advance(1, loss=loss, r2=sum(r2.values()) / len(r2))
            on_step()
    return r2


def _loss(
    teacher: nn.Module, student: nn.Module, paired: list[Pair], x: Tensor, how: JointFit, r2: dict[str, float]
) -> Tensor:
    ends = [pair.conv_end for pair in paired] + [pair.adder_end for pair in paired]
    with outputs_of(ends) as outputs:
        with torch.no_grad():
            wanted = teacher(x)
        got = student(x)
    missed = {pair.name: unexplained(outputs[pair.adder_end][0], outputs[pair.conv_end][0]) for pair in paired}
    r2.update({name: 1 - float(share.detach()) for name, share in missed.items()})
    features = how.feature_weight * torch.stack(list(missed.values())).mean()
    return features + divergence(got, wanted, how.temperature)


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
