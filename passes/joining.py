"""What an operator does to the output of the layer in front of it, where that layer could do it itself."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class Line:
    """``scale * source + shift``, both ``[C]`` float64."""

    source: fx.Node
    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Limits:
    """``source`` limited to low..high."""

    source: fx.Node
    low: float
    high: float


@dataclass(frozen=True)
class Sum:
    """``first + second``; of tensors of other shapes, too. ``in_place``: ``first`` is overwritten."""

    first: fx.Node
    second: fx.Node
    in_place: bool


@dataclass(frozen=True)
class Same:
    """``source`` itself."""

    source: fx.Node


Joining = Line | Limits | Sum | Same


class Unjoinable(Exception):
    """An operator is used in a way of its own; says in which, after the operator's name."""


def joining(node: fx.Node, network: nn.Module) -> Joining | None:
    """What ``node`` of a graph of ``network``, in eval mode, is; None if it is something else.

    Raises:
        Unjoinable: it is nearly one of these.
    """
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        found = next((make for kind, make in _MODULES if isinstance(module, kind)), None)
        return None if found is None else found(source_of(node), module)
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target is F.batch_norm:
        return _batch_norm(node, network)
    make = _METHODS.get(str(node.target)) if node.op == "call_method" else _FUNCTIONS.get(cast(Any, node.target))
    return None if make is None else make(node)


def source_of(node: fx.Node) -> fx.Node:
    """The tensor an operator works on.

    Raises:
        Unjoinable: it is none of the graph's.
    """
    source = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(source, fx.Node):
        raise Unjoinable("works on no tensor of the network")
    return source


def argument(node: fx.Node, at: int, name: str, default: Any = None) -> Any:
    """The argument that stands at a place or has a name."""
    return node.args[at] if len(node.args) > at else node.kwargs.get(name, default)


def line(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """A BatchNorm in eval mode as ``scale * x + shift``: both ``[C]`` float64.

    Raises:
        Unjoinable: it has no running statistics.
    """
    return _line(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


def _line(
    mean: Tensor | None, variance: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    if mean is None or variance is None:
        raise Unjoinable("is a BatchNorm without running statistics")
    scale = 1 / torch.sqrt(variance.detach().double() + eps)
    if weight is not None:
        scale = scale * weight.detach().double()
    shift = -scale * mean.detach().double()
    return scale, shift if bias is None else bias.detach().double() + shift


def _norm(source: fx.Node, norm: _BatchNorm) -> Line | None:
    # A subclass may do more than normalise.
    return Line(source, *line(norm)) if type(norm).forward is _BatchNorm.forward else None


def _batch_norm(node: fx.Node, network: nn.Module) -> Line | None:
    """The function, as norms that do more than normalise call it (timm's BatchNormAct2d)."""
    if argument(node, 5, "training", False):
        return None
    mean, variance, weight, bias = (
        _attribute(argument(node, at, name), network)
        for at, name in enumerate(("running_mean", "running_var", "weight", "bias"), 1)
    )
    return Line(source_of(node), *_line(mean, variance, weight, bias, argument(node, 7, "eps", 1e-5)))


def _attribute(value: Any, network: nn.Module) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    if value.op != "get_attr":
        raise Unjoinable("normalises with numbers that the network computes")
    owner, _, name = value.target.rpartition(".")
    return getattr(network.get_submodule(owner), name)


def _clamp(node: fx.Node, low: Any, high: Any) -> Limits:
    if not all(bound is None or isinstance(bound, (int, float)) for bound in (low, high)):
        raise Unjoinable("clamps to something else than numbers")
    return Limits(source_of(node), -math.inf if low is None else low, math.inf if high is None else high)


def _clamp_call(node: fx.Node) -> Limits:
    return _clamp(node, argument(node, 1, "min"), argument(node, 2, "max"))


def _hardtanh(node: fx.Node) -> Limits:
    return _clamp(node, argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0))


def _relu(node: fx.Node) -> Limits:
    return Limits(source_of(node), 0.0, math.inf)


def _dropout(node: fx.Node) -> Same | None:
    return None if argument(node, 2, "training", True) else Same(source_of(node))


def _sum(node: fx.Node) -> Sum:
    first, second = (node.args + tuple(node.kwargs.values()))[:2]
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or node.kwargs.get("alpha", 1) != 1:
        raise Unjoinable("adds something else than two tensors")
    return Sum(first, second, node.target in (operator.iadd, "add_"))


_MODULES: list[tuple[Any, Callable[[fx.Node, Any], Joining | None]]] = [
    ((nn.BatchNorm1d, nn.BatchNorm2d), _norm),
    (nn.ReLU, lambda source, module: Limits(source, 0.0, math.inf)),
    (nn.Hardtanh, lambda source, module: Limits(source, module.min_val, module.max_val)),  # ReLU6 is one
    ((nn.Identity, nn.Dropout, nn.Dropout2d), lambda source, module: Same(source)),
]
_FUNCTIONS: dict[Any, Callable[[fx.Node], Joining | None]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_), _relu),
    F.relu6: lambda node: Limits(source_of(node), 0.0, 6.0),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), _hardtanh),
    **dict.fromkeys((torch.clamp, torch.clip, torch.clamp_), _clamp_call),
    **dict.fromkeys((operator.add, operator.iadd, torch.add), _sum),
    **dict.fromkeys((F.dropout, F.dropout2d), _dropout),
}
_METHODS: dict[str, Callable[[fx.Node], Joining | None]] = {
    **dict.fromkeys(("relu", "relu_"), _relu),
    **dict.fromkeys(("clamp", "clamp_", "clip"), _clamp_call),
    **dict.fromkeys(("add", "add_"), _sum),
    "contiguous": lambda node: Same(source_of(node)),
}
