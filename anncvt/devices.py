"""Where networks are trained and evaluated: the CPU or an NVIDIA GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from anncvt import launch
from anncvt.errors import AnncvtError

if TYPE_CHECKING:
    import torch
    from torch import nn

DEVICES = ("auto", "cpu", "cuda")


def choose(name: str) -> torch.device:
    """The device called ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; ``"auto"``: a GPU where there is one.

    Processes that were launched together take one GPU each, as far as there are so many.

    Raises:
        AnncvtError: there is no such device.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise AnncvtError(f"no device {name!r}", fix="name cpu, cuda, cuda:1 or auto") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        built = "no GPU is visible" if torch.version.cuda else f"this torch ({torch.__version__}) is made for CPUs"
        raise AnncvtError(f"no device {name!r}: {built}", fix="--device cpu, or install torch for CUDA")
    if name == "cuda" and launch.count() > 1:
        return torch.device("cuda", launch.local_rank() % torch.cuda.device_count())
    return device


@contextlib.contextmanager
def on(device: torch.device, *networks: nn.Module | None) -> Iterator[None]:
    """Networks on ``device`` for the duration of the ``with`` block, then where they were, on the CPU."""
    try:
        for network in networks:
            if network is not None:
                network.to(device)
        yield
    finally:
        for network in networks:
            if network is not None:
                network.to("cpu")
