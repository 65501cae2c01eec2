"""A stage of calibration that trains the whole network: how many steps, at which rates, and where it goes on later."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anncvt.errors import AnncvtError
from anncvt.passes.objectives import backward
from anncvt.passes.schedule import cosine, set_rates, steps_within
from anncvt.progress import Progress


@dataclass
class StageState:
    """Where an interrupted stage stands, for the next run to go on from."""

    step: int = 0
    steps: int | None = None  # in all, once that is decided
    spread: dict[str, float] | None = None  # of each layer's input at the start
    optimizer: dict[str, Any] | None = None


def train(
    name: str,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
    state: StageState,
    steps: int,
    deadline: float | None,
    *,
    chosen: Callable[[int], int],
    prepare: Callable[[], None] = lambda: None,
    on_step: Callable[[], None] = lambda: None,
    shown: Callable[[], Mapping[str, float]] = dict,
    progress: Progress,
) -> None:
    """Minimise ``loss`` from ``state`` to the end of the stage, with warm-up and a cosine schedule.

    Args:
        name: of the stage, for the progress bar.
        optimizer: its rates are the peaks of the schedule.
        loss: of the next batch.
        state: follows.
        steps: how many, without a ``deadline``.
        deadline: on the monotonic clock.
        chosen: how many to take of those that fit until the deadline.
        prepare: called between the backward pass and the optimizer.
        on_step: called after every step.
        shown: what the progress bar says besides the loss.

    Raises:
        AnncvtError: the loss is not finite any more.
    """
    peaks = [group["lr"] for group in optimizer.param_groups]
    if state.optimizer is not None:
        optimizer.load_state_dict(state.optimizer)

    def step(factor: float) -> float:
        set_rates(optimizer, peaks, factor)
        value = loss()
        optimizer.zero_grad()
        backward(value)
        prepare()
        optimizer.step()
        return float(value.detach())

    if state.steps is None:
        state.steps = steps
        if deadline is not None:
            state.steps = chosen(steps_within(deadline - time.monotonic(), lambda: step(0.0)))
    if not state.steps:
        return
    with progress.task(name, state.steps) as task:
        task.advance(state.step)
        while state.step < state.steps:
            value = step(cosine(state.step, state.steps))
            if not math.isfinite(value):
                raise AnncvtError(
                    f"calibration diverged: the loss is {value} at step {state.step + 1} of {state.steps}",
                    where=name,
                    fix="use images like those the network was trained on, and check --mean and --std",
                )
            state.step += 1
            state.optimizer = optimizer.state_dict()
            task.advance(1, loss=value, **shown())
            on_step()
