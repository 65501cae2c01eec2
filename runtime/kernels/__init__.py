"""Compiled CPU kernels of the op (TVM). This module imports no TVM until a kernel is asked for.

The functions take and give what those of :mod:`anncvt.runtime.fallback` do, for float32 tensors on the CPU. Results
come back ``channels_last``, the layout the kernels work in; an input of any other layout is converted first.
``ANNCVT_KERNELS=torch`` turns the kernels off.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor


def usable(x: Tensor) -> bool:
    """Whether a compiled kernel can take tensors of this device and dtype."""
    return (
        x.dtype is torch.float32
        and x.device.type == "cpu"
        and os.environ.get("ANNCVT_KERNELS", "tvm") != "torch"
        and _installed()
    )


def forward(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """See :func:`anncvt.runtime.fallback.forward`."""
    from anncvt.runtime.kernels import launch

    return launch.forward(x, weight, stride, padding, dilation, groups)


def input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    gradient: str,
) -> Tensor:
    """See :func:`anncvt.runtime.fallback.input_gradient`."""
    from anncvt.runtime.kernels import launch

    return launch.input_gradient(grad, x, weight, stride, padding, dilation, groups, gradient)


def exact_weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """See :func:`anncvt.runtime.fallback.exact_weight_gradient`."""
    from anncvt.runtime.kernels import launch

    return launch.exact_weight_gradient(grad, x, weight, stride, padding, dilation, groups)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("tvm") is not None
