"""A progress that remembers what it was told."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from anncvt.progress import SILENT


class Recorder:
    """Every ``advance`` as (amount, metrics); ``on_advance`` sees the sum so far and may raise.

    ``watched``: the description of the only task that counts.
    """

    def __init__(self, on_advance: Callable[[float], object] = lambda done: None, watched: str | None = None) -> None:
        self.watched = watched
        self.steps: list[tuple[float, dict]] = []
        self.totals: list[float | None] = []
        self.on_advance = on_advance
        self.notes: list[str] = []

    @property
    def done(self) -> float:
        return sum(amount for amount, _ in self.steps)

    @contextlib.contextmanager
    def task(self, description, total):
        if self.watched not in (None, description):
            with SILENT.task(description, total) as task:
                yield task
            return
        self.totals.append(total)
        yield self

    def advance(self, amount=1, **metrics):
        self.steps.append((amount, metrics))
        self.on_advance(self.done)

    def note(self, message):
        self.notes.append(message)
