"""Compiled CPU kernels of the op (TVM). This module imports no TVM until a kernel is asked for.

The functions take and give what those of :mod:`anncvt.runtime.fallback` do, for float32 tensors on the CPU. Results
come back ``channels_last``, the layout the kernels work in; an input of any other layout is converted first.
``ANNCVT_KERNELS=torch`` turns the kernels off.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

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


def compiled() -> ModuleType:
    """The module whose functions stand for those of :mod:`anncvt.runtime.fallback`; imports TVM."""
    from anncvt.runtime.kernels import launch

    return launch


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("tvm") is not None
