"""Atomic writes: a reader sees the old file or the new one, never a half."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from anncvt.errors import AnncvtError

if TYPE_CHECKING:
    from torch import Tensor


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; on success fsync and rename it there, on failure remove it.

    Raises:
        AnncvtError: the folder cannot be created or written, or the disk is full.
    """
    target = Path(target)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        os.chmod(temporary, 0o666 & ~umask())  # last: some writers put a private file of their own there
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise AnncvtError(
            f"cannot write: {error.strerror or error}",
            where=str(target),
            fix="free disk space or choose a writable place with -o; nothing was changed there",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(target: Path, mark: str) -> Iterator[Path]:
    """Yield a new folder beside ``target``; on success it takes that place, on failure it is removed.

    Args:
        mark: the file that such a folder has. A folder at ``target`` is replaced if it has it, or is empty.

    Raises:
        AnncvtError: ``target`` is something else, or cannot be written.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / mark).is_file())):
        raise AnncvtError("exists and is something else", where=str(target), fix="choose another place with -o")
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.absolute().parent, prefix=f".{target.name}.", suffix=".tmp"))
        try:
            scratch.chmod(0o777 & ~umask())
            yield scratch
            if target.exists():
                shutil.rmtree(target)
            os.replace(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise AnncvtError(
            f"cannot write: {error.strerror or error}", where=str(target), fix="choose a writable place with -o"
        ) from error


def write_text(target: Path, text: str) -> None:
    """Atomically replace ``target`` by ``text`` (UTF-8)."""
    with atomic_path(target) as path:
        path.write_text(text, encoding="utf-8")


def write_state(target: Path, state: Mapping[str, Any]) -> None:
    """Atomically replace ``target`` by what ``torch.save`` makes of ``state``; errors as :func:`atomic_path`."""
    import torch

    with atomic_path(target) as path, open(path, "wb") as file:
        watched = _Watched(file)
        try:
            torch.save(dict(state), cast(BinaryIO, watched))
        except RuntimeError as error:  # torch's own, which does not tell that the disk is full
            raise watched.error or error from error


def write_tensors(target: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Atomically replace ``target`` by a safetensors file with ``about`` in its header; errors as :func:`atomic_path`.

    Tied tensors share memory, which the format does not allow: each name gets a copy.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    table = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    with atomic_path(target) as path:
        try:
            save_file(table, path, metadata=None if about is None else dict(about))
        except SafetensorError as error:  # its own name for what the file system said
            raise OSError(str(error)) from error


class _Watched:
    """A file that remembers why it could not be written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def umask() -> int:
    """The permission bits that new files of this process lack."""
    current = os.umask(0)
    os.umask(current)
    return current


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable (a no-op where folders cannot be opened)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
