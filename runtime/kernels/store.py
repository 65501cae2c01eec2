"""The folder of compiled kernels, shared by processes.

It is ``ANNCVT_CACHE`` (default ``~/.cache/anncvt/kernels``). A file is written under a temporary name and renamed; it
ends with a checksum, so a damaged one is noticed before it is loaded, and replaced. Beyond ``LIMIT`` bytes the files
that were not used for longest go.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

LIMIT = 256 << 20
"""Bytes that the folder may hold: several thousand kernels."""


def folder() -> Path:
    """Where compiled kernels are kept."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anncvt" / "kernels"
    return Path(os.environ.get("ANNCVT_CACHE") or default)


def intact(path: Path) -> bool:
    """Whether the file ends with its checksum. (Mapping a truncated library would end the process.)"""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def write(path: Path, make: Callable[[Path], object]) -> None:
    """Let ``make`` write the file, append its checksum, and put it in place; then keep the folder small.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as scratch:
        fresh = Path(scratch) / path.name
        make(fresh)
        # Bytes after the end of a shared library or of a cubin are ignored by its loader.
        with open(fresh, "ab") as file:
            file.write(hashlib.sha256(fresh.read_bytes()).digest())
        os.replace(fresh, path)
    _trim(path.parent)


def used(path: Path) -> None:
    """Note that the file was used (the access times of a file system may be off)."""
    with contextlib.suppress(OSError):
        os.utime(path)


def _trim(kept: Path) -> None:
    """Delete what was not used for longest until the folder is small enough, and what interrupted processes left."""
    entries = []
    for path in kept.iterdir():
        with contextlib.suppress(OSError):  # another process trims too
            status = path.stat()
            if path.suffix in (".so", ".cubin"):
                entries.append((status.st_mtime, status.st_size, path))
            elif path.name.startswith(".new-") and status.st_mtime < time.time() - 3600:
                shutil.rmtree(path, ignore_errors=True)
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= LIMIT:
            break
        path.unlink(missing_ok=True)
        total -= size
