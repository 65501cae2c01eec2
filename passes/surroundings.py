"""What a network does around a layer: with its normed output, before the next layer reads it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from anncvt.passes.norms import own_activation
from anncvt.passes.walk import reader

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_MODULES = (nn.ReLU, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Hardswish, nn.GELU, nn.Mish)
_FUNCTIONS = {F.relu_, torch.relu, torch.relu_, F.relu, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.silu, F.hardswish}
_FUNCTIONS |= {F.gelu, F.mish}
_METHODS = {"relu", "relu_"}


@dataclass(frozen=True)
class Sequel:
    """What happens to a layer's normed output before the next layer reads it."""

    added: fx.Node | None  # the other operand of a residual addition, when it is known already
    activation: Callable[[Tensor], Tensor] | None  # element by element; leaves its input alone


def sequel(node: fx.Node, norm: nn.Module | None, known: Callable[[fx.Node], bool], network: nn.Module) -> Sequel:
    """Follow the output of the layer at ``node`` through an addition and an activation.

    It is followed as far as each value has one reader.

    Args:
        norm: the norm of the graph that reads the layer, if one does.
        known: whether a node is computed before ``node``.
        network: where the graph's modules are.
    """
    own = None if norm is None else own_activation(norm)
    if own is not None:
        return Sequel(None, own)
    end = node if norm is None else reader(node)
    user = None if end is None else reader(end)
    added = None
    if end is not None and user is not None and user.target in _ADDITIONS and len(user.all_input_nodes) == 2:
        other = next(operand for operand in user.all_input_nodes if operand is not end)
        if not known(other):
            return Sequel(None, None)
        added, user = other, reader(user)
    return Sequel(added, None if user is None else _activation(user, network))


def _activation(node: fx.Node, network: nn.Module) -> Callable[[Tensor], Tensor] | None:
    function: Any = None
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        function = module if isinstance(module, _MODULES) else None
    elif node.op == "call_function" and node.target in _FUNCTIONS:
        function = node.target
    elif node.op == "call_method" and node.target in _METHODS:
        function = torch.relu
    if function is None or len(node.all_input_nodes) != 1:
        return None
    options = (node.args[1:], node.kwargs) if node.op == "call_function" else ((), {})
    if any(name == "input" for name in options[1]):
        return None
    # The clone: many activations work in place.
    return lambda x: function(x.clone(), *options[0], **options[1])
