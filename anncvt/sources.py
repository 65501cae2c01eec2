"""Readers of pictures on disk (folders, tar shards) -> a :class:`Listing` of them, nothing decoded yet."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anncvt.errors import AnncvtError
from anncvt.images import Picture

#: Folder and file names that mean a split, best first.
SPLITS = {"train": ("train", "training"), "test": ("test", "validation", "val", "valid")}
SPLIT_NAMES = frozenset(itertools.chain(*SPLITS.values()))

#: Share of a source without splits that is held out.
HELD_OUT = 0.2

_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pbm", ".tif", ".tiff", ".jpe")
)


class NoSuchSplit(AnncvtError):
    """The source is there and has no such split."""


@dataclass(frozen=True)
class Listing:
    """The pictures of one split. ``stream`` takes ascending row numbers and yields (name for messages, picture).

    ``blocks`` are the sizes of the runs of rows that cannot be read but as a whole, where there are such.
    """

    count: int
    stream: Callable[[np.ndarray], Iterator[tuple[str, Picture]]]
    labels: np.ndarray | None = None  # [count] int64
    classes: list[str] | None = None
    flip: bool = True
    blocks: np.ndarray | None = None


def array_listing(
    name: str, pixels: np.ndarray, labels: np.ndarray, classes: list[str] | None, *, flip: bool = True
) -> Listing:
    """Pixels that are in memory already, ``[N, H, W]`` or ``[N, H, W, 3]`` uint8."""

    def stream(rows: np.ndarray) -> Iterator[tuple[str, Picture]]:
        return ((name, pixels[row]) for row in rows)

    return Listing(len(pixels), stream, labels, classes, flip)


def choose_split(split: str, present: Sequence[str], where: str, fix: str | None = None) -> str:
    """The best of the ``present`` names that mean ``split``.

    Raises:
        NoSuchSplit: none does; the message names those present.
    """
    for name in SPLITS[split]:
        if name in present:
            return name
    raise NoSuchSplit(
        f"no {split} split here, there is {', '.join(sorted(present))}",
        where=where,
        fix=fix or f"add a {split} split, or name a data set that has one",
    )


def held_out(key: str) -> bool:
    """Whether the picture named ``key`` belongs to the test split of a source that has no splits.

    By hash, so that a picture stays on its side when others come or go.
    """
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") < HELD_OUT * 2**32


def folder(root: Path, split: str, labelled: bool) -> Listing:
    """Pictures in folders: ``ROOT/{train,val,...}/CLASS/*``, ``ROOT/CLASS/*`` or, unlabelled, ``ROOT/*``.

    Classes are the folder names in sorted order, those of the training split where there is one. A ROOT of classes
    without splits is divided by :func:`held_out`; a ROOT of pictures without classes is read whole.

    Raises:
        AnncvtError: no such folder, no pictures, no such split, no classes.
    """
    if not root.is_dir():
        raise AnncvtError("no such folder", where=str(root), fix="give the path of a folder of pictures")
    if not os.access(root, os.R_OK | os.X_OK):
        raise AnncvtError("no permission to read the folder", where=str(root), fix="correct its permissions")
    children = _subfolders(root)
    splits = [name for name in children if name in SPLIT_NAMES]
    # A class may be called "train": it is a split only if it holds classes, or if nothing but splits is there.
    if splits and (len(splits) == len(children) or any(_subfolders(root / name) for name in splits)):
        chosen = choose_split(
            split, splits, str(root), f"add a folder {split}, or write folder:{root / splits[0]} to have it divided"
        )
        names = _subfolders(root / choose_split("train", splits, "")) if "train" in splits else None
        return _files(root / chosen, _pictures(root / chosen), labelled, names)
    pictures = _pictures(root)
    if children:
        divided = [path for path in pictures if held_out(path) == (split == "test")]
        if pictures and not divided:
            raise NoSuchSplit(
                f"of {len(pictures)} pictures without splits none falls to {split}",
                where=str(root),
                fix=f"make folders train and {split} of classes",
            )
        pictures = divided
    return _files(root, pictures, labelled, children)


def _subfolders(root: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def _pictures(root: Path) -> list[str]:
    """Paths of all pictures under ``root``, relative to it with "/", sorted."""
    found = []
    for place, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(place).relative_to(root)
        found += [
            (relative / name).as_posix()
            for name in files
            if os.path.splitext(name)[1].lower() in _SUFFIXES and not name.startswith(".")
        ]
    if not found:
        raise AnncvtError(
            "no pictures here",
            where=str(root),
            fix="name a folder that holds JPEG, PNG or similar files (CLASS/PICTURE for labels)",
        )
    return sorted(found)


def _files(root: Path, pictures: list[str], labelled: bool, classes: list[str] | None) -> Listing:
    def stream(rows: np.ndarray) -> Iterator[tuple[str, Picture]]:
        return ((str(root / pictures[row]), root / pictures[row]) for row in rows)

    if not labelled:
        return Listing(len(pictures), stream)
    if classes is None:
        classes = _subfolders(root)
    number = {name: index for index, name in enumerate(classes)}
    labels = np.empty(len(pictures), np.int64)
    for index, picture in enumerate(pictures):
        name, slash, _ = picture.partition("/")
        if not slash:
            raise AnncvtError(
                "the picture lies in no class folder", where=str(root / picture), fix="make one folder for each class"
            )
        if name not in number:
            raise AnncvtError(
                f"class {name!r} is not among the {len(classes)} of the training split",
                where=str(root),
                fix="use the same class folders in both splits",
            )
        labels[index] = number[name]
    return Listing(len(pictures), stream, labels, classes)


def shards(pattern: str, split: str, labelled: bool) -> Listing:
    """WebDataset tar shards: members ``KEY.jpg`` (or png, ...) and ``KEY.cls`` (the class number as text).

    PATTERN may hold ``*`` and ``{000..009}``. Shards whose names tell their split (``train-000.tar``, ``val-000.tar``)
    are taken by it, others are divided by :func:`held_out` of the key.

    Raises:
        AnncvtError: no such shards, a broken or compressed one, no pictures, no such split, no class.
    """
    every = sorted({path for part in _braces(os.path.expanduser(pattern)) for path in glob.glob(part)})
    if not every:
        raise AnncvtError(
            "no such shards",
            where=f"wds:{pattern}",
            fix="give the path of tar files, like 'wds:DIR/train-{000..009}.tar'",
        )
    by_split: dict[str, list[str]] = {}
    for path in every:
        words = re.split(r"[^a-z]+", os.path.basename(path).lower())
        by_split.setdefault(next((word for word in words if word in SPLIT_NAMES), ""), []).append(path)
    divide = list(by_split) == [""]
    chosen = every if divide else by_split[choose_split(split, list(by_split), f"wds:{pattern}")]
    members = [
        member
        for path in chosen
        for member in _members(path)
        if not divide or held_out(member.key) == (split == "test")
    ]
    if not members:
        raise AnncvtError(
            f"no pictures of the {split} split here",
            where=f"wds:{pattern}",
            fix="name shards that hold KEY.jpg or KEY.png",
        )
    labels = None
    if labelled:
        without = next((member for member in members if member.label is None), None)
        if without is not None:
            raise AnncvtError(
                f"{without.key} has no class (a member {without.key}.cls with a number)",
                where=without.shard,
                fix="write the shards with .cls members",
            )
        labels = np.array([member.label for member in members], np.int64)

    def stream(rows: np.ndarray) -> Iterator[tuple[str, Picture]]:
        for shard, group in itertools.groupby((members[row] for row in rows), key=lambda member: member.shard):
            with open(shard, "rb") as file:
                for member in group:
                    file.seek(member.offset)
                    yield f"{shard}: {member.key}", file.read(member.size)

    return Listing(len(members), stream, labels)


@dataclass(frozen=True)
class _Member:
    shard: str
    key: str
    offset: int  # of the encoded picture in the tar file
    size: int
    label: int | None


def _members(path: str) -> list[_Member]:
    pictures: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    try:
        # "r:" is plain tar: a compressed shard could not be read picture by picture.
        with tarfile.open(path, "r:") as shard:
            for info in shard:
                # WebDataset's key is everything up to the first dot of the file name.
                place, name = os.path.split(info.name)
                stem, _, suffix = name.partition(".")
                key = f"{place}/{stem}" if place else stem
                if f".{suffix.lower()}" in _SUFFIXES:
                    pictures[key] = info
                elif suffix == "cls" and (content := shard.extractfile(info)) is not None:
                    labels[key] = int(content.read())
    except (tarfile.TarError, OSError, ValueError) as error:
        raise AnncvtError(
            f"cannot be read as an uncompressed tar shard: {error}",
            where=path,
            fix="decompress it, or write it again",
        ) from error
    return [_Member(path, key, info.offset_data, info.size, labels.get(key)) for key, info in pictures.items()]


def _braces(pattern: str) -> list[str]:
    """``a{08..11}b{x,y}`` -> every combination, as shells expand it."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    inside = match[1]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if bounds:
        digits = len(bounds[1]) if bounds[1].startswith("0") else 0
        options = [f"{number:0{digits}d}" for number in range(int(bounds[1]), int(bounds[2]) + 1)]
    else:
        options = inside.split(",")
    return [
        expanded
        for option in options
        for expanded in _braces(pattern[: match.start()] + option + pattern[match.end() :])
    ]
