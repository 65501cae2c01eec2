"""What a checkpoint file is, told from its content, and its tensors read without running any of it."""

from __future__ import annotations

import hashlib
import io
import json
import math
import stat
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anncvt import pickles
from anncvt.errors import AnncvtError
from anncvt.pickles import StorageRef, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

_RESAVE = "save the weights with torch.save(model.state_dict(), path) and pass --arch"
_LEGACY_MAGIC = b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
#: A zip whose entries unpack to more than this many times the file is a bomb; torch does not compress at all.
_MAX_EXPANSION = 16
#: What torch.export calls dtypes in its JSON (c10::ScalarType + 1).
_EXPORT_DTYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64", 12: "bool",
    13: "bfloat16",
}  # fmt: skip

#: Things people save under a checkpoint's name that hold no weights this tool can read: (what it is, what to do).
_NOT_WEIGHTS: dict[str, tuple[str, str]] = {
    "empty": ("the file is empty", "download or copy it again"),
    "git-lfs-pointer": ("a Git LFS pointer, not the file itself", "run `git lfs pull` where it came from"),
    "html": ("a saved web page, not a checkpoint", "download the file itself (the 'raw' or 'download' link)"),
    "onnx": ("an ONNX graph; the converter needs the PyTorch network", _RESAVE),
    "hdf5": ("a Keras/HDF5 file", "convert it to PyTorch first, then " + _RESAVE),
    "tar": (
        "a tar archive",
        "unpack it and name the checkpoint inside; if PyTorch older than 0.2 wrote it, load it with that, then "
        + _RESAVE,
    ),
    "gzip": ("compressed with gzip", "decompress it with gunzip"),
    "pickle": ("a plain pickle, not written by torch.save", _RESAVE),
    "numpy": ("a NumPy file", _RESAVE),
    "zip": ("a zip archive that is not a checkpoint", "if there is a checkpoint inside, unpack it; else " + _RESAVE),
    "unknown": ("not a checkpoint of a known kind", "anncvt reads torch.save files, safetensors, TorchScript and .pt2"),
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's content. Tensors are read from the file only where ``tensor`` is asked for them."""

    kind: str  # state_dict, legacy, safetensors, torchscript, torch.export, index
    value: Any  # nested dicts with TensorRef or Tensor leaves; Inert for a pickled module
    names: frozenset[str] = frozenset()  # classes and functions a pickle names
    tensor: Callable[[Any], Tensor] = field(repr=False, default=lambda leaf: leaf)


def sniff(path: Path) -> str:
    """The kind of a file, from its first bytes and, for zips, its table of contents. Nothing is unpickled.

    Raises:
        AnncvtError: the file is missing, unreadable, or a zip that is cut short.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe may wait for ever, and readers jump to and fro
            raise AnncvtError("not a regular file", where=str(path), fix="copy what it gives to a file first")
        size = status.st_size
        with open(path, "rb") as file:
            head = file.read(1024)
    except FileNotFoundError as error:
        raise AnncvtError("no such file", where=str(path), fix="check the path") from error
    except OSError as error:
        raise AnncvtError(f"cannot read: {error.strerror or error}", where=str(path), fix="check the path") from error
    text = head.lstrip()[:15].lower()
    if not head:
        return "empty"
    if head.startswith(b"version https://git-lfs"):
        return "git-lfs-pointer"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "html"
    if head.startswith(b"PK\x03\x04"):
        return _sniff_zip(path)
    if head.startswith(b"\x80\x02\x8a\n" + _LEGACY_MAGIC):
        return "legacy"
    if text.startswith(b"{") and b'"weight_map"' in path.read_bytes()[: 64 << 20]:
        return "index"
    if len(head) > 8 and head[8:9] == b"{" and 2 <= struct.unpack("<Q", head[:8])[0] <= size - 8:
        return "safetensors"
    if head[8:9] == b"{" and b'"dtype"' in head:
        raise pickles.corrupt(str(path), "a safetensors file that ends inside its header")
    if head.startswith(b"\x89HDF"):
        return "hdf5"
    if head.startswith(b"\x93NUMPY"):
        return "numpy"
    if head[257:262] == b"ustar":
        return "tar"
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    if head[:1] == b"\x08" and head[2:3] in (b"\x12", b"\x1a", b"\x22", b"\x3a"):
        return "onnx"
    return "pickle" if head[:1] == b"\x80" else "unknown"


def read(path: Path) -> Checkpoint:
    """Read a checkpoint of any kind.

    Raises:
        AnncvtError: not a checkpoint, damaged, a bomb, or a pickle that calls functions.
    """
    kind = sniff(path)
    if kind in _NOT_WEIGHTS:
        what, fix = _NOT_WEIGHTS[kind]
        raise AnncvtError(what, where=str(path), fix=fix)
    readers = {
        "legacy": _read_legacy,
        "safetensors": _read_safetensors,
        "index": _read_index,
        "torch.export": _read_export,
    }
    try:
        return readers.get(kind, _read_zip)(path, kind)
    except AnncvtError:
        raise
    except MemoryError as error:
        raise AnncvtError("not enough memory to read the checkpoint", where=str(path)) from error
    except Exception as error:
        raise pickles.corrupt(str(path), str(error).strip().splitlines()[0] if str(error) else repr(error)) from error


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sniff_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises a dozen kinds on a damaged directory
        raise pickles.corrupt(str(path), "its table of contents is unreadable") from error
    if entries and min(entry.header_offset for entry in entries) > 0:
        raise pickles.corrupt(str(path), "its own table of contents is missing, there is one of an archive inside")
    names = {entry.filename.partition("/")[2] or entry.filename for entry in entries}
    if "serialized_exported_program.json" in names or any(
        name.startswith("models/") and name.endswith(".json") for name in names
    ):
        return "torch.export"
    if "data.pkl" in names:
        return "torchscript" if any(name.startswith("code/") for name in names) else "state_dict"
    return "numpy" if names and all(name.endswith(".npy") for name in names) else "zip"


def _open_zip(path: Path) -> tuple[zipfile.ZipFile, str]:
    """The archive, checked for bombs, and the folder inside it that holds everything."""
    archive = zipfile.ZipFile(path)
    entries = archive.infolist()
    size = path.stat().st_size
    if sum(entry.file_size for entry in entries) > _MAX_EXPANSION * size + (1 << 20):
        raise AnncvtError("the archive claims to unpack to many times its size: refused", where=str(path), fix=_RESAVE)
    marker = next(e.filename for e in entries if e.filename.endswith(("data.pkl", "weights_config.json", "version")))
    root = marker.partition("/")[0] + "/" if "/" in marker else ""
    order = root + "byteorder"
    if order in archive.namelist() and archive.read(order).strip() != b"little":
        raise AnncvtError("saved on a big-endian machine", where=str(path), fix="save it again on a little-endian one")
    return archive, root


def _read_zip(path: Path, kind: str) -> Checkpoint:
    archive, root = _open_zip(path)
    with archive.open(root + "data.pkl") as member:
        content = pickles.unpickle(io.BytesIO(member.read(pickles.MAX_BYTES)), str(path))

    def data(key: str) -> bytes:
        return archive.read(f"{root}data/{key}")

    return Checkpoint(kind, content.value, frozenset(content.names), _Materialiser(path, data))


def _read_legacy(path: Path, kind: str) -> Checkpoint:
    """torch.save before 1.6: five pickles (magic, version, system, content, storage keys), then the storages."""
    where = str(path)
    with open(path, "rb") as file:
        pickles.unpickle(file, where)
        pickles.unpickle(file, where)
        pickles.unpickle(file, where)
        content = pickles.unpickle(file, where)
        keys = pickles.unpickle(file, where).value
        start = file.tell()
    if not isinstance(keys, list):
        raise pickles.corrupt(where, "no list of storages")
    item = {ref.key: _itemsize(ref.dtype) for ref in _storages(content.value)}
    places: dict[str, tuple[int, int]] = {}
    size = path.stat().st_size
    with open(path, "rb") as file:
        for key in map(str, keys):
            file.seek(start)
            (numel,) = struct.unpack("<q", file.read(8))
            length = numel * item.get(key, 1)
            if numel < 0 or start + 8 + length > size:
                raise pickles.corrupt(where, "it ends inside the weights")
            places[key] = (start + 8, length)
            start += 8 + length

    def data(key: str) -> bytes:
        offset, length = places[key]
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(length)

    return Checkpoint(kind, content.value, frozenset(content.names), _Materialiser(path, data))


def _read_safetensors(path: Path, kind: str) -> Checkpoint:
    from safetensors.torch import load_file

    return Checkpoint(kind, load_file(path))


def _read_index(path: Path, kind: str) -> Checkpoint:
    """A sharded checkpoint: ``weight_map`` says which file beside the index holds which tensor."""
    index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    value: dict[str, Any] = {}
    for shard in sorted(set(index.values())):
        if Path(shard).name != shard:
            raise AnncvtError(f"the index points outside its folder: {shard!r}", where=str(path))
        if sniff(path.parent / shard) == "index":
            raise pickles.corrupt(str(path), f"{shard} is an index, too")
        part = read(path.parent / shard)
        if not isinstance(part.value, Mapping):
            raise pickles.corrupt(str(path.parent / shard), "no tensors by name")
        wanted = {name for name, file in index.items() if file == shard}
        value.update({name: part.tensor(leaf) for name, leaf in part.value.items() if name in wanted})
    missing = sorted(set(index) - set(value))
    if missing:
        raise pickles.corrupt(str(path), f"{missing[0]} is in none of the files it names")
    return Checkpoint(kind, value)


def _read_export(path: Path, kind: str) -> Checkpoint:
    """A .pt2 of torch.export: raw tensors with a JSON table."""
    archive, root = _open_zip(path)
    table = f"{root}data/weights/model_weights_config.json"
    if table not in archive.namelist():
        raise AnncvtError("a .pt2 in the layout of an older PyTorch", where=str(path), fix=_RESAVE)
    value: dict[str, TensorRef] = {}
    for name, entry in json.loads(archive.read(table))["config"].items():
        meta = entry["tensor_meta"]
        if entry.get("use_pickle") or meta["dtype"] not in _EXPORT_DTYPES:
            raise AnncvtError(f"{name} is stored in a form this tool does not read", where=str(path), fix=_RESAVE)
        dtype = _EXPORT_DTYPES[meta["dtype"]]
        sizes, strides = ([int(n["as_int"]) for n in meta[key]] for key in ("sizes", "strides"))
        length = archive.getinfo(f"{root}data/weights/{entry['path_name']}").file_size
        storage = StorageRef(entry["path_name"], dtype, length // _itemsize(dtype))
        offset = int(meta["storage_offset"]["as_int"])
        value[name] = TensorRef(storage, dtype, offset, tuple(sizes), tuple(strides))

    def data(key: str) -> bytes:
        return archive.read(f"{root}data/weights/{key}")

    return Checkpoint(kind, value, tensor=_Materialiser(path, data))


class _Materialiser:
    """Turns a :class:`TensorRef` into a tensor, after checking that the file holds every element it claims."""

    def __init__(self, path: Path, data: Callable[[str], bytes]) -> None:
        self.path, self.data = path, data
        self.storages: dict[str, Tensor] = {}  # by key, as bytes: tensors that shared memory share it again

    def __call__(self, leaf: Any) -> Tensor:
        try:
            return self._view(leaf)
        except (AnncvtError, MemoryError):
            raise
        except Exception as error:  # the zip member is damaged, or the claim does not fit it
            raise pickles.corrupt(str(self.path), str(error) or type(error).__name__) from error

    def _view(self, ref: TensorRef) -> Tensor:
        import torch

        key = ref.storage.key
        if key not in self.storages:
            content = self.data(key)
            empty = torch.empty(0, dtype=torch.uint8)
            self.storages[key] = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else empty
        item = _itemsize(ref.dtype)
        whole = self.storages[key]
        begin = ref.storage.start * _itemsize(ref.storage.dtype)
        end = begin + ref.storage.numel * _itemsize(ref.storage.dtype)
        reach = ref.offset + 1 + sum((n - 1) * s for n, s in zip(ref.size, ref.stride, strict=True))
        if math.prod(ref.size) == 0:
            reach = 0
        if not 0 <= begin <= end <= whole.numel() or reach * item > end - begin:
            raise ValueError("a tensor is larger than its data")
        usable = (end - begin) // item * item
        elements = whole[begin : begin + usable].view(getattr(torch, ref.dtype))
        return elements.as_strided(ref.size, ref.stride, ref.offset)


def _itemsize(dtype: str) -> int:
    import torch

    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"unknown dtype {dtype}")
    return kind.itemsize


def _storages(value: Any) -> list[StorageRef]:
    """Every storage a pickle's content refers to."""
    found: list[StorageRef] = []
    seen: set[int] = set()
    todo = [value]
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, TensorRef):
            found.append(item.storage)
        elif isinstance(item, Mapping):
            todo.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            todo.extend(item)
        elif isinstance(item, pickles.Inert):
            todo.extend(vars(item).values())
    return found
