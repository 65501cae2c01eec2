"""Train and eval mode, without losing a module's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode, each put back into its own mode afterwards (a frozen BatchNorm stays frozen)."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
