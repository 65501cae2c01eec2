"""PKKD: the adder network learns from labels, from its teacher's outputs and from its teacher's features.

Kernel based progressive knowledge distillation (arXiv 2009.13044). One step minimises for the student

    alpha * KL(teacher || student) + CE(student, labels) + beta * L_mid

with ``L_mid`` of :mod:`anncvt.features`; the teacher, where it goes on learning (``progressive``), minimises its own
cross-entropy only. Adder weights take AdderNet's adaptive step (:mod:`anncvt.optim`).

The order of the images and their augmentation depend on the seed and the step alone, and a checkpoint holds everything
else, so a run that was killed and resumed ends with the same bits as one that was not (on the CPU: libraries for GPUs
add in any order).
"""

from __future__ import annotations

import copy
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anncvt.devices import on
from anncvt.errors import AnncvtError
from anncvt.evaluation import evaluate
from anncvt.features import FEATURE_LOSSES, FeatureLoss
from anncvt.files import atomic_path
from anncvt.images import augment, normalise
from anncvt.nn import channels_first
from anncvt.optim import adaptive_adder_step
from anncvt.passes.objectives import divergence
from anncvt.passes.pairing import gradients, outputs_of, pairs
from anncvt.passes.schedule import cosine, set_rates
from anncvt.program import Program
from anncvt.progress import SILENT, Progress, Task
from anncvt.runtime.warmup import compile_kernels

if TYPE_CHECKING:
    from anncvt.images import Images

TEACHERS = ("progressive", "frozen")
CHECKPOINT = "train/checkpoint.pt"
LOG = "train/log.jsonl"


@dataclass(frozen=True)
class DistillConfig:
    """Hyper-parameters; the defaults are what measured best (benchmarks/RESULTS.md)."""

    epochs: int = 1
    batch_size: int = 128
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4  # of everything but adder weights, norms and biases
    eta: float = 0.1  # adaptive adder step, AdderNet eq. 12-13 (0.2 there, from scratch)
    gradient: str = "exact"  # "full" (AdderNet eq. 5-8) measures worse from a calibrated start
    alpha: float = 1.0  # weight of the teacher's outputs
    beta: float = 1.0  # weight of the features
    temperature: float = 4.0
    feature_loss: str = "kernel"
    teacher: str = "frozen"
    teacher_lr: float = 0.01
    augment: bool = True
    seed: int = 0
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name, known in (("feature_loss", FEATURE_LOSSES), ("teacher", TEACHERS)):
            if getattr(self, name) not in known:
                raise AnncvtError(f"unknown {name} {getattr(self, name)!r}", fix=f"choose one of {', '.join(known)}")
        if self.epochs < 1 or self.batch_size < 2:
            raise AnncvtError(
                f"epochs={self.epochs} and batch_size={self.batch_size} cannot train",
                fix="use at least 1 epoch and 2 images a batch",
            )


def distill(
    program: Program,
    train: Images,
    test: Images | None,
    config: DistillConfig,
    *,
    folder: Path,
    resume: bool = False,
    device: torch.device | None = None,
    progress: Progress = SILENT,
) -> Program:
    """Train the student of a rewritten program; its weights are changed in place and the stage is recorded.

    Args:
        program: rewritten, best calibrated.
        train: labelled images.
        test: labelled images on which top-1 is reported after every epoch; ``None`` to skip.
        config: hyper-parameters.
        folder: the program folder; checkpoints and the log go to its ``train/``. The last checkpoint stays until
            :func:`discard_checkpoint`, so that nothing is lost before the program is saved.
        resume: continue from the folder's checkpoint, if there is one.
        device: where to train, the CPU if not told; afterwards the student is on the CPU.

    Raises:
        AnncvtError: no labels, a checkpoint of another configuration, or a loss that is not finite.
    """
    if train.labels is None:
        raise AnncvtError("the images have no labels", where=train.name, fix="distillation needs a labelled data set")
    if len(train) < 2:
        raise AnncvtError(f"{len(train)} training images", where=train.name, fix="raise --limit, or name more data")
    device = device or torch.device("cpu")
    with on(device, program.student):
        run = _Training(program, train, config, Path(folder), device)
        if resume:
            run.restore()
        with gradients(run.paired, config.gradient):
            compile_kernels(run.student, program.preprocess.input_size, progress)
        with progress.task("distil", config.epochs * run.steps_per_epoch) as task:
            task.advance(run.step)
            accuracy = run.train(test, task)
        run.save()
    metrics = {"data": train.name, "images": len(train), "config": asdict(config), **accuracy}
    program.record("distilled", run.seconds, metrics, config.seed)
    return program


