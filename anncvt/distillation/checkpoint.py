"""Checkpoints of a run: the last one, from which it goes on, and the weights of its best epoch."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anncvt.distillation.config import DistillConfig
from anncvt.errors import AnncvtError
from anncvt.files import write_state, write_tensors

CHECKPOINT = "train/checkpoint.pt"
BEST = "train/best.safetensors"


def discard_checkpoint(folder: Path) -> None:
    """The distilled program is saved: what a resumed run would start from is not needed any more."""
    (folder / CHECKPOINT).unlink(missing_ok=True)


def write(folder: Path, state: Mapping[str, Any]) -> None:
    """Replace the folder's checkpoint by ``state``, atomically: until it is complete the one before stays."""
    write_state(folder / CHECKPOINT, state)


def read(path: Path, content: bytes, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The state that :func:`write` was given.

    Args:
        path: where ``content`` was read.
        identity: what the run that goes on depends on; has to be that of the run that wrote it (its "identity").

    Raises:
        AnncvtError: it cannot be read, or belongs to another run.
    """
    fix = f"delete {path} to start the distillation again"
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        stored = json.loads(state["identity"])
    except Exception as error:  # a file that is no checkpoint fails in as many ways as there are formats
        raise AnncvtError(f"not a usable checkpoint: {error}", where=str(path), fix=fix) from error
    changed = [
        f"{name}: {stored.get(name)} then, {value} now" for name, value in identity.items() if stored.get(name) != value
    ]
    if changed:
        raise AnncvtError(
            f"the checkpoint was made with other settings ({'; '.join(changed)})",
            where=str(path),
            fix=f"resume with the same settings, or {fix}",
        )
    return state


def identity(config: DistillConfig, data: str, images: int) -> dict[str, Any]:
    """What has to be equal for a checkpoint to fit."""
    return {**config.identity(), "data": data, "images": images}


def write_best(folder: Path, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Replace the weights of the best epoch; ``about`` says which that is."""
    write_tensors(folder / BEST, weights, {name: str(value) for name, value in about.items()})


def read_best(folder: Path) -> dict[str, Tensor]:
    """The weights of the best epoch."""
    from safetensors.torch import load_file

    return load_file(folder / BEST)
