"""Make the student: a copy of the teacher whose planned convolutions are adders."""

from __future__ import annotations

import copy
import dataclasses
import time

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from anncvt.errors import AnncvtError
from anncvt.nn import _AdderNd
from anncvt.passes.observe import Observation, observe
from anncvt.program import Plan, Program
from anncvt.swap import swap


def rewrite(program: Program) -> Program:
    """Copy the teacher and swap the planned convolutions, in place by qualified name.

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
    student = copy.deepcopy(program.teacher).eval()
    count = swap(student, program.plan)
    _check(program, student)
    rewritten = dataclasses.replace(program, student=student, history=[*program.history])
    rewritten.record("rewritten", time.monotonic() - begin, {"adders": count})
    return rewritten


def _is_done(student: nn.Module, plan: Plan) -> bool:
    named = dict(student.named_modules(remove_duplicate=False))
    return all(isinstance(named.get(layer.name), _AdderNd) for layer in plan.swapped)


def _check(program: Program, student: nn.Module) -> None:
    """The student runs in both modes, with the teacher's shapes, through every adder, and kept layers are the same."""
    assert program.plan is not None
    size = program.preprocess.input_size
    before, after = _shapes(program.teacher, size), _shapes(student, size)
    if before.output_shapes != after.output_shapes:
        raise _wrong(f"outputs are {after.output_shapes}, were {before.output_shapes}")
    ran = set(after.order)
    asleep = [layer.name for layer in program.plan.swapped if layer.macs and layer.name not in ran]
    if asleep:
        raise _wrong(f"{asleep[0]} is never called: its parent keeps another reference to the convolution", asleep[0])
    _check_kept(program.teacher, student, program.plan)
    trouble = _trouble_in_training(student, size)
    if trouble is not None and _trouble_in_training(program.teacher, size) is None:
        raise _wrong(f"it does not run in training mode: {trouble}")


def _shapes(network: nn.Module, size: tuple[int, ...]) -> Observation:
    """One pass in eval mode: without data where that works, for only names and shapes are wanted."""
    try:
        return observe(_outline(network, "meta"), size)
    except Exception:  # a forward that looks at values, or makes tensors of its own, needs real ones
        return observe(network, size)


def _trouble_in_training(network: nn.Module, size: tuple[int, ...]) -> str | None:
    """Why a pass of two images in training mode fails, if it does."""
    message = ""
    for device in ("meta", "cpu"):
        outline = _outline(network, device).train()
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                outline(torch.zeros(2, *size, dtype=next(outline.parameters()).dtype, device=device))
            return None
        except Exception as error:  # arbitrary Python code runs here
            message = f"{type(error).__name__}: {error}"
    return message


def _outline(network: nn.Module, device: str) -> nn.Module:
    """A copy of the network with its tensors on ``device``."""
    memo: dict[int, object] = {id(buffer): buffer.to(device, copy=True) for buffer in network.buffers()}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to(device, copy=True), parameter.requires_grad)
    return copy.deepcopy(network, memo)


def _check_kept(teacher: nn.Module, student: nn.Module, plan: Plan) -> None:
    table = student.state_dict()
    for name, value in teacher.state_dict().items():
        if name not in table or table[name].shape != value.shape:
            raise _wrong(f"{name} is lost or has another shape")
    swapped = {layer.name for layer in plan.swapped}
    for name, module in teacher.named_modules():
        if isinstance(module, _ConvNd) and name not in swapped:
            twin = student.get_submodule(name)
            if type(twin) is not type(module) or not all(
                torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True)
            ):
                raise _wrong(f"{name} is to be kept and changed", name)


def _wrong(what: str, layer: str | None = None) -> AnncvtError:
    fix = f"keep it with --keep '{layer}'" if layer else "keep the layers concerned with --keep GLOB"
    return AnncvtError(f"the converted network is not as planned: {what}", fix=fix)
