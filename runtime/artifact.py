"""The file a compiled network is: a shared library, then a manifest and a checksum.

The dynamic loader ignores what follows the library, so the file loads as it is; the manifest can be read, and damage
and foreign processors noticed, before any of its code is mapped.

Layout: library, JSON manifest, SHA-256 of both (32 bytes), length of the JSON (8, little-endian), magic (8).
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from anncvt.errors import AnncvtError

MAGIC = b"ANNCVT01"
_TAIL = struct.Struct("<32sQ8s")


def seal(library: Path, manifest: dict[str, Any]) -> None:
    """Append ``manifest`` and the checksum to the shared library at ``library``."""
    text = json.dumps(manifest, indent=1).encode()
    digest = _digest(library)
    digest.update(text)
    with open(library, "ab") as file:
        file.write(text + _TAIL.pack(digest.digest(), len(text), MAGIC))


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a compiled network, after checking that the file is whole.

    Raises:
        AnncvtError: the file is missing, unreadable, not a compiled network, or damaged.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL.size))
            tail = file.read()
            if len(tail) < _TAIL.size or not tail.endswith(MAGIC):
                raise _damaged(path, "not a compiled network, or cut off")
            checksum, length, _ = _TAIL.unpack(tail)
            if length > size - _TAIL.size:
                raise _damaged(path, "damaged")
            file.seek(size - _TAIL.size - length)
            text = file.read(length)
    except OSError as error:
        raise AnncvtError(
            f"cannot read: {error.strerror or error}", where=str(path), fix="give the file that `anncvt compile` wrote"
        ) from error
    if _digest(path, size - _TAIL.size).digest() != checksum:
        raise _damaged(path, "damaged (checksum differs)")
    manifest: dict[str, Any] = json.loads(text)
    return manifest


def _damaged(path: Path, what: str) -> AnncvtError:
    return AnncvtError(what, where=str(path), fix="compile it again, or copy it again completely")


def _digest(path: Path, size: int | None = None) -> Any:
    """SHA-256 of the first ``size`` bytes."""
    digest, left = hashlib.sha256(), size
    with open(path, "rb") as file:
        while left is None or left > 0:
            piece = file.read(1 << 20 if left is None else min(left, 1 << 20))
            if not piece:
                break
            digest.update(piece)
            left = None if left is None else left - len(piece)
    return digest
