"""Layer-wise fitting: in network order, each adder learns to give what the teacher computes at its place."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from anncvt.convolution import effective_weight
from anncvt.passes.examples import Examples, batches, collect
from anncvt.passes.fit_kept import FittedKept, fit_kept
from anncvt.passes.fit_taps import fit_taps, sweep_cost
from anncvt.passes.initialise import fit_line, map_weights, tents
from anncvt.passes.norms import normalised
from anncvt.passes.objectives import LayerLoss
from anncvt.passes.pairing import Pair
from anncvt.passes.quantile_map import TentTable
from anncvt.passes.regression import of_adders, regressions
from anncvt.passes.schedule import cosine, set_rates, steps_within
from anncvt.passes.surroundings import Sequel, sequel
from anncvt.passes.walk import Values, Walk

#: Output pixels on which the norm's line and its statistics are taken, and which are computed at once.
SETTLING = 65536


@dataclass(frozen=True)
class LayerFit:
    """How one layer is fitted; the rates measured best before there were blocks (benchmarks/RESULTS.md)."""

    regress: bool = True  # kept layers; and what is mapped, instead of the teacher's weights, where that is better
    sweeps: int = 4  # of coordinate descent, at most
    sweep_share: float = 0.5  # of a layer's time
    steps: int = 600
    least_steps: int = 20  # however short the time is
    positions: int = 16384  # output pixels per step: the cost of a step, whatever the size of the maps
    weight_lr: float = 0.1  # relative to the standard deviation of the layer's input
    norm_lr: float = 0.01
    activation_weight: float = 5.0  # of the error behind the activation, where one follows


@dataclass(frozen=True)
class FittedLayer:
    """What came of one layer; R^2 on images that it was not fitted on."""

    r2: float
    mapped_r2: float  # before fitting
    outside: float  # share of the taps whose weight lies beyond their input channel's activations
    sweeps: int
    steps: int


def fit_layers(
    walk: Walk,
    graph: fx.Graph,
    paired: Sequence[Pair],
    chunks: Callable[[str], int],
    images: Sequence[int],
    how: LayerFit,
    generator: torch.Generator,
    seconds: Callable[[str], float | None] = lambda name: None,
    on_step: Callable[[str, float], None] = lambda name, r2: None,
    kept: Container[str] = (),
) -> Iterator[tuple[str, FittedLayer | FittedKept]]:
    """Walk both networks; at every adder, map its weights from the input that really arrives and fit them.

    The input is the student's own, so a layer learns to live with the errors of the ones before it. Where its output is
    added to a shortcut, the target also makes up for the shortcut's error.

    Args:
        walk: before the first of the layers.
        graph: of the teacher (the student's is equal).
        paired: the swapped layers to fit.
        chunks: how many of the walk's chunks a layer needs, by name.
        images: how many are in each chunk.
        how: steps and learning rates.
        generator: of the order of the images.
        seconds: time for a layer, by name; the number of steps follows from it. ``None``: ``how.steps``.
        on_step: called with the layer's name and R^2 after every step.
        kept: names of layers that stay what they are and are fitted when their turn comes.

    Yields:
        Name and result of each layer that the graph reaches, in order.
    """
    todo = {pair.name: pair for pair in paired}
    for node in graph.nodes:
        name = str(node.target) if node.op == "call_module" else ""
        pair = todo.pop(name, None)
        if pair is None and name not in kept:
            continue
        count = chunks(name)
        of = sum(images[:count])
        if pair is None:
            yield name, fit_kept(walk, node, count, of, generator)
        else:
            yield name, _fit_at(walk, node, pair, count, of, how, seconds(name), generator, on_step)


def step_cost(pair: Pair) -> float:
    """Time of a step per output pixel, in taps: what is done per output channel takes as long as some 200."""
    return pair.adder.out_channels * (pair.adder.weight[0].numel() + 200)


def layer_cost(pair: Pair, how: LayerFit) -> float:
    """Time of all sweeps and steps of a layer, in multiply-adds; a step goes forward and twice back."""
    return 1 + how.sweeps * sweep_cost(pair) + 3 * how.steps * how.positions * step_cost(pair)


def _fit_at(
    walk: Walk,
    node: fx.Node,
    pair: Pair,
    count: int,
    images: int,
    how: LayerFit,
    seconds: float | None,
    generator: torch.Generator,
    on_step: Callable[[str, float], None],
) -> FittedLayer:
    begin = time.monotonic()
    follows: Sequel | None = None

    def examples() -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        nonlocal follows
        for teacher, student in walk.before(node, count):
            if follows is None:
                norm = None if pair.conv_end is pair.conv else pair.norm
                follows = sequel(node, norm, student.__contains__, walk.networks[1])
            yield _example(teacher, student, node, pair, follows)

    train, test = collect(pair.adder, examples(), images, walk.memory // 2, generator)
    assert follows is not None
    if seconds is not None:
        seconds -= time.monotonic() - begin
    return _fit(pair, train, test, follows.activation, how, seconds, walk.memory // 2, generator, on_step)


@torch.no_grad()
def _example(
    teacher: Values, student: Values, node: fx.Node, pair: Pair, follows: Sequel
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, target and residual of one chunk."""
    (source,) = node.all_input_nodes
    z = pair.conv(teacher[source])
    z = z if pair.conv_end is pair.conv else normalised(pair.conv_end, z)
    residual = None if follows.added is None else student[follows.added]
    if follows.added is not None:
        z = z + (teacher[follows.added] - residual)
    return student[source], z, residual


def _fit(
    pair: Pair,
    train: Examples,
    test: Examples,
    activation: Callable[[Tensor], Tensor] | None,
    how: LayerFit,
    seconds: float | None,
    memory: int,
    generator: torch.Generator,
    on_step: Callable[[str, float], None],
) -> FittedLayer:
    begin = time.monotonic()
    norm = cast(_BatchNorm, pair.norm)
    some = train.rows(slice(0, _rows(train)))
    loss = LayerLoss(activation, how.activation_weight)
    conv, table = effective_weight(pair.conv), tents(pair, some.inputs, generator)
    _map(pair, some, table, conv)
    best = _Best(pair, test, loss)
    if how.regress:
        penalties = of_adders(pair.adder.copies)
        for found, _ in regressions(pair.adder, train, conv, penalties, memory, generator):
            _map(pair, some, table, found)
            best.judge()
        best.restore()
    mapped_r2 = best.r2
    sweeps = 0
    if how.sweeps:
        within = None if seconds is None else (how.sweep_share if how.steps else 1) * seconds
        report = functools.partial(on_step, pair.name)
        sweeps = fit_taps(pair, train, how.sweeps, memory, generator, within, report)
        best.judge()
        best.restore()
    if seconds is not None:
        seconds -= time.monotonic() - begin
    steps = _train(pair, train, loss, how, seconds, generator, on_step)
    if steps:
        _settle(pair, norm, some)
        best.judge()
    best.restore()
    return FittedLayer(best.r2, mapped_r2, _outside(pair, some.inputs), sweeps, steps)


@torch.no_grad()
def _map(pair: Pair, some: Examples, table: TentTable, weight: Tensor) -> None:
    """Begin with an adder that imitates a convolution."""
    map_weights(pair, table, weight)
    fit_line(cast(_BatchNorm, pair.norm), pair.adder.response(some.inputs, is_padded=True), some.targets)


def _train(
    pair: Pair,
    train: Examples,
    loss: LayerLoss,
    how: LayerFit,
    seconds: float | None,
    generator: torch.Generator,
    on_step: Callable[[str, float], None],
) -> int:
    """All weights and the norm by Adam; return the number of steps."""
    norm = cast(_BatchNorm, pair.norm)
    spread = float(train.rows(slice(0, _rows(train))).inputs.std().clamp_min(1e-6))
    optimizer = torch.optim.Adam(
        [
            {"params": [pair.adder.weight], "lr": how.weight_lr * spread},
            {"params": list(norm.parameters()), "lr": how.norm_lr},
        ]
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    stream = batches(train, max(8, how.positions // train.targets[0, 0].numel()), generator)

    def step(factor: float) -> None:
        set_rates(optimizer, peaks, factor)
        batch = next(stream)
        got = normalised(norm, pair.adder.response(batch.inputs, is_padded=True))
        error, value = loss(got, batch.targets, batch.residual)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        on_step(pair.name, 1 - float(error.detach()))

    norm.train()
    steps = how.steps
    if steps and seconds is not None:
        steps = min(steps, steps_within(seconds, lambda: step(0.0), least=how.least_steps))
    for at in range(steps):
        step(cosine(at, steps, warmup=0.02))
    norm.eval()
    return steps


class _Best:
    """The best weights so far, by their loss on examples that they are not fitted on."""

    def __init__(self, pair: Pair, examples: Examples, loss: LayerLoss) -> None:
        self.pair, self.examples, self.loss = pair, examples, loss
        self.r2, self.least = _score(pair, examples, loss)
        self._keep()

    def judge(self) -> None:
        """Keep what the layer has now if it is better."""
        r2, loss = _score(self.pair, self.examples, self.loss)
        if loss < self.least:  # not where it is no number
            self.r2, self.least = r2, loss
            self._keep()

    def _keep(self) -> None:
        self.state = copy.deepcopy((self.pair.adder.state_dict(), self.pair.norm.state_dict()))

    def restore(self) -> None:
        """Give the layer the best that was kept."""
        self.pair.adder.load_state_dict(self.state[0])
        self.pair.norm.load_state_dict(self.state[1])


@torch.no_grad()
def _settle(pair: Pair, norm: _BatchNorm, examples: Examples) -> None:
    """Take the norm's statistics over many images at once."""
    y = pair.adder.response(examples.inputs, is_padded=True)
    over = [d for d in range(y.dim()) if d != 1]
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.copy_(y.mean(over))
    norm.running_var.copy_(y.var(over))


@torch.no_grad()
def _score(pair: Pair, examples: Examples, loss: LayerLoss) -> tuple[float, float]:
    """R^2 of the layer and its norm in eval mode, and the loss."""
    missed = total = 0.0
    for part in torch.arange(len(examples)).split(_rows(examples)):
        some = examples.rows(part)
        got = normalised(pair.norm, pair.adder.response(some.inputs, is_padded=True))
        missed += float((got - some.targets).square().sum())
        total += len(part) / len(examples) * float(loss(got, some.targets, some.residual)[1])
    return 1 - missed / (examples.targets.numel() * max(float(examples.targets.var()), 1e-12)), total


def _rows(examples: Examples) -> int:
    return max(64, SETTLING // examples.targets[0, 0].numel())


def _outside(pair: Pair, inputs: Tensor) -> float:
    """Share of the taps whose weight no activation of their channel passes: there the adder is linear."""
    channels = pair.adder.copied(inputs).transpose(0, 1).flatten(1)
    low, high = channels.amin(1), channels.amax(1)
    groups, per_group = pair.adder.groups, pair.adder.weight.shape[1]
    weight = pair.adder.weight.detach().reshape(
        groups, pair.adder.out_channels // groups, per_group, -1
    )  # [G, O/G, C/G, K]
    low, high = (bound.view(groups, 1, per_group, 1) for bound in (low, high))
    return float(((weight <= low) | (weight >= high)).float().mean())
