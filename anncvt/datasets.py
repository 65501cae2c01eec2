"""Data sets known by name: digits, synthetic, CIFAR and the MNIST family."""

from __future__ import annotations

import gzip
import math
import pickle
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from anncvt.errors import AnncvtError
from anncvt.images import InputArray, Picture
from anncvt.sources import Listing, array_listing

#: Held-out images of ``digits``.
DIGITS_TEST = 500

_DIGITS = tuple("0123456789")
_FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def digits(split: str) -> Listing:
    """scikit-learn's 1797 digits, 8x8 grey; 1297 to train on and 500 held out, the same on every machine."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise AnncvtError(
            "the digits come with scikit-learn, which is not installed", fix='pip install "anncvt[data]"'
        ) from error
    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    train, test = _stratified(labels, DIGITS_TEST)
    chosen = train if split == "train" else test
    return array_listing("digits", pixels[chosen], labels[chosen], list(_DIGITS), flip=False)


def _stratified(labels: np.ndarray, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (rest, held out), every class by its share, from a fixed seed."""
    shuffled = np.random.RandomState(0).permutation(len(labels))
    # Rank of every row inside its class, as a share of the class: the smallest ranks overall are an even sample.
    rank = np.empty(len(labels))
    for label in np.unique(labels):
        rows = shuffled[labels[shuffled] == label]
        rank[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    by_rank = np.argsort(rank, kind="stable")
    return np.sort(by_rank[held_out:]), np.sort(by_rank[:held_out])


def synthetic(split: str, size: tuple[int, ...], count: int | None, seed: int) -> Listing:
    """``count`` (default 1024) noise images of ten labels at ``size``, for trying things out without any data.

    The one data set of every input shape, networks over sequences and volumes included.
    """
    number = count or 1024

    def stream(rows: np.ndarray) -> Iterator[tuple[str, Picture]]:
        for row in rows:
            noise = np.random.default_rng((seed, split == "test", row))
            yield "synthetic", InputArray(noise.integers(0, 256, size, np.uint8))

    return Listing(number, stream, np.arange(number, dtype=np.int64) % 10, list(_DIGITS))


def cifar10(root: Path, split: str) -> Listing:
    """CIFAR-10 as unpacked from its archive: ``ROOT/cifar-10-batches-py``."""
    place = _find(root, "cifar-10-batches-py", "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz")
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    classes = _unpickle(place / "batches.meta").get("label_names")
    return _cifar("cifar10", [place / name for name in names], "labels", classes)


def cifar100(root: Path, split: str) -> Listing:
    """CIFAR-100 (fine labels) as unpacked from its archive: ``ROOT/cifar-100-python``."""
    place = _find(root, "cifar-100-python", "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz")
    classes = _unpickle(place / "meta").get("fine_label_names")
    return _cifar("cifar100", [place / split], "fine_labels", classes)


def _cifar(name: str, paths: list[Path], key: str, classes: Any) -> Listing:
    pixels, labels = [], []
    for path in paths:
        batch = _unpickle(path)
        data, numbers = batch.get("data"), batch.get(key)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
            raise _broken(path, "no 'data' of 3072 bytes a picture")
        if not isinstance(numbers, list) or len(numbers) != len(data) or {*map(type, numbers)} != {int}:
            raise _broken(path, f"no {key!r}, one number a picture")
        pixels.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(np.array(numbers, np.int64))
    names = [str(c) for c in classes] if isinstance(classes, list) else None
    return array_listing(name, np.concatenate(pixels), np.concatenate(labels), names)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of plain containers and numpy arrays; anything else that a pickle may name or run is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")):
            return _empty_array
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes into old protocols
            return _latin1
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}")


def _empty_array(kind: type, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    """What numpy's pickles start from; their state fills it."""
    if kind is not np.ndarray:
        raise pickle.UnpicklingError("an array of an unknown class")
    return np.empty(shape, np.uint8)


def _latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


def _unpickle(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise AnncvtError("the file is missing", where=str(path), fix="unpack the whole archive")
    try:
        with open(path, "rb") as file:
            # latin1: the archives were written by Python 2, whose strings hold the arrays' bytes.
            content = _ArrayUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a hostile or broken pickle fails in any way it likes
        raise _broken(path, f"{error or type(error).__name__}") from error
    if not isinstance(content, dict):
        raise _broken(path, "no table in it")
    return content


def mnist(root: Path, split: str) -> Listing:
    """MNIST: idx files (``.gz`` or not) in ``ROOT/MNIST/raw`` or ROOT."""
    return _idx("mnist", root, "MNIST", "https://ossci-datasets.s3.amazonaws.com/mnist", split, list(_DIGITS), False)


def fashion_mnist(root: Path, split: str) -> Listing:
    """Fashion-MNIST: idx files (``.gz`` or not) in ``ROOT/FashionMNIST/raw`` or ROOT."""
    home = "https://github.com/zalandoresearch/fashion-mnist"
    return _idx("fashion-mnist", root, "FashionMNIST", home, split, list(_FASHION), True)


def _idx(name: str, root: Path, folder: str, home: str, split: str, classes: list[str], flip: bool) -> Listing:
    prefix = "train" if split == "train" else "t10k"
    raw = root / folder / "raw"
    place = raw if raw.is_dir() else root
    pixels = _read_idx(place, f"{prefix}-images-idx3-ubyte", 3, home)
    labels = _read_idx(place, f"{prefix}-labels-idx1-ubyte", 1, home)
    if len(pixels) != len(labels):
        raise _broken(place, f"{len(pixels)} pictures and {len(labels)} labels")
    return array_listing(name, pixels, labels.astype(np.int64), classes, flip=flip)


def _read_idx(place: Path, name: str, dimensions: int, home: str) -> np.ndarray:
    """An idx file of bytes: magic ``00 00 08 D``, D big-endian int32 sizes, the bytes."""
    plain, packed = place / name, place / f"{name}.gz"
    path = plain if plain.is_file() else packed
    if not path.is_file():
        raise AnncvtError(
            f"no {name} (or .gz) here", where=str(place), fix=f"fetch it from {home}, or correct --data-dir"
        )
    try:
        content = gzip.decompress(path.read_bytes()) if path == packed else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise _broken(path, str(error)) from error
    head = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) < head:
        raise _broken(path, "no idx file of bytes")
    shape = struct.unpack(f">{dimensions}i", content[4:head])
    if min(shape) < 1 or len(content) - head != math.prod(shape):
        raise _broken(path, f"{len(content) - head} bytes for a shape of {'x'.join(map(str, shape))}")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def _find(root: Path, name: str, home: str) -> Path:
    place = root if root.name == name else root / name
    if not place.is_dir():
        raise AnncvtError("no such folder", where=str(place), fix=f"unpack {home} there, or correct --data-dir")
    return place


def _broken(path: Path, why: str) -> AnncvtError:
    return AnncvtError(f"is damaged or something else: {why}", where=str(path), fix="fetch it again from its source")


#: The data sets that lie under ``--data-dir``.
READERS: dict[str, Callable[[Path, str], Listing]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
}
