"""What a layer is fitted on: windows of its input and of what it should give, from every image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anncvt.nn import _AdderNd
from anncvt.passes.pairing import channels_last

#: Side of a window of the output. Small, so that a batch has pixels of many images: neighbours say much the same.
WINDOW = 8
#: Output pixels that are kept at most: more are not seen often enough to matter.
POSITIONS = 1 << 20
#: One image in so many is not fitted on but judges the fit.
HELD_OUT = 16


@dataclass(frozen=True)
class Examples:
    """Windows ``[n, C, *]``, row by row."""

    inputs: Tensor  # what arrives in the student, padding included
    targets: Tensor  # what the norm should give
    residual: Tensor | None  # what the student adds to it

    def __len__(self) -> int:
        return len(self.targets)

    def rows(self, indices: Tensor | slice) -> Examples:
        """The chosen rows in channels_last, the kernels' layout."""
        pick = [None if t is None else channels_last(t[indices]) for t in (self.inputs, self.targets, self.residual)]
        assert pick[0] is not None and pick[1] is not None
        return Examples(pick[0], pick[1], pick[2])


def collect(
    adder: _AdderNd,
    chunks: Iterable[tuple[Tensor, Tensor, Tensor | None]],
    images: int,
    memory: int,
    generator: torch.Generator,
) -> tuple[Examples, Examples]:
    """Windows at random places of every image, of those to fit on and of those held out.

    Args:
        adder: whose geometry says which inputs a window of outputs needs.
        chunks: input, target and residual of whole images, ``images`` of them in all.
        memory: bytes that the windows may take.
    """
    fitted: list[Examples] = []
    held: list[Examples] = []
    plan: _Windows | None = None
    seen = 0
    for x, target, residual in chunks:
        if adder.ndim == 0:
            x, target, residual = _tokens(x), _tokens(target), None if residual is None else _tokens(residual)
        if plan is None:
            plan = _Windows(adder, x, target, images, memory, residual is not None)
        number = torch.arange(seen, seen + len(x))
        seen += len(x)
        windows = plan.cut(x, target, residual, generator)
        judge = (number % HELD_OUT == HELD_OUT - 1).repeat_interleave(plan.each)
        fitted.append(windows.rows(~judge))
        held.append(windows.rows(judge))
    train, test = _joined(fitted), _joined(held)
    return train, test if len(test) else train


def batches(examples: Examples, size: int, generator: torch.Generator) -> Iterator[Examples]:
    """Random batches of ``size`` rows without end (of all, if there are fewer)."""
    return map(examples.rows, shuffled(len(examples), min(size, len(examples)), generator))


def shuffled(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Random batches of ``size`` of ``count`` indices without end; in each round, every index comes at most once."""
    while True:
        yield from (part for part in torch.randperm(count, generator=generator).split(size) if len(part) == size)


class _Windows:
    """Where windows lie and how many are cut from an image."""

    def __init__(self, adder: _AdderNd, x: Tensor, target: Tensor, images: int, memory: int, residual: bool) -> None:
        self.adder = adder
        self.side = [min(WINDOW if adder.ndim else 1, size) for size in target.shape[2:]]
        linear = (1,)
        self.stride = adder.stride or linear
        geometry = zip(self.side, self.stride, adder.kernel_size or linear, adder.dilation or linear, strict=True)
        self.reach = [(side - 1) * stride + (kernel - 1) * dilation + 1 for side, stride, kernel, dilation in geometry]
        self.places = [size - side + 1 for size, side in zip(target.shape[2:], self.side, strict=True)]
        pixels = math.prod(self.side)
        outputs = target.shape[1] * pixels * (2 if residual else 1)
        size = 4 * (x.shape[1] * math.prod(self.reach) + outputs)
        whole = math.ceil(math.prod(target.shape[2:]) / pixels)
        #: windows per image
        self.each = max(1, min(whole, POSITIONS // (images * pixels), memory // (images * size)))

    def cut(self, x: Tensor, target: Tensor, residual: Tensor | None, generator: torch.Generator) -> Examples:
        count = len(x) * self.each
        image = torch.arange(len(x)).repeat_interleave(self.each)
        at = [torch.randint(places, (count,), generator=generator) for places in self.places]
        start = [first * stride for first, stride in zip(at, self.stride, strict=True)]
        inputs = _cut(self.adder.padded(x), image, start, self.reach)
        targets = _cut(target, image, at, self.side)
        added = None if residual is None else _cut(residual, image, at, self.side)
        if self.adder.ndim == 0:
            inputs, targets, added = inputs[..., 0], targets[..., 0], None if added is None else added[..., 0]
        return Examples(inputs, targets, added)


def _tokens(x: Tensor) -> Tensor:
    """What a Linear layer reads or gives, ``[N, *, C]``, as a map ``[N, C, L]``."""
    return x.reshape(len(x), -1, x.shape[-1]).movedim(-1, 1)


def _cut(x: Tensor, image: Tensor, start: list[Tensor], sides: list[int]) -> Tensor:
    for dimension, side in enumerate(sides):
        x = x.unfold(dimension + 2, side, 1)
    places: tuple[Any, ...] = (image, slice(None), *start)
    return x[places]


def _joined(parts: list[Examples]) -> Examples:
    residual = [part.residual for part in parts if part.residual is not None]
    return Examples(
        channels_last(torch.cat([part.inputs for part in parts])),
        channels_last(torch.cat([part.targets for part in parts])),
        channels_last(torch.cat(residual)) if residual else None,
    )
