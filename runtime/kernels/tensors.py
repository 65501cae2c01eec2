"""What the launchers for CPUs and for GPUs do with tensors alike."""

from __future__ import annotations

from torch import Tensor


def nhwc(x: Tensor) -> Tensor:
    """``[N, C, H, W]`` as contiguous ``[N, H, W, C]``, without a history."""
    return x.detach().permute(0, 2, 3, 1).contiguous()


def multiplier(weight: Tensor, groups: int) -> int:
    """Outputs per channel of a depthwise layer, else 1: where more, channels are repeated, then it is depthwise."""
    return weight.shape[0] // groups if groups > 1 and weight.shape[1] == 1 else 1
