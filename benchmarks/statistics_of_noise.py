"""BatchNorm statistics for networks of random weights: without them adders' sums grow from layer to layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anncvt.nn import channels_first


def settle(network: nn.Module, images: Tensor) -> None:
    """Take the statistics of all norms from ``images``, ``[N, C, H, W]``; nothing else of the network is changed.

    To the variance of each channel that of all is added: the rounding errors of one that hardly varies would grow.
    """
    norms = [module for module in network.eval().modules() if isinstance(module, _BatchNorm)]
    hooks = [norm.register_forward_pre_hook(_take) for norm in norms]
    with torch.no_grad():
        network(images)
    for hook in hooks:
        hook.remove()


def _take(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
    assert isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None
    variance, mean = torch.var_mean(channels_first(norm, inputs[0]).transpose(0, 1).flatten(1), 1)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance + variance.mean())
