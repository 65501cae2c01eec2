"""Which images a program is measured on, and how far its adder network is below its teacher."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from anncvt.data import Images, Stream, open_images, open_training_images, parse_spec
from anncvt.errors import AnncvtError, GateError
from anncvt.evaluation import evaluate
from anncvt.program import Preprocess, Program
from anncvt.progress import SILENT, Progress


@dataclass(frozen=True)
class DataChoice:
    """DATA as the user spells it (None: that of the conversion), and how much of it to read how."""

    spec: str | None = None
    data_dir: str | None = None
    limit: int | None = None
    workers: int = 0
    seed: int = 0

    def open(
        self,
        split: Literal["train", "test"],
        preprocess: Preprocess,
        *,
        at_most: int | None = None,
        labelled: bool = True,
        progress: Progress = SILENT,
    ) -> Images:
        """One split, no more images than ``limit``, or than ``at_most`` where there is no limit."""
        assert self.spec is not None
        return open_images(
            self.spec,
            split,
            preprocess,
            data_dir=self.data_dir,
            limit=at_most if self.limit is None else self.limit,
            seed=self.seed,
            workers=self.workers,
            labelled=labelled,
            progress=progress,
        )

    def open_training(self, preprocess: Preprocess, *, progress: Progress = SILENT) -> Images | Stream:
        """The labelled training split, decoded while it is used where it does not fit in memory."""
        assert self.spec is not None
        return open_training_images(
            self.spec,
            preprocess,
            data_dir=self.data_dir,
            limit=self.limit,
            seed=self.seed,
            workers=self.workers,
            progress=progress,
        )

    def located(self) -> DataChoice:
        """The same with absolute paths, so that it can be opened from another folder later."""
        assert self.spec is not None
        kind, argument = parse_spec(self.spec)
        local = Path(argument).expanduser()
        spec = self.spec
        if kind in ("folder", "wds") or (kind == "hf" and local.exists()):
            spec = f"{kind}:{os.path.abspath(local)}"
        data_dir = None if self.data_dir is None else os.path.abspath(Path(self.data_dir).expanduser())
        return dataclasses.replace(self, spec=spec, data_dir=data_dir)


def remember(program: Program, **choices: DataChoice | None) -> None:
    """Note in the history which data serve which purpose (``calibrate=``, ``distill=``)."""
    used = {purpose: choice.located() for purpose, choice in choices.items() if choice is not None}
    metrics = {purpose: {"spec": choice.spec, "data_dir": choice.data_dir} for purpose, choice in used.items()}
    program.record("data", 0.0, metrics)


def remembered(program: Program) -> DataChoice | None:
    """The data that the program was last distilled with, else calibrated with."""
    for record in reversed(program.history):
        if record.stage == "data":
            for purpose in ("distill", "calibrate"):
                if purpose in record.metrics:
                    return DataChoice(**record.metrics[purpose])
    return None


def chosen(program: Program, data: DataChoice | None, fallback: str | None = None) -> DataChoice:
    """``data``, else what the program remembers, else ``fallback``.

    Raises:
        AnncvtError: none of them says what to read.
    """
    data = data or DataChoice()
    if data.spec is not None:
        return data
    found = remembered(program) or (DataChoice(fallback) if fallback else None)
    if found is None:
        raise AnncvtError("no data to measure on", where=program.folder, fix="name a data set with --data DATA")
    return dataclasses.replace(data, spec=found.spec, data_dir=data.data_dir or found.data_dir)


def accuracy_on(
    program: Program,
    images: Images,
    *,
    student: dict[str, float] | None = None,
    teacher: dict[str, float] | None = None,
    batch_size: int = 256,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """``{"student": {"top1", "top5"}, "teacher": {...}, "images", "data"}`` in percent; no student, no such key.

    Args:
        student, teacher: their accuracy on the same images, where that was measured already.
    """
    measured: dict[str, Any] = {}
    if program.student is not None:
        measured["student"] = student or evaluate(
            program.student, images, program.preprocess, batch_size=batch_size, progress=progress
        )
    measured["teacher"] = teacher or evaluate(
        program.teacher, images, program.preprocess, batch_size=batch_size, progress=progress
    )
    return {**measured, "images": len(images), "data": images.name}


def accuracy(program: Program, stage: str | None = None) -> dict[str, Any] | None:
    """The last accuracy in the history (of ``stage``, if given), in the form of :func:`accuracy_on`, or None."""
    for record in reversed(program.history):
        if record.stage == "evaluated" and stage in (None, record.metrics["of"]):
            return {name: value for name, value in record.metrics.items() if name != "of"}
    return None


def gate(measured: dict[str, Any] | None, max_drop: float) -> None:
    """Hold the adder network to at most ``max_drop`` points of top-1 accuracy below its teacher.

    Raises:
        GateError: it is further below, or nothing was measured.
    """
    if measured is None or "student" not in measured:
        raise GateError(
            "the accuracy gate could not be checked: nothing was measured",
            fix="use labelled data with a test split, or leave out --max-drop",
        )
    drop = measured["teacher"]["top1"] - measured["student"]["top1"]
    if drop > max_drop:
        raise GateError(
            f"the adder network is {drop:.2f} points below its teacher, {max_drop:g} were allowed",
            fix="distil longer (`anncvt distill DIR --epochs N`), or keep more layers (--keep GLOB)",
        )


def require_parity(result: dict[str, Any]) -> None:
    """Fail if a check did.

    Raises:
        GateError: a backend differs from torch.
    """
    if not result["ok"]:
        different = [name for name, row in result["backends"].items() if not row["ok"]]
        raise GateError(
            f"{' and '.join(different)} differ from torch",
            fix="export and compile again if the folder was distilled since; if that does not help, report the network",
        )
