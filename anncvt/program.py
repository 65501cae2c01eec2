"""The data that flows through the tool: a network, its teacher, the plan between them, and what was done so far."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from anncvt.energy import HOROWITZ_45NM
from anncvt.errors import AnncvtError

if TYPE_CHECKING:
    from torch import nn

FORMAT = 1
#: Order of the stages; a later one needs the earlier ones.
STAGES = ("loaded", "planned", "rewritten", "calibrated", "distilled")


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the network's input: resize to ``input_size``, scale to [0, 1], ``(x - mean) / std``."""

    input_size: tuple[int, ...]  # channels, height, width; one spatial size more or less for 3-d and 1-d networks
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Source:
    """Where the CNN came from, enough to build the architecture again (no pickled code)."""

    model: str  # MODEL as the user named it
    arch: str | None = None  # "module:factory", "torchvision:NAME", "timm:NAME"; None: an nn.Module passed in Python
    arch_args: dict[str, Any] = field(default_factory=dict)
    arch_path: str | None = None  # folder in which "module" was found, when it is not importable as installed
    sha256: str | None = None  # of the checkpoint file

    @property
    def name(self) -> str:
        """``model`` without folders: what may be told to others."""
        return re.split(r"[/\\]", self.model)[-1]


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one convolution, or Linear layer (which has no kernel).

    ``macs`` is for one image. ``adds`` and ``muls`` count the planned layer: an adder tap is two additions, a
    convolution tap is one of each.
    """

    name: str  # qualified name, the key that pairs student and teacher
    kind: str  # Conv1d, Conv2d, ..., Linear
    action: str  # "swap" or "keep"
    reason: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    macs: int
    adds: int
    muls: int
    bn: str | None = None  # qualified name of the BatchNorm that reads it
    insert_bn: bool = False  # no BatchNorm follows: the adder gets one of its own
    copies: int = 1  # the adder compares every input with so many weights, at 1, 2, 4, ... times its size

    @property
    def taps(self) -> int:
        """Inputs that an output is computed from."""
        return self.in_shape[1] // self.groups * math.prod(self.kernel)

    @property
    def swapped(self) -> bool:
        return self.action == "swap"


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes a training step takes: ``fixed``, and ``per_image`` of the batch."""

    fixed: int
    per_image: int


@dataclass(frozen=True)
class Plan:
    """One :class:`LayerPlan` per layer, in execution order."""

    layers: tuple[LayerPlan, ...]
    other_macs: int = 0  # of Linear layers that are not in ``layers``
    memory: TrainingMemory | None = None

    @property
    def swapped(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.swapped)

    def totals(self) -> dict[str, Any]:
        """Counts over the whole network, for one image."""
        macs = sum(layer.macs for layer in self.layers) + self.other_macs
        swapped = sum(layer.macs for layer in self.swapped)
        adds, muls = (sum(getattr(layer, kind) for layer in self.layers) + self.other_macs for kind in ("adds", "muls"))
        return {
            "convolutions": sum(layer.kind != "Linear" for layer in self.layers),
            "linears": sum(layer.kind == "Linear" for layer in self.layers),
            "swapped": len(self.swapped),
            "swapped_linears": sum(layer.kind == "Linear" for layer in self.swapped),
            "macs": macs,
            "swapped_macs": swapped,
            "swapped_share": swapped / macs if macs else 0.0,
            "adds": adds,
            "muls": muls,
            "cnn_joules": HOROWITZ_45NM.joules(macs, macs),
            "joules": HOROWITZ_45NM.joules(adds, muls),
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "other_macs": self.other_macs,
            "memory": None if self.memory is None else dataclasses.asdict(self.memory),
            "totals": self.totals(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The inverse of :meth:`to_json`; fields of newer versions are ignored.

        Raises:
            AnncvtError: ``data`` is not a plan.
        """
        known = {f.name for f in dataclasses.fields(LayerPlan)}
        try:
            rows: list[dict[str, Any]] = [
                {k: tuple(v) if isinstance(v, list) else v for k, v in row.items() if k in known}
                for row in data["layers"]
            ]
            memory = data.get("memory")
            return cls(
                tuple(LayerPlan(**row) for row in rows),
                int(data.get("other_macs", 0)),
                None if memory is None else TrainingMemory(int(memory["fixed"]), int(memory["per_image"])),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise AnncvtError(f"not a plan: {error!r}", fix="write one with `anncvt plan MODEL --json`") from error


@dataclass(frozen=True)
class Record:
    """One stage that was run."""

    stage: str
    seconds: float
    metrics: dict[str, Any]
    seed: int | None
    versions: dict[str, str]


@dataclass
class Program:
    """A CNN on its way to an adder network. Passes take one and return one."""

    source: Source
    preprocess: Preprocess
    teacher: nn.Module  # the original CNN, in eval mode
    student: nn.Module | None = None  # from the rewrite on
    plan: Plan | None = None
    history: list[Record] = field(default_factory=list)
    classes: list[str] | None = None  # class names, where the data told them
    folder: str | None = None  # where it was loaded from or last saved to

    @property
    def stage(self) -> str:
        """The furthest stage reached."""
        reached = [record.stage for record in self.history if record.stage in STAGES]
        return max(reached, key=STAGES.index, default="loaded")

    def record(self, stage: str, seconds: float, metrics: dict[str, Any], seed: int | None = None) -> None:
        """Append to the history, with the versions that matter for reproducing it."""
        self.history.append(Record(stage, round(seconds, 3), metrics, seed, versions()))


def versions() -> dict[str, str]:
    """Versions of this package, Python and the packages that decide numerics."""
    import platform
    from importlib import metadata

    found = {"python": platform.python_version()}
    for name in ("anncvt", "torch", "apache-tvm", "onnx", "onnxruntime", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
