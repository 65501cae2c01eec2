"""Running a pass: its graphs before and after on request, and what has to hold after each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from anncvt.passes import dump, verify
from anncvt.passes.calibrate import calibrate
from anncvt.passes.plan import plan
from anncvt.passes.rewrite import rewrite
from anncvt.program import Program

#: The passes in order. Each takes a program and returns one; the stage it records is in :data:`anncvt.program.STAGES`.
PIPELINE: tuple[Callable[..., Program], ...] = (plan, rewrite, calibrate)


def apply(
    step: Callable[..., Program], program: Program, *arguments: Any, to: Path | None = None, **more: Any
) -> Program:
    """Run one pass of :data:`PIPELINE` and check what it made.

    Args:
        step: the pass.
        program, arguments, more: what it takes.
        to: a folder; the graphs before and after the pass are written there, ``2-rewrite.before.txt`` and so on.

    Raises:
        AnncvtError: the pass failed, or its result does not hold up. ``program`` is as it was, unless the pass changes
            weights in place (calibration).
    """
    if to is not None:
        dump.write(program, to / _file(step, "before"))
    done = step(program, *arguments, **more)
    if done.student is not None:
        verify.graphs(done.student)
        verify.finite(done.student)
    if to is not None:
        dump.write(done, to / _file(step, "after"))
    return done


def _file(step: Callable[..., Program], when: str) -> str:
    return f"{PIPELINE.index(step) + 1}-{step.__name__}.{when}.txt"
