"""Layer-wise fitting: in network order, each adder learns to give what the teacher computes at its place."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anncvt.nn import channels_first
from anncvt.passes.initialise import fit_line, map_weights
from anncvt.passes.objectives import unexplained
from anncvt.passes.pairing import Pair
from anncvt.passes.schedule import cosine, set_rates, steps_within
from anncvt.passes.walk import Walk, reader

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}


@dataclass(frozen=True)
class LayerFit:
    """How one layer is fitted; the defaults are what measured best (benchmarks/RESULTS.md)."""

    steps: int = 600
    positions: int = 16384  # output pixels per step: the cost of a step, whatever the size of the maps
    weight_lr: float = 0.1  # relative to the standard deviation of the layer's input
    norm_lr: float = 0.01
    relu_weight: float = 5.0  # of the error behind the ReLU, where one follows


@dataclass(frozen=True)
class _Sequel:
    """What the network does with a layer's normed output before the next layer reads it."""

    added: fx.Node | None  # the other operand of a residual addition, when it is known already
    relu: bool


@dataclass(frozen=True)
class _Examples:
    """What a layer is fitted on, per chunk of images."""

    inputs: list[Tensor]  # what arrives in the student
    targets: list[Tensor]  # what the norm should give
    residual: list[Tensor] | None  # what the student adds to it


def fit_layers(
    graph: fx.Graph,
    teacher: nn.Module,
    student: nn.Module,
    paired: list[Pair],
    images: list[Tensor],
    how: LayerFit,
    generator: torch.Generator,
    seconds: float | None = None,
    on_step: Callable[[str, float], None] = lambda name, error: None,
) -> dict[str, float]:
    """Walk both networks; at every adder, map its weights from the input that really arrives and fit them.

    The input is the student's own, so a layer learns to live with the errors of the ones before it. Where its output is
    added to a shortcut, the target also makes up for the shortcut's error. Input and target are kept for all images, so
    no part of a network runs twice.

    Args:
        graph: of the teacher (the student's is equal).
        teacher, student: in eval mode.
        paired: the swapped layers.
        images: in chunks ``[n, C, H, W]``.
        how: steps and learning rates.
        generator: of the order of the images.
        seconds: time for all layers; the numbers of steps follow from it. ``None``: ``how.steps`` each.
        on_step: called with the layer's name and its share of unexplained variance after every step; the last call of a
            layer comes before the first of the next.

    Returns:
        R^2 per layer that the graph reaches, in order.
    """
    by_name = {pair.name: pair for pair in paired}
    begin = time.monotonic()
    walk = Walk(graph, teacher, student, images)
    explained: dict[str, float] = {}
    for node in walk:
        pair = by_name.get(str(node.target)) if node.op == "call_module" else None
        if pair is None or pair.name in explained:
            continue
        share = None
        if seconds is not None:
            share = max(0.0, seconds - (time.monotonic() - begin)) / (len(paired) - len(explained))
        examples, relu = _examples(walk, node, pair)
        explained[pair.name] = _fit(pair, examples, relu, how, share, generator, on_step)
    return explained


def _examples(walk: Walk, node: fx.Node, pair: Pair) -> tuple[_Examples, bool]:
    (source,) = node.all_input_nodes
    sequel = _sequel(walk, node, pair)
    targets = []
    with torch.no_grad():
        for at, x in enumerate(walk.teacher[source]):
            z = pair.conv(x)
            z = z if pair.conv_end is pair.conv else pair.conv_end(z)
            if sequel.added is not None:
                z = z + (walk.teacher[sequel.added][at] - walk.student[sequel.added][at])
            targets.append(z)
    residual = None if sequel.added is None else walk.student[sequel.added]
    return _Examples(walk.student[source], targets, residual), sequel.relu


def _sequel(walk: Walk, node: fx.Node, pair: Pair) -> _Sequel:
    """Follow a layer's output through an addition and a ReLU, as far as each value has one reader."""
    end: fx.Node | None = node if pair.conv_end is pair.conv else reader(node)
    user = None if end is None else reader(end)
    added = None
    if end is not None and user is not None and user.target in _ADDITIONS and len(user.all_input_nodes) == 2:
        other = next(operand for operand in user.all_input_nodes if operand is not end)
        if other not in walk.student:
            return _Sequel(None, False)
        added, user = other, reader(user)
    if user is None:
        return _Sequel(added, False)
    is_module = user.op == "call_module" and isinstance(walk.networks[0].get_submodule(str(user.target)), nn.ReLU)
    return _Sequel(added, is_module or user.target in _RELUS)


def _fit(
    pair: Pair,
    examples: _Examples,
    relu: bool,
    how: LayerFit,
    seconds: float | None,
    generator: torch.Generator,
    on_step: Callable[[str, float], None],
) -> float:
    norm = cast(_BatchNorm, pair.norm)
    map_weights(pair, examples.inputs[0], generator)
    with torch.no_grad():
        fit_line(norm, pair.adder.response(examples.inputs[0]), examples.targets[0])
    spread = float(torch.stack([chunk.std() for chunk in examples.inputs]).mean().clamp_min(1e-6))
    optimizer = torch.optim.Adam(
        [
            {"params": [pair.adder.weight], "lr": how.weight_lr * spread},
            {"params": list(norm.parameters()), "lr": how.norm_lr},
        ]
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    size = max(8, how.positions // channels_first(norm, examples.targets[0])[0, 0].numel())
    batches = _batches(examples, size, generator)

    def step(factor: float) -> None:
        set_rates(optimizer, peaks, factor)
        x, wanted, residual = next(batches)
        got = norm(pair.adder.response(x))
        error = unexplained(got, wanted)
        loss = error
        if relu:
            if residual is not None:
                got, wanted = got + residual, wanted + residual
            loss = error + how.relu_weight * unexplained(got.relu(), wanted.relu())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        on_step(pair.name, float(error.detach()))

    norm.train()
    steps = how.steps if seconds is None else steps_within(seconds, lambda: step(0.0))
    for at in range(steps):
        step(cosine(at, steps, warmup=0.02))
    norm.eval()
    return _settle(pair, norm, examples)


@torch.no_grad()
def _settle(pair: Pair, norm: _BatchNorm, examples: _Examples, images: int = 1024) -> float:
    """Take the norm's statistics over many images at once; return R^2 there."""
    chunks = slice(0, -(-images // len(examples.inputs[0])))
    y = torch.cat([pair.adder.response(chunk) for chunk in examples.inputs[chunks]])
    first = channels_first(norm, y)
    over = [d for d in range(y.dim()) if d != 1]
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.copy_(first.mean(over))
    norm.running_var.copy_(first.var(over))
    return 1 - float(unexplained(norm(y), torch.cat(examples.targets[chunks])))


def _batches(
    examples: _Examples, size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Random batches of (input, target, residual) without end; a batch comes from one chunk, chunks in random order."""
    while True:
        for at in torch.randperm(len(examples.inputs), generator=generator).tolist():
            order = torch.randperm(len(examples.inputs[at]), generator=generator)
            for part in order.split(size):
                if len(part) == min(size, len(order)):
                    residual = None if examples.residual is None else _rows(examples.residual[at], part)
                    yield _rows(examples.inputs[at], part), _rows(examples.targets[at], part), residual


def _rows(x: Tensor, indices: Tensor) -> Tensor:
    """The chosen images in channels_last, the kernels' layout."""
    rows = x[indices]
    return rows.contiguous(memory_format=torch.channels_last) if rows.dim() == 4 else rows
