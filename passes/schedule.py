"""How many steps, and at which learning rate: shared by calibration and distillation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch

#: Neighbouring numbers of steps differ by this factor, so that timing noise rarely changes the result of a run.
GRID = 1.25


def cosine(step: int, steps: int, warmup: float = 0.1) -> float:
    """Linear warm-up over the share ``warmup`` of ``steps``, then half a cosine, as a factor of the peak rate."""
    ramp = round(warmup * steps)
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def set_rates(optimizer: torch.optim.Optimizer, peaks: Sequence[float], factor: float) -> None:
    """Set every parameter group to ``factor`` times its peak learning rate."""
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * factor


def steps_within(seconds: float, trial: Callable[[], object], least: int = 10) -> int:
    """How many steps fit into ``seconds``, from the median of five trials (the first compiles kernels)."""
    begin = time.monotonic()
    timed = []
    for _ in range(5):
        start = time.monotonic()
        trial()
        timed.append(time.monotonic() - start)
    fit = (seconds - (time.monotonic() - begin)) / max(sorted(timed)[2], 1e-6)
    return max(least, round(GRID ** math.floor(math.log(max(fit, 1.0), GRID))))


class Shares:
    """Divides the time until ``deadline`` among tasks by weight; what one leaves over goes to those after it.

    Args:
        weights: of the tasks that are still to be done.
        deadline: on the monotonic clock; ``None``: nobody's time is limited.
    """

    def __init__(self, weights: Mapping[str, float], deadline: float | None) -> None:
        self._weights, self._deadline = dict(weights), deadline

    def take(self, name: str) -> float | None:
        """Seconds for the task ``name``, which starts now."""
        total = sum(self._weights.values())
        weight = self._weights.pop(name)
        if self._deadline is None:
            return None
        return max(0.0, self._deadline - time.monotonic()) * weight / total
