"""Which of several processes this is, as torchrun (and what builds on it, accelerate) tells in the environment."""

from __future__ import annotations

import os


def rank() -> int:
    """0 in the only process, or in the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def count() -> int:
    """How many processes were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """The same among the processes of this machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if count() > 1 else 0
