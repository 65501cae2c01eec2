"""Compiled kernels of the op: for CPUs and for CUDA. This module imports neither TVM nor them until one is asked for.

The functions take and give what those of :mod:`anncvt.runtime.fallback` do: float32 tensors on the CPU, float32,
float16 and bfloat16 tensors on GPUs. Results come back ``channels_last``, the layout the kernels work in; an input of
any other layout is converted first. ``ANNCVT_KERNELS=torch`` turns the kernels off.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor


def usable(x: Tensor) -> bool:
    """Whether a compiled kernel can take tensors of this device and dtype."""
    if os.environ.get("ANNCVT_KERNELS", "tvm") == "torch":
        return False
    if x.is_cuda:
        from anncvt.runtime.kernels import cuda

        return cuda.usable(x)
    return x.dtype is torch.float32 and x.is_cpu and _installed()


def compiled(x: Tensor) -> ModuleType:
    """The module whose functions stand for those of :mod:`anncvt.runtime.fallback`, for tensors like ``x``."""
    return _launcher("anncvt.runtime.kernels.cuda.launch" if x.is_cuda else "anncvt.runtime.kernels.launch")


# An import that finds its module takes longer than anything else that is done here.
_launcher = functools.cache(importlib.import_module)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("tvm") is not None
