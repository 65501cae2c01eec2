"""The network as it is shipped."""

from __future__ import annotations

import copy

from torch import nn


def inference_copy(network: nn.Module) -> nn.Module:
    """A float32 CPU copy of ``network`` in eval mode that records no gradients; ``network`` itself is left alone."""
    return copy.deepcopy(network).cpu().float().eval().requires_grad_(False)
