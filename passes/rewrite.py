"""Make the student: a copy of the teacher whose planned layers are adders."""

from __future__ import annotations

import dataclasses
import time

from torch import nn

from anncvt.copies import copied
from anncvt.errors import AnncvtError
from anncvt.nn import _AdderNd
from anncvt.passes import verify
from anncvt.program import Plan, Program
from anncvt.swap import swap


def rewrite(program: Program) -> Program:
    """Copy the teacher and swap the planned layers, in place by qualified name.

    The student stays the user's own module tree instead of becoming an FX GraphModule. A GraphModule would gain
    nothing here: hooks, ``torch.export`` and ``state_dict`` work on modules alike, while it freezes the mode it was
    traced in and one path through every branch, breaks parents that read attributes of their children, and exists for
    only part of all networks. The graphs serve to decide (see :mod:`anncvt.passes.trace`).

    Returns:
        The program with a student in eval mode. A program that already has the planned student comes back as it is.

    Raises:
        AnncvtError: there is no plan, or the student does not behave as planned. The given program is unchanged then.
    """
    begin = time.monotonic()
    if program.plan is None:
        raise AnncvtError("there is no plan yet", where=program.source.model, fix="plan the program first")
    if program.student is not None and _is_done(program.student, program.plan):
        return program
    student = copied(program.teacher).eval()
    count = swap(student, program.plan)
    verify.rewritten(program, student)
    done = dataclasses.replace(program, student=student, history=[*program.history])
    done.record("rewritten", time.monotonic() - begin, {"adders": count})
    return done


def _is_done(student: nn.Module, plan: Plan) -> bool:
    named = dict(student.named_modules(remove_duplicate=False))
    adders = [(layer, named.get(layer.name)) for layer in plan.swapped]
    return all(isinstance(adder, _AdderNd) and adder.copies == layer.copies for layer, adder in adders)
