"""Timing on a machine that may have other work to do."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Processor time counts all threads together, and not what other processes take.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def interleaved(calls: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """The least seconds of each call; they take turns, so that a disturbance hits all of them."""
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = clock()
            call()
            best[name] = min(best[name], clock() - start)
    return best
