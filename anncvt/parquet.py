"""Reader of Hugging Face data sets that lie on disk as parquet files, with pyarrow alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anncvt.errors import AnncvtError
from anncvt.images import Picture
from anncvt.sources import SPLIT_NAMES, SPLITS, Listing, choose_split

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")


def parquet(path: str, split: str, labelled: bool) -> Listing:
    """``{train,test,validation}-*.parquet`` in PATH or in one folder below it.

    Columns ``image`` or ``img`` (``{bytes, path}``) and ``label``, ``labels`` or ``fine_label``; class names come from
    the ``huggingface`` entry of the schema.

    Raises:
        AnncvtError: no such local folder (says how to get it), no parquet files, no such split, no such columns.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise AnncvtError(
            "no such folder; data sets are read from disk, never downloaded",
            where=f"hf:{path}",
            fix=f"fetch it with: hf download {path} --repo-type dataset --local-dir {root.name}\n"
            f"then write hf:{root.name}",
        )
    found = _split_files(root)
    candidates = [name for name in SPLITS[split] if name in found] or [choose_split(split, list(found), str(root))]
    for name in candidates:
        listing = _listing(found[name], labelled)
        # Some public data sets hide the labels of their test split (-1) and mean validation to be used.
        if listing.labels is None or (listing.labels >= 0).all():
            return listing
    raise AnncvtError(
        f"the {candidates[0]} split hides its labels (-1)", where=str(root), fix="use a data set with labels"
    )


def _split_files(root: Path) -> dict[str, list[Path]]:
    """Split name -> its files in order."""
    files = [root] if root.is_file() else sorted(root.rglob("*.parquet"))
    if not files:
        raise AnncvtError(
            "no parquet files here",
            where=str(root),
            fix="name the folder with train-*.parquet and test-*.parquet; for a folder of pictures write folder:PATH",
        )
    found: dict[str, list[Path]] = {}
    for file in files:
        word = re.split(r"[-_.]", file.name)[0]
        name = word if word in SPLIT_NAMES else file.parent.name
        # Files that name no split are training data, as Hugging Face has it.
        found.setdefault(name if name in SPLIT_NAMES else "train", []).append(file)
    for name, members in found.items():
        folders = sorted({str(file.parent) for file in members})
        if len(folders) > 1:
            raise AnncvtError(
                f"{len(folders)} folders with a {name} split: {', '.join(folders)}",
                where=str(root),
                fix=f"choose one, e.g. hf:{folders[0]}",
            )
    return found


def _open(path: Path) -> ParquetFile:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise AnncvtError("parquet files need pyarrow", where=str(path), fix='pip install "anncvt[data]"') from error
    try:
        return ParquetFile(path)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> AnncvtError:
    return AnncvtError(f"cannot be read as parquet: {error}", where=str(path), fix="fetch the data set again")


def _listing(paths: list[Path], labelled: bool) -> Listing:
    files = [_open(path) for path in paths]
    schema = files[0].schema_arrow
    count = sum(file.metadata.num_rows for file in files)
    if not count:
        raise AnncvtError("no rows here", where=str(paths[0]), fix="name a data set that holds pictures")
    image = _column(schema, _IMAGE_COLUMNS, "pictures", paths[0])

    def stream(rows: np.ndarray) -> Iterator[tuple[str, Picture]]:
        first = 0
        for file, path in zip(files, paths, strict=True):
            end = first + file.metadata.num_rows
            mine = rows[np.searchsorted(rows, first) : np.searchsorted(rows, end)] - first
            try:
                yield from _pictures(file, path, image, mine)
            except (OSError, ValueError) as error:
                raise _broken(path, error) from error
            first = end

    blocks = np.array([file.metadata.row_group(at).num_rows for file in files for at in range(file.num_row_groups)])
    if not labelled:
        return Listing(count, stream, blocks=blocks)
    label = _column(schema, _LABEL_COLUMNS, "class numbers", paths[0])
    try:
        parts = [file.read(columns=[label])[label].to_numpy() for file in files]
    except (OSError, ValueError) as error:
        raise _broken(paths[0], error) from error
    labels = np.concatenate(parts)
    if labels.dtype.kind not in "iu":  # texts; or numbers with gaps, which arrive as floats
        raise AnncvtError(
            f"column {label!r} holds no class numbers, or not in every row",
            where=str(paths[0]),
            fix="encode the classes as integers from 0",
        )
    return Listing(count, stream, labels.astype(np.int64), _class_names(schema, label), blocks=blocks)


def _column(schema: pyarrow.Schema, names: tuple[str, ...], what: str, path: Path) -> str:
    for name in names:
        if name in schema.names:
            return name
    raise AnncvtError(
        f"no column of {what}, the columns are {', '.join(schema.names)}",
        where=str(path),
        fix=f"name it {' or '.join(names)}",
    )


def _pictures(file: ParquetFile, path: Path, image: str, rows: np.ndarray) -> Iterator[tuple[str, Picture]]:
    """The encoded pictures at ascending ``rows`` of one file, one row group in memory at a time."""
    import pyarrow as pa

    nested = pa.types.is_struct(file.schema_arrow.field(image).type)
    first = 0
    for group in range(file.num_row_groups):
        end = first + file.metadata.row_group(group).num_rows
        wanted = rows[np.searchsorted(rows, first) : np.searchsorted(rows, end)]
        if len(wanted):
            column = file.read_row_group(group, columns=[f"{image}.bytes" if nested else image])[image].combine_chunks()
            encoded = column.field("bytes") if nested else column
            for row in wanted:
                where = f"{path}, row {row}"
                picture = encoded[int(row) - first].as_py()
                if picture is None:
                    raise AnncvtError(
                        "no picture in it, at most the path of one",
                        where=where,
                        fix="write the data set with the pictures embedded",
                    )
                yield where, picture
        first = end


def _class_names(schema: pyarrow.Schema, label: str) -> list[str] | None:
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names]
