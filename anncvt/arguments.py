"""The spellings that arguments of the API have in common: a program or its folder, DATA, where to write to."""

from __future__ import annotations

from pathlib import Path

from anncvt import pipeline
from anncvt.errors import AnncvtError
from anncvt.measure import DataChoice
from anncvt.program import Program
from anncvt.progress import Progress


def opened(program: Program | str | Path, progress: Progress) -> Program:
    """A program, opened if it is named by its folder (or by anything else that can be loaded).

    Raises:
        AnncvtError: nothing there, or nothing that can be loaded.
    """
    return program if isinstance(program, Program) else pipeline.open_model(program, progress=progress)


def choice_of(data: DataChoice | str | None) -> DataChoice | None:
    """DATA as a choice of images; None stays None, for that of the conversion."""
    return DataChoice(data) if isinstance(data, str) else data


def beside(program: Program, path: str | Path | None, name: str) -> Path:
    """``path``, or ``name`` in the program's folder.

    Raises:
        AnncvtError: no path was given, and the program has no folder.
    """
    if path is not None:
        return Path(path)
    if program.folder is None:
        raise AnncvtError(f"where should {name} go?", fix="name a path: the program was not saved to a folder yet")
    return Path(program.folder) / name
