"""How much memory a piece of work takes at its peak, as the system counts it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


def peak_of(work: Callable[[], Result]) -> tuple[Result, int | None]:
    """The result of ``work`` and by how many bytes resident memory grew at most meanwhile; None if it cannot be told.

    What the process freed before is given back first, since memory that is used again would not count.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
        before = _status("VmRSS")
    except (OSError, ValueError):
        return work(), None
    result = work()
    return result, max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    """A line of /proc/self/status, bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) << 10
    raise ValueError(name)
