"""The loop: all the state of one run, what a step does with it, and when it is kept."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anncvt.copies import copied
from anncvt.distillation import checkpoint
from anncvt.distillation.batches import Batch, Batches, mixed_seed
from anncvt.distillation.config import DistillConfig
from anncvt.distillation.diagnosis import first_not_finite
from anncvt.distillation.journal import Journal
from anncvt.distillation.networks import average, initialise, reset
from anncvt.distillation.objective import Objective
from anncvt.distillation.optimizers import Descent
from anncvt.distillation.processes import Processes, running_statistics, synchronised
from anncvt.errors import AnncvtError
from anncvt.evaluation import evaluate
from anncvt.passes.pairing import gradients, pairs
from anncvt.passes.schedule import cosine
from anncvt.program import Program
from anncvt.progress import Task

if TYPE_CHECKING:
    from anncvt.images import Images
    from anncvt.stream import Stream

#: Steps between two lines of the log.
LOG_EVERY = 50
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Training:
    """One run. Everything that its next step depends on is in a checkpoint, or a function of seed and step.

    Args:
        program: its student is trained in place.
        train: labelled images.
        config: settled.
        folder: the program folder.
        processes: those that share the work.
        device: where the program's student is.
        goal: top-1 in percent at which the run may end, after an epoch.
    """

    def __init__(
        self,
        program: Program,
        train: Images | Stream,
        config: DistillConfig,
        folder: Path,
        processes: Processes,
        device: torch.device,
        goal: float | None = None,
    ) -> None:
        self.program, self.config, self.folder, self.processes, self.goal = program, config, folder, processes, goal
        self.device = device
        self.batches = Batches(train, program.preprocess, config, processes)
        torch.manual_seed(config.seed)
        self.student = initialise(program, config.init or "")
        # The program keeps the original CNN: accuracy is always reported against that one.
        self.teacher = copied(program.teacher).to(device)
        self.teacher_learns = config.teacher != "frozen"
        if config.teacher == "scratch":
            reset(self.teacher)
        self.paired = pairs(program)
        teaching = [self.teacher.get_submodule(pair.name) for pair in self.paired]
        self.objective = Objective(self.paired, teaching, config, processes).to(device)
        assert config.lr is not None, "not settled"
        trained = [*self.student.parameters(), *self.objective.parameters()]
        self.descents = [Descent(trained, [pair.adder.weight for pair in self.paired], config.lr, config, device)]
        if config.teacher_lr is not None and self.teacher_learns:
            self.descents.append(Descent(self.teacher.parameters(), [], config.teacher_lr, config, device))
        self.average = None if config.ema is None else average(self.student, config.ema)
        self.student.train()
        self.teacher.train(self.teacher_learns)
        self.step = 0
        self.stopped = False  # before the last epoch
        self.accuracy: dict[str, Any] = {}
        self.best: dict[str, Any] = {}
        self.earlier_seconds = 0.0
        self.begin = time.monotonic()

    @property
    def steps(self) -> int:
        return self.config.epochs * self.batches.steps_per_epoch

    @property
    def seconds(self) -> float:
        """Time spent in this run and those it continues."""
        return self.earlier_seconds + time.monotonic() - self.begin

    @property
    def result(self) -> nn.Module:
        """The network that the run is about: the student, or its average."""
        return self.student if self.average is None else self.average.module

    def train(self, test: Images | None, task: Task, journal: Journal | None) -> None:
        """Run to the end; the program's student is the result then, in eval mode.

        Args:
            test: what top-1 is measured on after every epoch; None: nothing is. Only the first process looks.
            journal: of the first process.
        """
        saved = time.monotonic()
        measured_at, measured_step = time.monotonic(), self.step
        with gradients(self.paired, self.config.gradient), self._norms():
            while self.step < self.steps and not self.stopped:
                terms = self.advance()
                now = time.monotonic()
                speed = (self.step - measured_step) * self.batches.size / max(now - measured_at, 1e-9)
                task.advance(1, **terms, **self.accuracy, **{"img/s": speed})
                ends_epoch = self.step % self.batches.steps_per_epoch == 0
                if ends_epoch:
                    self._end_epoch(test)
                if journal is not None and (ends_epoch or self.step % LOG_EVERY == 0):
                    row = {"step": self.step, "epoch": self.step / self.batches.steps_per_epoch, **terms}
                    journal.write({**row, "img/s": speed, **(self.accuracy if ends_epoch else {})})
                if self.step < self.steps and time.monotonic() - saved > self.config.checkpoint_seconds:
                    self.save()
                    saved = time.monotonic()
        self.save()
        self._hand_over()

    def advance(self) -> dict[str, float]:
        """One step of both networks; returns the terms of the loss, over all processes."""
        # Dropout depends on seed and step, so that a checkpoint needs no random state.
        torch.manual_seed(mixed_seed(self.config.seed, self.step, self.processes.rank, 1))
        factor = cosine(self.step, self.steps, warmup=self.config.warmup)
        for descent in self.descents:
            descent.zero_grad()
        share = 1 / (self.processes.count * self.config.accumulate)
        sums: dict[str, Tensor] = {}
        for part in self.batches.parts(self.step):
            batch = part.to(self.device)
            terms, own = self.objective(
                self.student,
                self.teacher,
                batch,
                teacher_learns=self.teacher_learns,
                dtype=_DTYPES[self.config.precision],
            )
            loss = torch.stack(list(terms.values())).sum()
            if not math.isfinite(float(loss.detach())):
                raise self._not_finite(batch, float(loss.detach()), terms)
            losses = [loss] if own is None else [loss, own]
            for descent, each in zip(self.descents, losses, strict=True):
                descent.backward(share * each)
            shown = {"loss": loss, **terms} if own is None else {"loss": loss, **terms, "teacher_ce": own}
            for name, term in shown.items():
                sums[name] = sums.get(name, 0.0) + share * term.detach()
        self._sum_over_processes(sums)
        for descent in self.descents:
            descent.step(factor)
        if self.average is not None:
            self.average.update_parameters(self.student)
        self.step += 1
        return {name: float(value) for name, value in sums.items()}

    def _sum_over_processes(self, sums: dict[str, Tensor]) -> None:
        """Gradients and terms become those of the whole batch; statistics of BatchNorm the mean over the processes."""
        if self.processes.count == 1:
            return
        found = [parameter.grad for descent in self.descents for parameter in descent.parameters]
        statistics = [] if self.config.sync_bn else [value for n in self._learning for value in running_statistics(n)]
        for statistic in statistics:
            statistic.div_(self.processes.count)
        self.processes.sum_([grad for grad in found if grad is not None] + statistics + list(sums.values()))

    def _end_epoch(self, test: Images | None) -> None:
        if test is not None:
            self.accuracy = evaluate(self.result, test, self.program.preprocess)
        epoch = self.step // self.batches.steps_per_epoch
        if self.accuracy and self.accuracy["top1"] > self.best.get("top1", -1.0):
            self.best = {"epoch": epoch, **self.accuracy}
            checkpoint.write_best(self.folder, self.result.state_dict(), self.best)
        patience, goal = self.config.patience, self.goal
        weary = bool(self.best) and patience is not None and epoch - self.best["epoch"] >= patience
        arrived = goal is not None and self.accuracy.get("top1", -1.0) >= goal
        self.stopped = self.processes.share(weary or arrived)

    def _not_finite(self, batch: Batch, value: float, terms: dict[str, Tensor]) -> AnncvtError:
        self.objective.zero_grad()
        places = {"student": self.student, "teacher": self.teacher}
        found = ((name, first_not_finite(network, batch.x)) for name, network in places.items())
        cause = next((f"{what} of the {name}" for name, what in found if what), "the loss itself")
        shown = ", ".join(f"{name}={float(term.detach()):.3g}" for name, term in terms.items())
        return AnncvtError(
            f"the loss is {value} at step {self.step + 1} ({shown}); the first that is not finite: {cause}",
            where=str(self.folder),
            fix="lower --lr or set --clip-grad; the last good checkpoint is kept, continue from it with --resume",
        )

    @contextlib.contextmanager
    def _norms(self) -> Iterator[None]:
        """Synchronised BatchNorm of the networks that learn, where asked for."""
        with contextlib.ExitStack() as stack:
            for network in self._learning if self.config.sync_bn else ():
                stack.enter_context(synchronised(network, self.processes))
            yield

    @property
    def _learning(self) -> list[nn.Module]:
        return [self.student, self.teacher] if self.teacher_learns else [self.student]

    def save(self) -> None:
        """Write everything that the next step depends on."""
        if not self.processes.first:
            return
        broken = next((name for name, p in self.student.named_parameters() if not p.isfinite().all()), None)
        if broken is not None:
            raise AnncvtError(
                f"the weights {broken} are not finite after step {self.step}",
                where=str(self.folder),
                fix="lower --lr or set --clip-grad; the last good checkpoint is kept, continue from it with --resume",
            )
        checkpoint.write(self.folder, {**self._progress(), **{n: part.state_dict() for n, part in self._parts()}})

    def restore(self, path: Path, content: bytes) -> None:
        """Continue from the checkpoint in ``content``.

        Raises:
            AnncvtError: it cannot be read, or belongs to another configuration.
        """
        state = checkpoint.read(path, content, self._identity())
        for name, part in self._parts():
            part.load_state_dict(state[name])
        self.step, self.earlier_seconds, self.stopped = state["step"], state["seconds"], state["stopped"]
        self.best, self.accuracy = json.loads(state["best"]), json.loads(state["accuracy"])

    def _parts(self) -> list[tuple[str, Any]]:
        parts: list[tuple[str, Any]] = [
            ("student", self.student),
            ("teacher", self.teacher),
            ("objective", self.objective),
            *((f"descent {at}", descent) for at, descent in enumerate(self.descents)),
        ]
        return parts if self.average is None else [*parts, ("average", self.average)]

    def _progress(self) -> dict[str, Any]:
        return {
            "identity": json.dumps(self._identity()),
            "step": self.step,
            "seconds": self.seconds,
            "stopped": self.stopped,
            "best": json.dumps(self.best),
            "accuracy": json.dumps(self.accuracy),
        }

    def _identity(self) -> dict[str, Any]:
        images = self.batches.images
        return checkpoint.identity(self.config, images.name, len(images))

    def _hand_over(self) -> None:
        """The program's student becomes the result."""
        if self.average is not None:
            self.student.load_state_dict(self.average.module.state_dict())
        if self.config.select == "best" and self.best and self.processes.first:
            self.student.load_state_dict(checkpoint.read_best(self.folder))
            self.accuracy = {name: self.best[name] for name in ("top1", "top5")}
        self.student.eval()
