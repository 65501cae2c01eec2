"""A network as a function of numpy arrays, run by torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from anncvt.passes.fuse import for_inference
from anncvt.passes.pairing import channels_last
from anncvt.progress import SILENT, Progress
from anncvt.runtime.inference import inference_copy


def runner(
    network: nn.Module, device: torch.device | str = "cpu", progress: Progress = SILENT
) -> Callable[[np.ndarray], np.ndarray]:
    """Images ``[N, C, H, W]`` float32 to what ``network`` makes of them, computed in float32 by a copy of it.

    On a GPU adders are fused with what follows them; the first call does that, and copies to and fro belong to each.
    """
    where = torch.device(device)
    module = inference_copy(network).to(where)
    prepared: list[nn.Module] = []

    def call(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            x = torch.from_numpy(images).to(where)
            x = x if where.type == "cpu" else channels_last(x)
            if not prepared:
                prepared.append(for_inference(module, x[:2], progress))
            return prepared[0](x).cpu().numpy()

    return call
