"""What an interrupted calibration leaves in the program folder, and how the next one takes it up."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anncvt.errors import AnncvtError
from anncvt.files import write_state
from anncvt.passes.stages import StageState

CHECKPOINT = "train/calibration.pt"
#: Seconds between two checkpoints: what an interruption may cost, besides the layer that is being fitted.
INTERVAL = 10.0


class CalibrationState:
    """Everything that the next step depends on.

    Args:
        student: whose weights are kept.
        generator: whose state is kept.
        identity: the settings, as JSON knows them; another calibration's checkpoint is refused.
        folder: the program folder; ``None``: nothing is written.
    """

    def __init__(
        self, student: nn.Module, generator: torch.Generator, identity: dict[str, Any], folder: Path | None
    ) -> None:
        self.student, self.generator, self.folder = student, generator, folder
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.layers: dict[str, dict[str, Any]] = {}
        self.kept: dict[str, dict[str, Any]] = {}
        self.blocks: list[dict[str, Any]] = []
        self.joint, self.logits = StageState(), StageState()
        #: Of the student before these stages, its weights and its loss.
        self.fitted: dict[str, Any] | None = None
        self.seconds = 0.0  # spent before this run
        self.begin = self._kept = time.monotonic()

    def keep(self) -> None:
        """Write a checkpoint, atomically, if the last one is old enough."""
        if self.folder is None or time.monotonic() - self._kept < INTERVAL:
            return
        state = {
            "identity": self.identity,
            "seconds": time.monotonic() - self.begin,
            "student": self.student.state_dict(),
            "generator": self.generator.get_state(),
            "layers": self.layers,
            "kept": self.kept,
            "blocks": self.blocks,
            "joint": vars(self.joint),
            "logits": vars(self.logits),
            "fitted": self.fitted,
        }
        write_state(self.folder / CHECKPOINT, state)
        self._kept = time.monotonic()

    def restore(self) -> None:
        """Take up the folder's checkpoint; without one, start from the beginning.

        Raises:
            AnncvtError: the checkpoint cannot be read, or belongs to a calibration with other settings.
        """
        path = None if self.folder is None else self.folder / CHECKPOINT
        if path is None or not path.exists():
            return
        fix = f"delete {path} to start the calibration again"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            stored = state["identity"]
            changed = [name for name in self.identity if stored.get(name) != self.identity[name]]
            if not changed:
                self.student.load_state_dict(state["student"])
                self.generator.set_state(state["generator"])
                self.layers, self.kept, self.blocks = state["layers"], state["kept"], state["blocks"]
                self.joint, self.logits = StageState(**state["joint"]), StageState(**state["logits"])
                self.fitted, self.seconds = state["fitted"], state["seconds"]
        except Exception as error:  # a file that is no checkpoint fails in as many ways as there are formats
            raise AnncvtError(f"not a usable checkpoint: {error}", where=str(path), fix=fix) from error
        if changed:
            raise AnncvtError(
                f"the calibration was begun with other settings ({', '.join(changed)})",
                where=str(path),
                fix=f"resume with the same settings, or {fix}",
            )

    def summary(self, layers: int) -> str:
        """One line for the user of an interrupted run."""
        done = f"{len(self.layers)} of {layers} layers and {len(self.blocks)} blocks are fitted"
        for name, stage in (("joint", self.joint), ("logit", self.logits)):
            if stage.step:
                done += f", {stage.step} of {stage.steps} {name} steps are done"
        kept = self.folder is not None and (self.folder / CHECKPOINT).exists()
        return f"interrupted: {done}" + ("; all but the last seconds is kept" if kept else "")


def discard_checkpoint(folder: Path) -> None:
    """The calibrated program is saved: what a resumed run would start from is not needed any more."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
