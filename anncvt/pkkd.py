"""PKKD: the adder network learns from labels, from its teacher's outputs and from its teacher's features.

Kernel based progressive knowledge distillation (arXiv 2009.13044). One step minimises for the student

    CE(student, labels) + alpha * KL(teacher || student) + beta * L_mid

with ``L_mid`` of :mod:`anncvt.distillation.features`; the teacher, where it goes on learning (``progressive``,
``scratch``), minimises its own cross-entropy only. Adder weights take AdderNet's adaptive step
(:mod:`anncvt.distillation.optimizers`).

The order of the images and their augmentation depend on the seed and the step alone, and a checkpoint holds everything
else, so a run that was killed and resumed ends with the same bits as one that was not (on the CPU: libraries for GPUs
add in any order).
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from anncvt.devices import on
from anncvt.distillation.checkpoint import BEST, CHECKPOINT, discard_checkpoint
from anncvt.distillation.config import DistillConfig
from anncvt.distillation.journal import LOG, Journal
from anncvt.distillation.processes import joined
from anncvt.distillation.training import Training
from anncvt.errors import AnncvtError
from anncvt.files import write_text
from anncvt.passes.pairing import gradients
from anncvt.program import Program
from anncvt.progress import SILENT, Progress
from anncvt.runtime.warmup import compile_kernels

if TYPE_CHECKING:
    from anncvt.images import Images
    from anncvt.stream import Stream

__all__ = ["BEST", "CHECKPOINT", "CONFIG", "LOG", "DistillConfig", "discard_checkpoint", "distill"]

#: The effective configuration, as a file for ``-c``.
CONFIG = "train/config.toml"


def distill(
    program: Program,
    train: Images | Stream,
    test: Images | None,
    config: DistillConfig,
    *,
    folder: Path,
    teacher_top1: float | None = None,
    resume: bool = False,
    device: torch.device | None = None,
    progress: Progress = SILENT,
) -> Program:
    """Train the student of a rewritten program; its weights are changed in place and the stage is recorded.

    Under torchrun the processes share each batch; the first of them writes and looks at ``test``.

    Args:
        program: rewritten, best calibrated.
        train: labelled images.
        test: labelled images on which top-1 is reported after every epoch; ``None`` to skip.
        config: hyper-parameters.
        folder: the program folder; checkpoints, the log and the settled configuration go to its ``train/``. The last
            checkpoint stays until :func:`discard_checkpoint`, so that nothing is lost before the program is saved.
        teacher_top1: of the CNN on ``test``, in percent, for ``config.stop_within``.
        resume: continue from the folder's checkpoint, if there is one.
        device: where to train, the CPU if not told; afterwards the student is on the CPU.

    Raises:
        AnncvtError: no labels, a checkpoint of another configuration, a loss that is not finite, or settings that the
            network or the data do not allow.
    """
    config, folder = config.settled(), Path(folder)
    needing = next((n for n in ("stop_within", "patience") if getattr(config, n) is not None), None)
    device = device or torch.device("cpu")
    with joined() as processes, on(device, program.student):
        if needing is not None and processes.first and (test is None or teacher_top1 is None):
            raise AnncvtError(
                f"{needing} needs labelled test images to measure on",
                where=train.name,
                fix=f"name data with a test split, or leave out --{needing.replace('_', '-')}",
            )
        goal = None if config.stop_within is None or teacher_top1 is None else teacher_top1 - config.stop_within
        run = Training(program, train, config, folder, processes, device, goal)
        path = folder / CHECKPOINT
        found = processes.share(path.read_bytes() if resume and processes.first and path.exists() else None)
        if found is not None:
            run.restore(path, found)
        with contextlib.ExitStack() as stack:
            journal = None
            if processes.first:
                if found is None:
                    (folder / BEST).unlink(missing_ok=True)
                journal = stack.enter_context(
                    contextlib.closing(Journal(folder, board=config.tensorboard, step=run.step))
                )
                write_text(folder / CONFIG, config.to_toml())
            with gradients(run.paired, config.gradient):
                compile_kernels(run.student, program.preprocess.input_size, progress)
            with progress.task("distil", run.steps) as task:
                task.advance(run.step)
                run.train(test, task, journal)
        metrics = {"data": train.name, "images": len(train), "config": asdict(config), "steps": run.step}
        if run.best:
            metrics["best"] = run.best
        program.record("distilled", run.seconds, {**metrics, **run.accuracy}, config.seed)
    return program
