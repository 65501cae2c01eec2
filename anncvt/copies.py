"""Copies of networks: with tensors of their own, on another device, or sharing the original's."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def copied(network: Network) -> Network:
    """A deep copy, also of networks that keep computed tensors as attributes (old weight norm does)."""
    return copy.deepcopy(network, _computed(network))


def sharing(network: Network) -> Network:
    """A copy of the modules on the same parameters and buffers."""
    tensors: list[Tensor] = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, _computed(network) | {id(tensor): tensor for tensor in tensors})


def outline(network: Network, device: str = "meta") -> Network:
    """A copy with its tensors on ``device``: on "meta" a forward pass costs no memory and computes shapes alone."""
    memo: dict[int, object] = {key: value.to(device) for key, value in _computed(network).items()}
    memo |= {id(buffer): buffer.to(device, copy=True) for buffer in network.buffers()}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to(device, copy=True), parameter.requires_grad)
    return copy.deepcopy(network, memo)


def _computed(network: nn.Module) -> dict[int, Tensor]:
    """Attributes that are results of a computation, which ``deepcopy`` refuses, detached."""
    return {
        id(value): value.detach().clone()
        for module in network.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    }
