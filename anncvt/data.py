"""DATA, what the user names, becomes :class:`Images`, what the passes read."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from anncvt import datasets, sources
from anncvt.errors import AnncvtError
from anncvt.images import Images, Picture, augment, decode, picture_size, read_image
from anncvt.parquet import parquet
from anncvt.program import Preprocess
from anncvt.progress import SILENT, Progress
from anncvt.sources import Listing
from anncvt.stream import Stream

__all__ = [
    "KINDS",
    "Images",
    "Stream",
    "augment",
    "native_size",
    "open_images",
    "open_training_images",
    "parse_spec",
    "read_image",
]

Split = Literal["train", "test"]

#: How DATA is spelled, kind by kind.
KINDS = {
    "digits": "digits",
    "synthetic": "synthetic",
    "cifar10": "cifar10",
    "cifar100": "cifar100",
    "mnist": "mnist",
    "fashion-mnist": "fashion-mnist",
    "imagenet": "imagenet",
    "folder": "folder:PATH",
    "hf": "hf:PATH",
    "wds": "wds:PATTERN",
}

#: Fewer pictures than this are decoded faster than a thread pool pays off.
_POOL_FROM = 500
_CHUNK = 128


def parse_spec(spec: str) -> tuple[str, str]:
    """DATA as ``(kind, argument)``, ``"hf:some/path"`` -> ``("hf", "some/path")``.

    Raises:
        AnncvtError: no such kind, or an argument missing or too many; the message lists the kinds.
    """
    kind, colon, argument = spec.partition(":")
    known = f"use one of {', '.join(KINDS.values())}"
    if kind not in KINDS:
        if Path(spec).expanduser().is_dir():
            known = f"write folder:{spec} (a folder of classes) or hf:{spec} (Hugging Face parquet files)"
        raise AnncvtError(f"no such data set: {spec!r}", fix=known)
    wanted = ":" in KINDS[kind]
    if wanted and not argument:
        raise AnncvtError(f"{spec!r} lacks its path", fix=f"write {KINDS[kind]}")
    if colon and not wanted:
        raise AnncvtError(f"{kind!r} takes no argument, got {argument!r}", fix=f"write {kind}, its place is --data-dir")
    return kind, argument


def open_images(
    spec: str,
    split: Split,
    preprocess: Preprocess,
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    workers: int = 0,
    labelled: bool = True,
    progress: Progress = SILENT,
) -> Images:
    """Decode one split of DATA into memory at ``preprocess.input_size``.

    Args:
        data_dir: where the data sets that are known by name lie, in torchvision's layouts.
        limit: at most so many pictures, the first of a permutation seeded by ``seed`` (a source sorted by class is
            sampled evenly). None: all, in the order of the source.
        workers: decoding threads; 0: one per core.
        labelled: labels are required. With False ``labels`` and ``classes`` are None and folders need no classes.

    Raises:
        AnncvtError: DATA is unknown, missing, empty, lacks the split or the labels, holds a picture that cannot be
            decoded, or does not fit in memory.
    """
    listing, order = select(spec, split, preprocess, data_dir, limit, seed, labelled)
    _guard_memory(len(order), preprocess.input_size, spec)
    return _held(listing, order, f"{spec} {split}", preprocess, workers, progress)


def open_training_images(
    spec: str,
    preprocess: Preprocess,
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    workers: int = 0,
    progress: Progress = SILENT,
) -> Images | Stream:
    """The labelled training split of DATA: in memory where it fits, else decoded while it is used.

    Raises:
        AnncvtError: as :func:`open_images`, but a data set may be of any size.
    """
    listing, order = select(spec, "train", preprocess, data_dir, limit, seed, True)
    if _too_large(len(order), preprocess.input_size) is None:
        return _held(listing, order, f"{spec} train", preprocess, workers, progress)
    progress.note(f"{len(order)} images do not fit in memory: they are decoded while they are trained on")
    return Stream(listing, order, preprocess.input_size, f"{spec} train", workers)


def select(
    spec: str,
    split: Split,
    preprocess: Preprocess,
    data_dir: str | Path | None,
    limit: int | None,
    seed: int,
    labelled: bool,
) -> tuple[Listing, np.ndarray]:
    """The pictures of a split, and the rows of those that are wanted; see :func:`open_images`."""
    if limit is not None and limit < 1:
        raise AnncvtError(f"a limit of {limit} images", fix="give --limit a positive number")
    if parse_spec(spec)[0] == "synthetic":
        listing = datasets.synthetic(split, preprocess.input_size, limit, seed)
    else:
        listing = _list(spec, split, data_dir, labelled)
    if not labelled:
        listing = replace(listing, labels=None, classes=None)
    if limit is None:
        return listing, np.arange(listing.count)
    return listing, torch.randperm(listing.count, generator=torch.Generator().manual_seed(seed))[:limit].numpy()


def _held(
    listing: Listing, order: np.ndarray, name: str, preprocess: Preprocess, workers: int, progress: Progress
) -> Images:
    pixels = _decode_all(listing, order, preprocess.input_size, workers, progress)
    labels = None if listing.labels is None else torch.from_numpy(listing.labels[order].astype(np.int64))
    classes = None if labels is None else listing.classes
    return Images(torch.from_numpy(pixels), labels, classes, name, listing.flip)


def native_size(spec: str, data_dir: str | Path | None = None) -> tuple[int, int, int] | None:
    """``(C, H, W)`` when the pictures of DATA share one size (judged by eight of them), else None.

    Raises:
        AnncvtError: DATA is unknown, missing or empty.
    """
    if parse_spec(spec)[0] == "synthetic":
        return None
    try:
        listing = _list(spec, "train", data_dir, False)
    except sources.NoSuchSplit:
        listing = _list(spec, "test", data_dir, False)
    probes = np.unique(np.linspace(0, listing.count - 1, 8).astype(np.int64))
    sizes = {picture_size(picture) for _, picture in listing.stream(probes)}
    return sizes.pop() if len(sizes) == 1 else None


def _list(spec: str, split: Split, data_dir: str | Path | None, labelled: bool) -> Listing:
    """The pictures of every kind but ``synthetic``."""
    kind, argument = parse_spec(spec)
    if kind == "digits":
        return datasets.digits(split)
    if kind == "hf":
        return parquet(argument, split, labelled)
    if kind == "folder":
        return sources.folder(Path(argument).expanduser(), split, labelled)
    if kind == "wds":
        return sources.shards(argument, split, labelled)
    if data_dir is None:
        raise AnncvtError(f"where is {kind}?", fix="name the folder that holds it with --data-dir")
    root = Path(data_dir).expanduser()
    if kind == "imagenet":
        return sources.folder(root / "imagenet" if (root / "imagenet").is_dir() else root, split, labelled)
    return datasets.READERS[kind](root, split)


def _decode_all(
    listing: Listing, order: np.ndarray, size: tuple[int, ...], workers: int, progress: Progress
) -> np.ndarray:
    """The pictures of ``listing`` at ``order`` as ``[N, C, H, W]`` uint8, decoded in a pool of threads when many."""
    pixels = np.empty((len(order), *size), np.uint8)
    # Sources are read front to back; each picture goes to its place in `order`.
    slots = np.argsort(order)
    stream = zip(slots, listing.stream(order[slots]), strict=True)

    def work(chunk: list[tuple[int, tuple[str, Picture]]]) -> int:
        for slot, (where, picture) in chunk:
            pixels[slot] = decode(picture, size, where)
        return len(chunk)

    chunks: Iterator[list[tuple[int, tuple[str, Picture]]]] = iter(lambda: list(islice(stream, _CHUNK)), [])
    with progress.task("reading images", len(order)) as task:
        if len(order) <= _POOL_FROM:
            for chunk in chunks:
                task.advance(work(chunk))
            return pixels
        threads = workers or os.cpu_count() or 1
        pool = ThreadPoolExecutor(threads)
        waiting: deque[Future[int]] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(work, chunk))
                # Bounded, so that encoded pictures do not pile up faster than they are decoded.
                if len(waiting) > 4 * threads:
                    task.advance(waiting.popleft().result())
            while waiting:
                task.advance(waiting.popleft().result())
        finally:
            pool.shutdown(cancel_futures=True)
    return pixels


def _guard_memory(count: int, size: tuple[int, ...], spec: str) -> None:
    """Refuse what would take more than half of the free memory, before reading anything."""
    available, each = _too_large(count, size), int(np.prod(size))
    if available is not None:
        raise AnncvtError(
            f"{count} images of {'x'.join(map(str, size))} take {count * each / 2**30:.1f} GiB, "
            f"{available / 2**30:.1f} GiB are free and half of that may be used",
            where=spec,
            fix=f"read fewer with --limit {max(1, available // 2 // each)}",
        )


def _too_large(count: int, size: tuple[int, ...]) -> int | None:
    """The free memory if the images would take more than half of it, else None."""
    available = available_memory()
    return available if available is not None and count * int(np.prod(size)) > available // 2 else None


def available_memory() -> int | None:
    """Bytes of memory that this process may still take, None where the system does not tell."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        # A container's own limit, where there is one ("max" otherwise).
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(found, default=None)
