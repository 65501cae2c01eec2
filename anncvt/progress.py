"""How long work reports itself, without knowing who shows it (the CLI shows bars, a library call nothing)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol


class Task(Protocol):
    """One bar."""

    def advance(self, amount: float = 1, **metrics: float | str) -> None:
        """Move on by ``amount``; ``metrics`` are the running figures shown beside the bar (``loss=0.3``)."""


class Progress(Protocol):
    """Something that can show bars and single lines."""

    def task(self, description: str, total: float | None) -> AbstractContextManager[Task]:
        """A bar of ``total`` steps (``None``: unknown) for the duration of the ``with`` block."""

    def note(self, message: str) -> None:
        """A line the user should see (a fallback taken, a default assumed)."""


class _Silent:
    def advance(self, amount: float = 1, **metrics: float | str) -> None:
        return None

    @contextlib.contextmanager
    def task(self, description: str, total: float | None) -> Iterator[Task]:
        yield self

    def note(self, message: str) -> None:
        return None


SILENT: Progress = _Silent()