def discard_checkpoint(folder: Path) -> None:
    """The distilled program is saved: what a resumed run would start from is not needed any more."""
    (folder / CHECKPOINT).unlink(missing_ok=True)


class _Training:
    """The state of one run, all of it in a checkpoint."""

    def __init__(
        self, program: Program, train: Images, config: DistillConfig, folder: Path, device: torch.device
    ) -> None:
        assert program.student is not None
        self.program, self.images, self.config, self.folder, self.device = program, train, config, folder, device
        self.paired = pairs(program)
        self.student = program.student
        # The program keeps the original CNN: accuracy is always reported against that one.
        self.teacher = copy.deepcopy(program.teacher).to(device)
        self.teaching_pairs = [self.teacher.get_submodule(pair.name) for pair in self.paired]
        self.batch_size = min(config.batch_size, len(train))
        self.steps_per_epoch = len(train) // self.batch_size
        self.step = 0
        self.earlier_seconds = 0.0
        self.begin = time.monotonic()
        torch.manual_seed(config.seed)
        channels = [pair.adder.out_channels for pair in self.paired]
        self.features = None if config.feature_loss == "none" else FeatureLoss(channels, config.feature_loss)
        if self.features is not None:
            self.features.to(device)
        self.adder_weights = [pair.adder.weight for pair in self.paired]
        self.optimizer = self._student_optimizer()
        self.teacher_optimizer = (
            torch.optim.SGD(
                self.teacher.parameters(), config.teacher_lr, config.momentum, weight_decay=config.weight_decay
            )
            if config.teacher == "progressive"
            else None
        )
        self.optimizers = [o for o in (self.optimizer, self.teacher_optimizer) if o is not None]
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    def _student_optimizer(self) -> torch.optim.Optimizer:
        adders = set(self.adder_weights)
        rest = [w for w in self.student.parameters() if w not in adders]
        decayed = [w for w in rest if w.dim() > 1]
        free = [w for w in rest if w.dim() <= 1]
        if self.features is not None:
            free += list(self.features.parameters())
        # Decay pulls a convolution towards doing nothing; an adder's neutral point is not zero: no decay there.
        return torch.optim.SGD(
            [
                {"params": self.adder_weights, "weight_decay": 0.0},
                {"params": decayed, "weight_decay": self.config.weight_decay},
                {"params": free, "weight_decay": 0.0},
            ],
            lr=self.config.lr,
            momentum=self.config.momentum,
        )

    def train(self, test: Images | None, task: Task) -> dict[str, Any]:
        """Run to the end of the last epoch; returns the last accuracy."""
        total = self.config.epochs * self.steps_per_epoch
        saved = time.monotonic()
        accuracy: dict[str, Any] = {}
        with gradients(self.paired, self.config.gradient):
            while self.step < total:
                self._train_mode()
                terms = self._step(cosine(self.step, total, warmup=0.02))
                self.step += 1
                task.advance(1, **terms, **accuracy)
                if self.step % self.steps_per_epoch == 0 and test is not None:
                    accuracy = {**evaluate(self.student, test, self.program.preprocess)}
                if self.step % self.steps_per_epoch == 0 or self.step % 50 == 0:
                    self._log({"step": self.step, "epoch": self.step / self.steps_per_epoch, **terms, **accuracy})
                if self.step < total and time.monotonic() - saved > self.config.checkpoint_seconds:
                    self.save()
                    saved = time.monotonic()
        self.student.eval()
        return accuracy

    def _step(self, factor: float) -> dict[str, float]:
        """One optimizer step of both networks; returns the terms of the loss."""
        config = self.config
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            set_rates(optimizer, peaks, factor)
        x, labels = self._batch()
        compared = [] if self.features is None else [pair.adder for pair in self.paired] + self.teaching_pairs
        # Only around these two passes: an evaluation inside would keep the outputs of all test images.
        with outputs_of(compared) as outputs:
            with torch.set_grad_enabled(self.teacher_optimizer is not None):
                wanted = self.teacher(x)
            got = self.student(x)
        terms = {
            "ce": F.cross_entropy(got, labels),
            "kd": config.alpha * divergence(got, wanted.detach(), config.temperature),
        }
        if self.features is not None:
            adders = [channels_first(pair.adder, outputs[pair.adder][0]) for pair in self.paired]
            convolutions = [
                channels_first(pair.adder, outputs[module][0])
                for pair, module in zip(self.paired, self.teaching_pairs, strict=True)
            ]
            terms["mid"] = config.beta * self.features(adders, convolutions)
        loss = torch.stack(list(terms.values())).sum()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise AnncvtError(
                f"the loss is {value} at step {self.step + 1}",
                where=", ".join(f"{name}={float(term.detach()):.3g}" for name, term in terms.items()),
                fix="lower --lr; the last good checkpoint is kept, continue from it with --resume",
            )
        self.optimizer.zero_grad()
        loss.backward()
        adaptive_adder_step(self.adder_weights, config.eta)
        self.optimizer.step()
        if self.teacher_optimizer is not None:
            own = F.cross_entropy(wanted, labels)
            self.teacher_optimizer.zero_grad()
            own.backward()
            self.teacher_optimizer.step()
            terms["teacher_ce"] = own
        return {"loss": value, **{name: float(term.detach()) for name, term in terms.items()}}

    def _batch(self) -> tuple[Tensor, Tensor]:
        """The images of this step: a function of seed and step alone."""
        epoch, at = divmod(self.step, self.steps_per_epoch)
        order = torch.randperm(len(self.images), generator=_generator(self.config.seed, epoch))
        chosen = order[at * self.batch_size : (at + 1) * self.batch_size]
        pixels = self.images.pixels[chosen]
        if self.config.augment:
            pad = max(1, pixels.shape[-1] // 8)
            pixels = augment(pixels, _generator(self.config.seed, epoch, at + 1), pad=pad, flip=self.images.flip)
        assert self.images.labels is not None
        x = normalise(pixels, self.program.preprocess).contiguous(memory_format=torch.channels_last)
        return x.to(self.device), self.images.labels[chosen].to(self.device)

    def _train_mode(self) -> None:
        self.student.train()
        self.teacher.train(self.teacher_optimizer is not None)

    @property
    def seconds(self) -> float:
        """Time spent in this run and those it continues."""
        return self.earlier_seconds + time.monotonic() - self.begin

    def save(self) -> None:
        """Write everything that the next step depends on, atomically."""
        state = {
            "config": json.dumps(self._identity()),
            "step": self.step,
            "seconds": self.seconds,
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "features": {} if self.features is None else self.features.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": torch.get_rng_state(),  # dropout
        }
        with atomic_path(self.folder / CHECKPOINT) as path:
            torch.save(state, path)

    def restore(self) -> None:
        """Continue from the folder's checkpoint; without one, start from the beginning.

        Raises:
            AnncvtError: the checkpoint cannot be read, or belongs to another configuration.
        """
        path = self.folder / CHECKPOINT
        if not path.exists():
            return
        fix = f"delete {path} to start the distillation again"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            stored = json.loads(state["config"])
        except Exception as error:  # a file that is no checkpoint fails in as many ways as there are formats
            raise AnncvtError(f"not a usable checkpoint: {error}", where=str(path), fix=fix) from error
        own = self._identity()
        changed = [f"{name}: {stored.get(name)} then, {own[name]} now" for name in own if stored.get(name) != own[name]]
        if changed:
            raise AnncvtError(
                f"the checkpoint was made with other settings ({'; '.join(changed)})",
                where=str(path),
                fix=f"resume with the same settings, or {fix}",
            )
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        if self.features is not None:
            self.features.load_state_dict(state["features"])
        for optimizer, stored_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored_state)
        torch.set_rng_state(state["rng"])
        self.step, self.earlier_seconds = state["step"], state["seconds"]

    def _identity(self) -> dict[str, Any]:
        """What has to be equal for a checkpoint to fit."""
        settings = {name: value for name, value in asdict(self.config).items() if name != "checkpoint_seconds"}
        return {**settings, "data": self.images.name, "images": len(self.images)}

    def _log(self, row: dict[str, Any]) -> None:
        path = self.folder / LOG
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}) + "\n")


def _generator(*numbers: int) -> torch.Generator:
    """A generator seeded by all ``numbers``, well mixed (seed 0, step 1 and seed 1, step 0 are unrelated)."""
    words = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> 1))
