"""Hyper-parameters of distillation. No torch here: the command line reads the choices and the defaults."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from anncvt.errors import AnncvtError

#: What may be chosen where a text is expected.
CHOICES = {
    "feature_loss": ("kernel", "mse", "none"),
    "teacher": ("frozen", "progressive", "scratch"),
    "init": ("oneshot", "copy", "fresh"),
    "optimizer": ("sgd", "adamw"),
    "gradient": ("exact", "full"),
    "precision": ("fp32", "bf16", "fp16"),
    "select": ("last", "best"),
}
#: Peak learning rate, weight decay and eta, which mean different things to the two optimizers.
BY_OPTIMIZER = {
    "sgd": {"lr": 0.01, "weight_decay": 5e-4, "eta": 0.1},
    "adamw": {"lr": 0.001, "weight_decay": 0.01, "eta": 1.0},
}
#: Least and greatest value, both included unless :data:`OPEN_BOUNDS` says which is not.
BOUNDS: dict[str, tuple[float, float]] = {
    "epochs": (1, float("inf")),
    "batch_size": (2, float("inf")),
    "accumulate": (1, float("inf")),
    "lr": (0, float("inf")),
    "teacher_lr": (0, float("inf")),
    "weight_decay": (0, float("inf")),
    "momentum": (0, 1),
    "warmup": (0, 1),
    "eta": (0, float("inf")),
    "alpha": (0, float("inf")),
    "beta": (0, float("inf")),
    "temperature": (0, float("inf")),
    "label_smoothing": (0, 1),
    "mixup": (0, float("inf")),
    "cutmix": (0, float("inf")),
    "ema": (0, 1),
    "clip_grad": (0, float("inf")),
    "stop_within": (0, float("inf")),
    "patience": (1, float("inf")),
    "checkpoint_seconds": (0, float("inf")),
}
OPEN_BOUNDS = {
    "lr": "low",
    "eta": "low",
    "temperature": "low",
    "clip_grad": "low",
    "ema": "high",
    "label_smoothing": "high",
}
#: What a resumed run may change without becoming another run.
_NOT_THE_METHOD = ("checkpoint_seconds", "tensorboard")


@dataclass(frozen=True)
class DistillConfig:
    """Hyper-parameters; the defaults are what measured best (benchmarks/RESULTS.md). None: see :meth:`settled`."""

    epochs: int = 1
    batch_size: int = 128  # images of one optimizer step, over all processes and accumulated parts
    accumulate: int = 1  # parts that a process divides its images of a step into, to save memory
    seed: int = 0

    # The method
    feature_loss: str = "kernel"
    alpha: float = 1.0  # weight of the teacher's outputs
    beta: float = 1.0  # weight of the features
    temperature: float = 4.0
    teacher: str = "frozen"
    teacher_lr: float | None = None
    init: str | None = None
    gradient: str = "exact"  # "full" (AdderNet eq. 5-8) measures worse from a calibrated start

    # The optimizer
    optimizer: str = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float | None = None  # of everything but adder weights, norms and biases
    eta: float | None = None  # step of adder weights, see anncvt.distillation.optimizers
    warmup: float = 0.02  # share of the steps
    clip_grad: float | None = None  # norm of all gradients but those of adder weights, whose norm eta sets
    ema: float | None = None  # decay of the moving average that becomes the result
    precision: str = "fp32"

    # The images
    augment: bool = True
    transform: str | None = None  # "module:factory" of what else changes an image
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    # The run
    sync_bn: bool = False
    select: str = "last"
    stop_within: float | None = None  # points of top-1 below the original CNN
    patience: int | None = None  # epochs without a better top-1
    tensorboard: bool = False
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known and not (name == "init" and value is None):
                raise AnncvtError(f"unknown {name} {value!r}", fix=f"choose one of {', '.join(known)}")
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if value is None:
                continue
            excluded = {"low": low, "high": high}.get(OPEN_BOUNDS.get(name, ""))
            if not low <= value <= high or value == excluded:
                raise AnncvtError(f"{name}={value} cannot train", fix=f"use a {name} of {_bounds(name)}")

    def settled(self) -> DistillConfig:
        """The same with every None that stands for a default replaced by it.

        The optimizer's own rates; the student's rate for the teacher; a fresh student beside a teacher from scratch.
        """
        rates = BY_OPTIMIZER[self.optimizer]
        defaults: dict[str, Any] = {**rates, "init": "fresh" if self.teacher == "scratch" else "oneshot"}
        if self.teacher != "frozen":
            defaults["teacher_lr"] = rates["lr"] if self.lr is None else self.lr
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def identity(self) -> dict[str, Any]:
        """What two runs must have in common to end with the same weights."""
        return {name: value for name, value in asdict(self).items() if name not in _NOT_THE_METHOD}

    def to_toml(self) -> str:
        """As a file that ``-c`` takes: the long names of the options, without those that have no value."""
        values = {name.replace("_", "-"): value for name, value in asdict(self).items() if value is not None}
        return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def _bounds(name: str) -> str:
    low, high = (f"{bound:g}" for bound in BOUNDS[name])
    words = ["more than" if OPEN_BOUNDS.get(name) == "low" else "at least", low]
    if high != "inf":
        words += ["and", "less than" if OPEN_BOUNDS.get(name) == "high" else "at most", high]
    return " ".join(words)
