"""The network as it is shipped."""

from __future__ import annotations

from torch import nn

from anncvt.copies import copied


def inference_copy(network: nn.Module) -> nn.Module:
    """A float32 CPU copy of ``network`` in eval mode that records no gradients; ``network`` itself is left alone."""
    return copied(network).cpu().float().eval().requires_grad_(False)
