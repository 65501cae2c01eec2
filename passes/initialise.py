"""First stage of calibration: quantile-mapped weights and a least-squares line per channel, in one forward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anncvt.convolution import effective_weight
from anncvt.nn import channels_first
from anncvt.passes.norms import normalised
from anncvt.passes.pairing import Pair
from anncvt.passes.quantile_map import TentTable, quantile_map, tent_table

#: Activations per input channel that the quantiles are taken from.
SAMPLES = 16384


@torch.no_grad()
def initialise(
    teacher: nn.Module,
    student: nn.Module,
    paired: list[Pair],
    images: Tensor,
    on_layer: Callable[[str, float], None] = lambda name, r2: None,
) -> dict[str, float]:
    """Set every adder's weights and the norm after it from what really arrives there in the student.

    The student runs once over ``images`` ``[N, C, H, W]``; when the pass reaches an adder, its weights are mapped from
    the distribution of its own input, and when it reaches the norm, scale and shift become the least-squares line from
    the adder's output to the teacher's. So each layer already sees the errors of the ones before it.

    Returns:
        Share of the teacher's variance explained per layer (R^2, mean over channels).
    """
    targets = _targets(teacher, paired, images)
    explained: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)

    def arrive(pair: Pair, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if pair.name not in explained:
            map_weights(pair, tents(pair, inputs[0], generator), effective_weight(pair.conv))

    def fit(pair: Pair, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if pair.name in targets and pair.name not in explained:
            explained[pair.name] = fit_line(cast(_BatchNorm, module), inputs[0], targets[pair.name])
            on_layer(pair.name, explained[pair.name])

    handles: list[Any] = []
    for pair in paired:
        handles.append(pair.adder.register_forward_pre_hook(functools.partial(arrive, pair)))
        handles.append(pair.norm.register_forward_pre_hook(functools.partial(fit, pair)))
    was_training = student.training
    try:
        student.eval()(images)
    finally:
        student.train(was_training)
        for handle in handles:
            handle.remove()
    return explained


def _targets(teacher: nn.Module, paired: list[Pair], images: Tensor) -> dict[str, Tensor]:
    """What the teacher makes of ``images`` at each layer, its norm included."""
    targets: dict[str, Tensor] = {}

    def keep(pair: Pair, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if pair.name not in targets:
            # Of its own: what comes next may work in place.
            targets[pair.name] = output.clone() if pair.conv_end is pair.conv else normalised(pair.conv_end, output)

    handles = [pair.conv.register_forward_hook(functools.partial(keep, pair)) for pair in paired]
    try:
        teacher(images)
    finally:
        for handle in handles:
            handle.remove()
    return targets


@torch.no_grad()
def tents(pair: Pair, x: Tensor, generator: torch.Generator) -> TentTable:
    """What weights of the adder do with inputs distributed like ``x`` ``[N, C, *]``."""
    samples = channels_first(pair.adder, x).transpose(0, 1).flatten(1)
    if samples.shape[1] > SAMPLES:
        samples = samples[:, torch.randperm(samples.shape[1], generator=generator)[:SAMPLES]]
    return tent_table(samples)


@torch.no_grad()
def map_weights(pair: Pair, table: TentTable, weight: Tensor) -> None:
    """Give the adder the quantile-mapped weights of a convolution with ``weight``."""
    pair.adder.weight.copy_(quantile_map(weight, table, pair.adder.groups, copies=pair.adder.copies))
    if pair.adder.bias is not None:
        pair.adder.bias.zero_()


@torch.no_grad()
def fit_line(norm: _BatchNorm, y: Tensor, target: Tensor) -> float:
    """Make ``norm`` the per-channel least-squares line from ``y`` to ``target`` (both ``[N, C, *]``); return R^2."""
    y, target = channels_first(norm, y), channels_first(norm, target)
    over = [d for d in range(y.dim()) if d != 1]
    shape = [1, -1] + [1] * (y.dim() - 2)
    mean, goal = y.mean(over), target.mean(over)
    centred, wanted = y - mean.view(shape), target - goal.view(shape)
    variance, covariance = centred.square().mean(over), (centred * wanted).mean(over)
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_(covariance / (variance + norm.eps).sqrt())
    norm.bias.copy_(goal)
    total = wanted.square().mean(over)
    alive = (total > 1e-12) & (variance > 1e-12)
    share = covariance.square() / (variance * total).clamp_min(1e-24)
    return float(share[alive].mean()) if bool(alive.any()) else 1.0
