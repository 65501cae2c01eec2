"""What a person sees while work goes on: bars on a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from anncvt.progress import SILENT
from anncvt.progress import Progress as Reporter

#: A task that took less leaves no trace on the terminal.
WORTH_SHOWING = 2.0
#: Seconds between two log lines of one task.
LOG_EVERY = 10.0
#: Steps reported so soon after the start were done in an earlier, interrupted run.
AT_ONCE = 0.05


@contextlib.contextmanager
def reporter(*, quiet: bool = False, plain: bool = False) -> Iterator[Reporter]:
    """Something that shows progress on stderr until the ``with`` block ends.

    Args:
        quiet: show nothing at all.
        plain: lines instead of bars, also on a terminal.
    """
    if quiet:
        yield SILENT
    elif plain or not sys.stderr.isatty():
        yield Lines()
    else:
        bars = Bars(Console(stderr=True))
        with bars:
            yield bars


def figures(metrics: dict[str, float | str]) -> str:
    """``{"loss": 0.31251, "layer": "conv1"}`` as ``loss 0.3125 layer conv1``."""
    return " ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in metrics.items()
    )


class Bars:
    """Bars with elapsed and remaining time and the running figures."""

    def __init__(self, console: Console) -> None:
        self._display = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            _Count(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", style="cyan"),
            console=console,
            expand=True,
        )

    def __enter__(self) -> Bars:
        self._display.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._display.stop()

    @contextlib.contextmanager
    def task(self, description: str, total: float | None) -> Iterator[_Bar]:
        begin = time.monotonic()
        number = self._display.add_task(description, total=total, figures="", counted=total is not None)
        try:
            yield _Bar(self._display, number)
            if total is None:
                self._display.update(number, total=1, completed=1)
        finally:
            self._display.stop_task(number)
            if time.monotonic() - begin < WORTH_SHOWING:
                self._display.remove_task(number)

    def note(self, message: str) -> None:
        self._display.console.print(f"[yellow]note[/] {_plain(message)}", highlight=False)


class _Count(MofNCompleteColumn):
    """Steps done, for work that is counted in steps."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.fields["counted"] else Text()


class _Bar:
    def __init__(self, display: Progress, number: TaskID) -> None:
        self._display, self._number = display, number

    def advance(self, amount: float = 1, **metrics: float | str) -> None:
        shown: dict[str, Any] = {"figures": _plain(figures(metrics))} if metrics else {}
        self._display.update(self._number, advance=amount, **shown)


class Lines:
    """Plain lines on stderr, for logs: one every ten seconds of a task, and one at the end of a long one."""

    @contextlib.contextmanager
    def task(self, description: str, total: float | None) -> Iterator[_Line]:
        line = _Line(description, total)
        yield line
        line.finish()

    def note(self, message: str) -> None:
        print(f"note: {message}", file=sys.stderr, flush=True)


class _Line:
    def __init__(self, description: str, total: float | None) -> None:
        self._description, self._total = description, total
        self._begin = self._last = time.monotonic()
        self._done = self._before = 0.0
        self._metrics: dict[str, float | str] = {}

    def advance(self, amount: float = 1, **metrics: float | str) -> None:
        now = time.monotonic()
        if self._done == 0 and now - self._begin < AT_ONCE:
            self._before = amount
        self._done += amount
        self._metrics.update(metrics)
        if now - self._last >= LOG_EVERY:
            self._last = now
            self._say(now)

    def finish(self) -> None:
        now = time.monotonic()
        if now - self._begin >= WORTH_SHOWING:
            self._say(now)

    def _say(self, now: float) -> None:
        elapsed = now - self._begin
        parts = [f"{self._description}:"]
        if self._total:
            parts.append(f"{self._done:g}/{self._total:g}")
        parts.append(f"{elapsed:.0f} s")
        if self._total and self._before < self._done < self._total:
            left = elapsed * (self._total - self._done) / (self._done - self._before)
            parts.append(f"{left:.0f} s left")
        if self._metrics:
            parts.append(figures(self._metrics))
        print(" ".join(parts), file=sys.stderr, flush=True)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
