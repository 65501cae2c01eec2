"""The passes in order. Each takes a program and returns one; what it needs besides is a keyword argument."""

from __future__ import annotations

from collections.abc import Callable

from anncvt.passes.calibrate import calibrate
from anncvt.passes.plan import plan
from anncvt.passes.rewrite import rewrite
from anncvt.program import Program

#: ``calibrate`` also takes images; the stage each one records is in :data:`anncvt.program.STAGES`.
PIPELINE: tuple[Callable[..., Program], ...] = (plan, rewrite, calibrate)
