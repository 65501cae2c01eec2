"""What the float network computes at some places, against which the integers are measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anncvt.images import Images
from anncvt.passes.pieces import Piece, Pieces, node_values
from anncvt.program import Program
from anncvt.progress import SILENT, Progress

#: Values kept of each tensor, about.
VALUES = 2**19
#: Places (an image and a pixel) of each tensor, at least and at most.
PLACES = (1024, 16384)
#: Bytes of float activations at a time.
MEMORY = 1 << 30


@dataclass(frozen=True)
class Samples:
    """What a piece computes at ``M`` places."""

    at: Tensor  # [M] int64, sorted: place (image * H + y) * W + x
    line: Tensor  # [M, C] float32, before residual and activation
    output: Tensor  # [M, C] float32
    residual: Tensor | None  # [M, C] float32


def collect(
    program: Program, pieces: Pieces, images: Images, *, seed: int = 0, progress: Progress = SILENT
) -> dict[str, Samples]:
    """Run the student over ``images`` and keep samples of every piece that has a grid of its own."""
    assert program.student is not None
    wanted = [piece for piece in pieces.order if piece.scale is not None]
    places = {piece.name: positions(piece, len(images), seed) for piece in wanted}
    kept: dict[str, list[tuple[Tensor, Tensor, Tensor | None]]] = {piece.name: [] for piece in wanted}
    each = 4 * 4 * sum(math.prod(piece.shape) for piece in pieces.order)
    chunk = max(1, min(64, MEMORY // each))
    done = 0
    with progress.task("observing activations", len(images)) as task:
        for indices in torch.arange(len(images)).split(chunk):
            values = node_values(pieces.graph, program.student, images.batch(indices, program.preprocess))
            for piece in wanted:
                here = _within(places[piece.name], piece.shape, done, len(indices))
                residual = None
                if piece.residual is not None:
                    residual = take([_maps(values[pieces.node(piece.residual)])], here)
                line, output = (take([_maps(values[node])], here) for node in (piece.line, piece.node))
                kept[piece.name].append((line, output, residual))
            done += len(indices)
            task.advance(len(indices))
    return {name: _joined(places[name], parts) for name, parts in kept.items()}


def _joined(at: Tensor, parts: list[tuple[Tensor, Tensor, Tensor | None]]) -> Samples:
    lines, outputs, residuals = zip(*parts, strict=True)
    return Samples(at, torch.cat(lines), torch.cat(outputs), None if residuals[0] is None else torch.cat(residuals))


def positions(piece: Piece, images: int, seed: int) -> Tensor:
    """Places in the output of a piece over ``images`` images, ascending, the same for the same ``seed``."""
    total = images * piece.shape[1] * piece.shape[2]
    count = min(max(VALUES // piece.shape[0], PLACES[0]), PLACES[1], total)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(total, (count,), generator=generator).sort().values if count < total else torch.arange(total)


def take(chunks: Sequence[Tensor], at: Tensor) -> Tensor:
    """``[M, C]``: what ``chunks`` (``[n, C, H, W]`` each, together all images) hold at the places ``at``."""
    height, width = chunks[0].shape[2:]
    found, begin = [], 0
    for chunk in chunks:
        size = len(chunk) * height * width
        local = at[(at >= begin) & (at < begin + size)] - begin
        image, pixel = local // (height * width), local % (height * width)
        found.append(chunk[image, :, pixel // width, pixel % width])
        begin += size
    return torch.cat(found)


def _within(at: Tensor, shape: tuple[int, int, int], begin: int, count: int) -> Tensor:
    """The places in images ``begin`` to ``begin + count``, counted from there."""
    each = shape[1] * shape[2]
    return at[(at >= begin * each) & (at < (begin + count) * each)] - begin * each


def _maps(values: Tensor) -> Tensor:
    return values if values.ndim == 4 else values[:, :, None, None]
