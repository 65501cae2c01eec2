"""Compiled CPU kernels of the op (TVM). This module imports no TVM until a kernel is asked for."""

from __future__ import annotations

from torch import Tensor


def usable(x: Tensor) -> bool:
    """Whether a compiled kernel can take tensors of this device and dtype."""
    return False
