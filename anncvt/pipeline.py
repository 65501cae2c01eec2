"""The whole conversion, stage by stage, with the folder written after each of them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anncvt import folder, launch
from anncvt.checkpoint import sha256
from anncvt.data import Images, native_size
from anncvt.errors import AnncvtError
from anncvt.evaluation import evaluate
from anncvt.fake_quant import fake_quantised
from anncvt.loading import load
from anncvt.measure import DataChoice, accuracy, accuracy_on, remember
from anncvt.passes.calibrate import MEMORY, calibrate
from anncvt.passes.calibration_state import discard_checkpoint
from anncvt.passes.choice import Choice
from anncvt.passes.pipeline import apply
from anncvt.passes.plan import plan
from anncvt.passes.rewrite import rewrite
from anncvt.program import Program
from anncvt.progress import SILENT, Progress
from anncvt.sources import NoSuchSplit
from anncvt.stream import Stream
from anncvt.zoo import ZOOS

if TYPE_CHECKING:
    import torch
    from torch import nn

    from anncvt.pkkd import DistillConfig
    from anncvt.runtime.integer_network import IntegerNetwork

#: Calibration images, unless a limit says otherwise: more change little.
CALIBRATION_IMAGES = 5000
#: Test images that accuracy is measured on between stages, unless a limit says otherwise.
EVALUATION_IMAGES = 10_000


def open_model(
    model: str | Path | nn.Module,
    *,
    data: DataChoice | None = None,
    input_size: int | tuple[int, ...] | None = None,
    progress: Progress = SILENT,
    **options: Any,
) -> Program:
    """A program folder, or anything that :func:`anncvt.loading.load` takes (with its ``options``).

    Args:
        data: images that the network will be used with. If they all have one size and nothing else says the input
            size, it is theirs.

    Raises:
        AnncvtError: MODEL cannot be loaded, or ``data`` not be read.
    """
    if isinstance(model, str | os.PathLike) and folder.is_folder(model):
        given = [name for name, value in {"input_size": input_size, **options}.items() if value]
        if given:
            raise AnncvtError(
                f"{', '.join(given)} cannot be changed in a program folder",
                where=str(model),
                fix="convert the CNN again with other options",
            )
        return folder.open_folder(model)
    program = load(model, input_size=input_size, progress=progress, **options)
    if data is not None and input_size is None:
        _take_native_size(program, data, progress)
    return program


def convert(
    model: str | Path | nn.Module,
    output: Path,
    *,
    calibration: DataChoice,
    training: DataChoice | None,
    config: DistillConfig,
    choice: Choice,
    budget: float | None = None,
    memory: int | None = None,
    resume: bool = False,
    force: bool = False,
    dump: Path | None = None,
    device: torch.device | None = None,
    options: Mapping[str, Any],
    progress: Progress = SILENT,
) -> Program:
    """Run every stage that ``output`` has not had yet; :func:`anncvt.api.convert` describes the arguments.

    Nothing is written before the model, the plan and the data have proved usable.
    """
    fresh = not (resume and folder.is_folder(output))
    if fresh:
        _check_free(output, resume, force)
        program = _anew(open_model(model, data=calibration, progress=progress, **options))
        program = apply(plan, program, choice, to=dump, progress=progress)
        program = apply(rewrite, program, to=dump)
    else:
        program = _continue(model, output, choice)
        progress.note(f"{output}: resuming after the stage '{program.stage}'")
    yardstick = Yardstick.find(program, training or calibration, required=training is not None, progress=progress)
    images = None
    # A student that starts from other weights has no use for a calibration.
    init = config.settled().init
    pointless = training is not None and init != "oneshot"
    if pointless and not reached(program, "distilled"):
        progress.note(f"no calibration: the adder network starts {init} (--init)")
    if not pointless and not reached(program, "calibrated"):
        images = calibration.open(
            "train", program.preprocess, at_most=CALIBRATION_IMAGES, labelled=False, progress=progress
        )
    if fresh:
        remember(program, calibrate=calibration, distill=training)
        _clear(output)
        folder.save(program, output)
    if images is not None:
        program = apply(
            calibrate,
            program,
            images,
            to=dump,
            budget=budget,
            seed=calibration.seed,
            memory=memory or MEMORY,
            folder=output,
            resume=resume,
            progress=progress,
        )
        yardstick.record(program, progress)
        folder.save(program, output)
        discard_checkpoint(output)
    if training is not None and not reached(program, "distilled"):
        program = distil(program, output, training, yardstick, config, resume=resume, device=device, progress=progress)
    return program


def distil(
    program: Program,
    output: Path,
    training: DataChoice,
    yardstick: Yardstick,
    config: DistillConfig,
    *,
    resume: bool,
    integers: IntegerNetwork | None = None,
    device: torch.device | None = None,
    progress: Progress,
) -> Program:
    """Distil, measure, save.

    Args:
        device: where to train, see :func:`anncvt.pkkd.distill`.
        integers: train for these: the student computes on their grids meanwhile.
    """
    from anncvt import pkkd

    train = training.open_training(program.preprocess, progress=progress)
    assert program.student is not None
    with contextlib.ExitStack() as stack:
        if isinstance(train, Stream):
            stack.callback(train.close)
        if integers is not None:
            stack.enter_context(fake_quantised(program.student, integers))
        program = pkkd.distill(
            program,
            train,
            yardstick.images,
            config,
            folder=output,
            teacher_top1=None if yardstick.teacher is None else yardstick.teacher["top1"],
            resume=resume,
            device=device,
            progress=progress,
        )
    if launch.rank() > 0:
        return program  # the first process measures and writes
    result = program.history[-1].metrics
    last: dict[str, float] = {name: result[name] for name in ("top1", "top5") if name in result}
    yardstick.record(program, progress, student=last if integers is None else None)
    folder.save(program, output)
    pkkd.discard_checkpoint(output)
    discard(output, folder.FROM_STUDENT, progress)
    return program


def discard(place: Path, names: Iterable[str], progress: Progress = SILENT) -> None:
    """Remove what was made of a network that has changed, where it is there, and say so."""
    for name in names:
        if (place / name).exists():
            _remove(place / name)
            progress.note(f"{name} was that of the network before and is removed")


@dataclass(frozen=True)
class Yardstick:
    """The test images of one conversion, and what the CNN reaches on them."""

    images: Images | None
    teacher: dict[str, float] | None

    @classmethod
    def find(cls, program: Program, choice: DataChoice, *, required: bool, progress: Progress = SILENT) -> Yardstick:
        """Open the test split and measure the CNN on it; the class names go into the program.

        Args:
            required: the labels are needed for training anyway, so that what is wrong with them is an error.

        Raises:
            AnncvtError: ``required``, and the labels are missing or do not fit the network.
        """
        if required:
            choice.open("train", program.preprocess, at_most=1)
        try:
            images = choice.open("test", program.preprocess, at_most=EVALUATION_IMAGES, progress=progress)
            known = accuracy(program)
            if known is not None and (known["data"], known["images"]) == (images.name, len(images)):
                teacher = known["teacher"]
            else:
                teacher = evaluate(program.teacher, images, program.preprocess, progress=progress)
        except AnncvtError as error:
            if required and not isinstance(error, NoSuchSplit):
                raise
            progress.note(f"no accuracy will be measured: {error}")
        else:
            if program.classes is None:
                program.classes = images.classes
            return cls(images, teacher)
        return cls(None, None)

    def record(self, program: Program, progress: Progress = SILENT, *, student: dict[str, float] | None = None) -> None:
        """Measure the adder network, unless ``student`` says it, and add to the history which stage reached what."""
        if self.images is None:
            return
        begin = time.monotonic()
        measured = accuracy_on(program, self.images, student=student, teacher=self.teacher, progress=progress)
        program.record("evaluated", time.monotonic() - begin, {"of": program.stage, **measured})


def reached(program: Program, stage: str) -> bool:
    """Whether ``stage`` is in the history."""
    return any(record.stage == stage for record in program.history)


def _continue(model: str | Path | nn.Module, output: Path, choice: Choice) -> Program:
    """The program in ``output``, which has to be that of this MODEL and these choices."""
    path = Path(model) if isinstance(model, str | os.PathLike) else None
    program = folder.open_folder(output, model=None if isinstance(model, str | os.PathLike) else model)
    fix = "choose another place with -o, or start anew there with --force"
    if path is not None and path.is_file() and program.source.sha256 not in (None, sha256(path)):
        raise AnncvtError(f"was made from another checkpoint than {model}", where=str(output), fix=fix)
    planned = next((record.metrics for record in program.history if record.stage == "planned"), {})
    wanted, default = choice.to_json(), Choice().to_json()
    for name, value in wanted.items():
        if value != default.get(name) and value != planned.get(name):
            option = {"file": "plan"}.get(name, name)
            raise AnncvtError(f"was planned with another --{option}", where=str(output), fix=fix)
    if program.student is None:
        raise AnncvtError("holds no adder network to go on with", where=str(output), fix=fix)
    return program


def _anew(program: Program) -> Program:
    """Only the CNN of a program that went further already."""
    history = [record for record in program.history if record.stage == "loaded"]
    return dataclasses.replace(program, student=None, plan=None, history=history, folder=None)


def _check_free(output: Path, resume: bool, force: bool) -> None:
    """Find out that ``output`` cannot be written before the work, not after it."""
    if folder.is_folder(output) and not force:
        raise AnncvtError("exists already", where=str(output), fix="go on with --resume, or start anew with --force")
    if output.exists() and not output.is_dir():
        raise AnncvtError("is a file", where=str(output), fix="choose another place with -o")
    if output.is_dir() and not folder.is_folder(output) and any(output.iterdir()):
        raise AnncvtError("exists and is not a program folder", where=str(output), fix="choose another place with -o")
    parent = next(place for place in [output, *output.absolute().parents] if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise AnncvtError("cannot be written", where=str(output), fix="choose a writable place with -o")


def _clear(output: Path) -> None:
    """Remove what was made from the program that is about to be replaced."""
    for name in folder.PRODUCTS:
        _remove(output / name)


def _remove(product: Path) -> None:
    """A file or a folder, if it is there."""
    if product.is_dir():
        shutil.rmtree(product)
    else:
        product.unlink(missing_ok=True)


def _take_native_size(program: Program, data: DataChoice, progress: Progress) -> None:
    """Where only a default says the input size, the images' own is the better guess."""
    if (program.source.arch or "").partition(":")[0] in (*ZOOS, "hf-hub"):
        return
    assert data.spec is not None
    native = native_size(data.spec, data.data_dir)
    channels, *pixels = program.preprocess.input_size
    if native is not None and len(pixels) == 2 and list(native[1:]) != pixels:
        size = (channels, *native[1:])
        program.preprocess = dataclasses.replace(program.preprocess, input_size=size)
        progress.note(f"input size {'x'.join(map(str, size))}, that of the images (--input-size)")
