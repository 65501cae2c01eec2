"""Teacher and student side by side: which modules correspond, and what flows through them in one forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from anncvt.errors import AnncvtError
from anncvt.nn import _AdderNd
from anncvt.program import Program


@dataclass(frozen=True)
class Pair:
    """One swapped convolution and its adder, with the norm that follows each."""

    name: str
    conv: nn.Module
    conv_end: nn.Module  # the teacher's BatchNorm, or the convolution itself where none follows
    adder: _AdderNd
    norm: nn.Module  # the student's BatchNorm: the CNN's own, or the one that was inserted

    @property
    def adder_end(self) -> nn.Module:
        """The student's module whose output stands for that of :attr:`conv_end`."""
        return self.adder if self.norm is self.adder.norm else self.norm


def pairs(program: Program) -> list[Pair]:
    """The swapped layers of a rewritten program, in execution order.

    Raises:
        AnncvtError: the program is not rewritten yet.
    """
    if program.plan is None or program.student is None:
        raise AnncvtError("the network is not converted yet", fix="run the plan and rewrite passes first")
    found = []
    for layer in program.plan.swapped:
        conv = program.teacher.get_submodule(layer.name)
        adder = cast(_AdderNd, program.student.get_submodule(layer.name))
        if layer.bn is None:
            assert adder.norm is not None, f"{layer.name}: the plan promises a norm"
            found.append(Pair(layer.name, conv, conv, adder, adder.norm))
        else:
            bn = program.teacher.get_submodule(layer.bn)
            found.append(Pair(layer.name, conv, bn, adder, program.student.get_submodule(layer.bn)))
    return found


def channels_last(x: Tensor) -> Tensor:
    """``x`` in the kernels' layout."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


@contextlib.contextmanager
def outputs_of(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """Record what each module returns inside the block; a module that is called twice has two entries."""
    kept: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept[module].append(output)

    handles = [module.register_forward_hook(keep) for module in kept]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def gradients(paired: Iterable[Pair], kind: str) -> Iterator[None]:
    """The adders' ``gradient`` inside the block ("full" or "exact"); outside, what it was."""
    before = [(pair.adder, pair.adder.gradient) for pair in paired]
    for adder, _ in before:
        adder.gradient = kind
    try:
        yield
    finally:
        for adder, gradient in before:
            adder.gradient = gradient
