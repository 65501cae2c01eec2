"""A program on disk: a folder of ``program.json``, ``teacher.safetensors`` and ``student.safetensors``, no pickles."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anncvt.errors import AnncvtError
from anncvt.files import umask, write_tensors, write_text
from anncvt.loading import build, to_float32, unwrapped
from anncvt.program import FORMAT, Plan, Preprocess, Program, Record, Source
from anncvt.state_dict import load_strict
from anncvt.swap import swap

if TYPE_CHECKING:
    from torch import nn

INTEGER = ("integer.json", "integer.safetensors")
#: What no longer fits when the integer network has changed.
FROM_INTEGERS = ("model.int8.onnx", "model.int8.so", "hardware")
#: And when the adder network has.
FROM_STUDENT = ("model.onnx", "model.so", *INTEGER, *FROM_INTEGERS, "bench.json", "report.html")
#: What a conversion or a command on its folder leaves there besides the program itself.
PRODUCTS = ("train", "libanncvt_ort.so", *FROM_STUDENT)
RECIPE, TEACHER, STUDENT = "program.json", "teacher.safetensors", "student.safetensors"


def is_folder(path: str | Path) -> bool:
    """Whether ``path`` is a program folder."""
    return (Path(path) / RECIPE).is_file()


def save(program: Program, path: str | Path) -> None:
    """Write ``program`` to the folder ``path``, over an older state of it if there is one.

    A new folder appears complete or not at all; in an existing one each file is replaced as a whole, the recipe last.
    Other files in it (training checkpoints, exports) stay.

    Raises:
        AnncvtError: ``path`` is something else, cannot be written, or the program holds what JSON cannot.
    """
    target = Path(path)
    recipe = _recipe(program)
    if target.exists() and not is_folder(target) and (not target.is_dir() or _foreign(target)):
        raise AnncvtError("exists and is not a program folder", where=str(target), fix="choose another place with -o")
    if target.is_dir():
        _write(program, recipe, target)
    else:
        temporary = _scratch_beside(target)
        try:
            _write(program, recipe, temporary)
            os.replace(temporary, target)
        except OSError as error:
            raise AnncvtError(f"cannot write: {error.strerror or error}", where=str(target), fix="choose -o") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    program.folder = str(target)


def open_folder(path: str | Path, model: nn.Module | None = None) -> Program:
    """Read a program: build the architecture, replay the plan on it, load the weights strictly.

    Args:
        model: the architecture, for a program that was made from a module in Python (its weights are ignored).

    Raises:
        AnncvtError: not a program folder, damaged, of a newer version, or its architecture cannot be built here.
    """
    folder = Path(path)
    data = _read_recipe(folder)
    try:
        source = Source(**data["source"])
        preprocess = Preprocess(**{k: tuple(v) for k, v in data["preprocess"].items()})
        history = [Record(**row) for row in data["history"]]
        classes, stored = data["classes"], data["plan"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(folder / RECIPE, repr(error)) from error
    from anncvt.copies import copied

    plan = None if stored is None else Plan.from_json(stored)
    if model is not None:
        teacher = copied(unwrapped(model))
        to_float32(teacher)
    else:
        teacher = build(source, near=folder.resolve().parent)
    student = None
    if plan is not None and (folder / STUDENT).exists():
        student = copied(teacher)
        swap(student, plan)
        _load(student, folder / STUDENT)
        student.eval()
    _load(teacher, folder / TEACHER)
    return Program(source, preprocess, teacher.eval(), student, plan, history, classes, str(folder))


def _recipe(program: Program) -> str:
    data = {
        "format": FORMAT,
        "source": dataclasses.asdict(program.source),
        "preprocess": dataclasses.asdict(program.preprocess),
        "classes": program.classes,
        "plan": None if program.plan is None else program.plan.to_json(),
        "history": [dataclasses.asdict(record) for record in program.history],
    }
    try:
        return json.dumps(data, indent=1) + "\n"
    except (TypeError, ValueError) as error:
        raise AnncvtError(
            f"the program cannot be written as JSON: {error}", fix="use numbers and text for --arch-args"
        ) from error


def _read_recipe(folder: Path) -> dict[str, Any]:
    file = folder / RECIPE
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AnncvtError(
            "not a program folder", where=str(folder), fix="make one with `anncvt convert MODEL -o FOLDER`"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, str(error)) from error
    if not isinstance(data, dict) or not isinstance(data.get("format"), int):
        raise _damaged(file, "no format number")
    if data["format"] > FORMAT:
        raise AnncvtError(
            f"written by a newer anncvt (format {data['format']}, this one reads up to {FORMAT})",
            where=str(folder),
            fix="upgrade anncvt",
        )
    return data


def _write(program: Program, recipe: str, folder: Path) -> None:
    write_tensors(folder / TEACHER, program.teacher.state_dict())
    if program.student is not None:
        write_tensors(folder / STUDENT, program.student.state_dict())
    write_text(folder / RECIPE, recipe)
    if program.student is None:
        (folder / STUDENT).unlink(missing_ok=True)


def _load(network: nn.Module, file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        load_strict(network, load_file(file))
    except FileNotFoundError as error:
        raise AnncvtError("missing from the program folder", where=str(file), fix="convert again") from error
    except (OSError, SafetensorError) as error:
        raise _damaged(file, str(error)) from error
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise AnncvtError(
            f"does not fit the architecture: {' '.join(lines[1:3])}",
            where=str(file),
            fix="use the version of the architecture's code that the program was made with, or convert again",
        ) from error


def _foreign(folder: Path) -> bool:
    """Whether a folder holds anything but what this package writes beside a program."""
    own = {*PRODUCTS, RECIPE, TEACHER, STUDENT}
    return any(entry.name not in own and not entry.name.startswith(".") for entry in folder.iterdir())


def _scratch_beside(target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
        scratch.chmod(0o777 & ~umask())
        return scratch
    except OSError as error:
        raise AnncvtError(
            f"cannot write: {error.strerror or error}", where=str(target), fix="choose a writable place with -o"
        ) from error


def _damaged(file: Path, detail: str) -> AnncvtError:
    return AnncvtError(f"damaged: {detail}", where=str(file), fix="convert again, or restore the file")
