"""CUDA kernels of the op: generated as CUDA source by TVM, compiled to cubins, launched through the driver.

Who launches needs torch and a cubin; who makes a cubin needs TVM and NVRTC or nvcc, but no GPU.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from anncvt.errors import AnncvtError, first_line
from anncvt.runtime.kernels.cuda import build, driver
from anncvt.runtime.kernels.cuda.variant import DTYPES, KINDS, variants

_READY: dict[tuple[torch.device, str], bool] = {}


def usable(x: Tensor) -> bool:
    """Whether the kernels take tensors of this device and dtype; where they should and cannot, says so once.

    Raises:
        RuntimeError: this is the first time, and the stream is being captured.
    """
    name = str(x.dtype).removeprefix("torch.")
    if x.device.type != "cuda" or name not in DTYPES:
        return False
    if (x.device, name) not in _READY:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the kernels of adder2d are tried before they are first used, which a CUDA graph cannot capture: "
                f"run the network once on {name} before capturing it"
            )
        _READY[x.device, name] = _ready(x.device, name)
    return _READY[x.device, name]


def obstacle(device: torch.device, dtype: str = "float32") -> str | None:
    """Why the kernels cannot be used on a CUDA device, after a trial of them; ``None`` if they can."""
    if torch.version.cuda is None:
        return "this torch is not made for CUDA"
    try:
        arch = build.checked(driver.architecture(device))
        wanted = list(variants([kind for kind in KINDS if kind != "integer"], [dtype]))
        missing = build.lacking()
        if missing and not all(build.present(variant, arch) for variant in wanted):
            return f"{missing} here to compile them, and they are not prebuilt for {arch}"
        from anncvt.runtime.kernels.cuda import trial

        return trial.disagreement(device, getattr(torch, dtype))
    except (AnncvtError, RuntimeError, OSError) as error:
        return first_line(error)


def _ready(device: torch.device, dtype: str) -> bool:
    reason = obstacle(device, dtype)
    if reason is not None:
        warnings.warn(f"slow pure-torch kernels on {device}: {reason}; see docs/gpu.md", stacklevel=3)
    return reason is None
