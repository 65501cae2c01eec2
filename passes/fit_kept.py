"""Layers that stay what they are, behind adders: weights for the input that arrives in the student.

A kept convolution or Linear layer was trained for clean inputs. Its best linear answer to the student's, which have
errors, follows from a regression (:mod:`anncvt.passes.regression`); no layer's accuracy costs less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anncvt.nn import AdderLinear, _AdderNd, adder_class
from anncvt.passes.examples import Examples, collect
from anncvt.passes.regression import KEPT, regressions
from anncvt.passes.walk import Walk

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class FittedKept:
    """What came of one kept layer: mean over outputs of R^2, on images that it was not fitted on."""

    r2: float
    before_r2: float


def kept_layers(graph: fx.Graph, student: nn.Module, adders: Container[str]) -> dict[str, fx.Node]:
    """The calls, behind the first adder, of layers that can be fitted: on weights of their own, called once, with a
    bias or a BatchNorm that takes its place."""
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    holders = Counter(id(p) for module in student.modules() for p in module.parameters(recurse=False))
    found: dict[str, fx.Node] = {}
    behind = False
    for node in graph.nodes:
        name = str(node.target) if node.op == "call_module" else ""
        if name in adders:
            behind = True
        elif name and behind and calls[name] == 1 and len(node.all_input_nodes) == 1:
            layer = student.get_submodule(name)
            owned = all(holders[id(p)] == 1 for p in layer.parameters(recurse=False))
            if type(layer) in _KINDS and owned and (layer.bias is not None or _norm(node, student, calls) is not None):
                found[name] = node
    return found


def _norm(node: fx.Node, student: nn.Module, calls: Counter[str]) -> _BatchNorm | None:
    """The BatchNorm that alone reads ``node``."""
    users = [*node.users]
    if len(users) != 1 or users[0].op != "call_module" or calls[str(users[0].target)] != 1:
        return None
    norm = student.get_submodule(str(users[0].target))
    return norm if isinstance(norm, _BatchNorm) and norm.running_mean is not None else None


@torch.no_grad()
def fit_kept(walk: Walk, node: fx.Node, count: int, images: int, generator: torch.Generator) -> FittedKept:
    """Give a kept layer the weights that come closest to the teacher's output, if any do on images held back.

    Args:
        walk: before the layer.
        node: its call, one of :func:`kept_layers`.
        count: how many of the walk's chunks it needs; ``images`` are in them.
        generator: of the places.
    """
    name = str(node.target)
    teacher, layer = (network.get_submodule(name) for network in walk.networks)
    assert isinstance(layer, _KINDS)
    (source,) = node.all_input_nodes
    with torch.random.fork_rng(devices=[]):  # its own initial weights are thrown away
        shape = _geometry(layer)
    chunks = ((student[source], teacher(values[source]), None) for values, student in walk.before(node, count))
    train, test = collect(shape, chunks, images, walk.memory // 2, generator)
    bias = layer.bias if layer.bias is not None else torch.zeros(len(layer.weight), device=layer.weight.device)
    best = (layer.weight, bias)
    before = r2 = _score(shape, test, *best)
    for weight, own in regressions(shape, train, layer.weight, KEPT, walk.memory // 2, generator):
        score = _score(shape, test, weight, own)
        if score > r2:
            best, r2 = (weight, own), score
    if r2 > before:
        layer.weight.copy_(best[0])
        if layer.bias is not None:
            layer.bias.copy_(best[1])
        else:
            norm = walk.networks[1].get_submodule(str(next(iter(node.users)).target))
            assert isinstance(norm, _BatchNorm) and norm.running_mean is not None
            norm.running_mean.sub_(best[1])
    return FittedKept(r2, before)


def _geometry(layer: nn.Module) -> _AdderNd:
    """An adder of the same geometry."""
    if isinstance(layer, nn.Linear):
        return AdderLinear.from_linear(layer)
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return adder_class(len(layer.kernel_size)).from_conv(layer)


def _score(shape: _AdderNd, examples: Examples, weight: Tensor, bias: Tensor) -> float:
    """Mean over the outputs that vary of R^2."""
    if shape.ndim == 0:
        y = examples.inputs @ weight.T + bias
    else:
        convolution = _CONVOLUTIONS[shape.ndim - 1]
        y = convolution(examples.inputs, weight, bias, shape.stride, 0, shape.dilation, shape.groups)
    over = [d for d in range(y.dim()) if d != 1]
    missed, whole = (y - examples.targets).square().mean(over), examples.targets.var(over, correction=0)
    alive = whole > 1e-12
    return float((1 - missed[alive] / whole[alive]).mean()) if bool(alive.any()) else 1.0
