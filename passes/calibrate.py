"""One-shot conversion: from a pretrained CNN to an adder network that works, in minutes, from unlabelled images.

1. Layers and blocks, one after the other (:mod:`anncvt.passes.fit_locally`): weights by quantile map, fitted to what
   the teacher computes there; then all layers of a block to what the teacher's block computes.
2. All together, end to end (:mod:`anncvt.passes.fit_jointly`).
3. Where there is time left, the logits are distilled (:mod:`anncvt.passes.fit_logits`).
4. The BatchNorm statistics are taken again. Where 2 and 3 did not pay on images held back, they are undone
   (:mod:`anncvt.passes.fit_whole`).

All steps use the op's exact (sign) gradient: the smoothed one of AdderNet training measures worse here.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anncvt.errors import AnncvtError
from anncvt.images import augment, normalise
from anncvt.passes.calibration_state import CalibrationState
from anncvt.passes.fit_blocks import BlockFit
from anncvt.passes.fit_jointly import JointFit, explained
from anncvt.passes.fit_layers import LayerFit
from anncvt.passes.fit_locally import LocalFit
from anncvt.passes.fit_logits import LogitFit
from anncvt.passes.fit_whole import WholeFit, divided
from anncvt.passes.initialise import initialise
from anncvt.passes.objectives import backward, output_loss
from anncvt.passes.pairing import Pair, channels_last, gradients, pairs
from anncvt.passes.trace import trace
from anncvt.program import Plan, Program
from anncvt.progress import SILENT, Progress

if TYPE_CHECKING:
    from anncvt.images import Images

#: Bytes for activations, unless the caller says otherwise.
MEMORY = 4 << 30
#: Of the time, what is left to take statistics again where there is no end-to-end training.
SETTLING = 0.03
#: A last block that explains less of its output is worth a word.
LITTLE = 0.5


@dataclass(frozen=True)
class CalibrationConfig:
    """Hyper-parameters of the stages. The shares of a budget are the best of three tried on one network."""

    layer: LayerFit = field(default_factory=LayerFit)
    block: BlockFit = field(default_factory=BlockFit)
    joint: JointFit = field(default_factory=JointFit)
    logits: LogitFit = field(default_factory=LogitFit)
    layer_share: float = 0.2  # of a time budget
    block_share: float = 0.6


def calibrate(
    program: Program,
    images: Images,
    *,
    budget: float | None = None,
    seed: int = 0,
    memory: int = MEMORY,
    config: CalibrationConfig | None = None,
    folder: Path | None = None,
    resume: bool = False,
    progress: Progress = SILENT,
) -> Program:
    """Fit the rewritten student to its teacher on unlabelled ``images``.

    Args:
        program: rewritten; its student's weights are changed in place and the stage is recorded.
        images: calibration images; labels are not looked at.
        budget: seconds to spend. The numbers of steps are chosen from the measured time of a step, and recorded.
            ``None``: exactly the numbers in ``config``.
        seed: of the order of the images, and of which are mirrored.
        memory: bytes for activations. With less, fewer of the images serve for blocks, and batches are smaller.
        config: hyper-parameters.
        folder: the program folder; what is fitted is kept there, so that nothing is lost if the run is interrupted.
        resume: go on from what the folder keeps.

    Raises:
        AnncvtError: the program is not rewritten, there are no images, the fit diverged, or what the folder keeps is
            of a calibration with other settings.
    """
    begin = time.monotonic()
    paired = pairs(program)
    student, teacher, plan = program.student, program.teacher.eval(), program.plan
    assert student is not None and plan is not None
    if len(images) == 0:
        raise AnncvtError("no calibration images", fix="name a data set with images")
    config = config or CalibrationConfig()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    own, judge = divided(order)
    size, large = (_batch_size(stage.batch_size, plan, len(own), memory) for stage in (config.joint, config.logits))
    config = replace(
        config, joint=replace(config.joint, batch_size=size), logits=replace(config.logits, batch_size=large)
    )
    identity = {"data": images.name, "images": len(images), "seed": seed, "memory": memory, "config": asdict(config)}
    state = CalibrationState(student, torch.Generator().manual_seed(seed), identity, folder)
    if resume:
        state.restore()
    begin -= state.seconds
    deadline = None if budget is None else begin + budget
    state.begin = begin
    draw = _Batches(program, images, own, state.generator)
    linear = any(layer.kind == "Linear" for layer in plan.swapped)
    graph = trace(teacher, linear=linear).parts[0].graph
    try:
        with gradients(paired, "exact"):
            teachable = _teachable(teacher, student.eval(), draw.plain(order[:2]))
            reached = set() if graph is None else {str(node.target) for node in graph.nodes if node.op == "call_module"}
            _map_unreached(program, paired, reached, draw.plain(order[:256]), state, progress)
            paired = _called(paired, reached | set(state.layers), progress)
            whole = WholeFit(
                teacher,
                student,
                paired,
                draw.plain,
                draw.next,
                own,
                judge,
                config.joint,
                config.logits,
                teachable,
            )
            if graph is not None:
                local = LocalFit(graph, teacher, student, paired, own, draw.plain, memory, config.layer, config.block)
                local.layers, local.kept, local.blocks = state.layers, state.kept, state.blocks
                shares = (config.layer_share, config.block_share)
                within = None
                if deadline is not None:
                    left = deadline - time.monotonic()
                    rest = 1 - sum(shares)
                    within = deadline - (rest if whole.worthwhile(rest * left) else SETTLING) * left
                local.run(state.generator, within, shares, state.keep, progress)
                del local
            kept = whole.run(state, deadline, progress)
            last = explained(teacher, student.eval(), paired, draw.plain(judge[:size]))
    except KeyboardInterrupt:
        progress.note(state.summary(len(paired)))
        raise
    finally:
        student.eval()
    if state.blocks and state.blocks[-1].get("r2", 1.0) < LITTLE:
        progress.note(
            f"the last block of layers explains {max(state.blocks[-1]['r2'], 0):.0%} of the CNN's values: more weights "
            "per input (--copies), more images (--limit) or more time (--budget) bring the network closer"
        )
    metrics = {
        "data": images.name,
        "images": len(images),
        "budget": budget,
        "layers": {name: _rounded(row) for name, row in state.layers.items()},
        "kept": {name: _rounded(row) for name, row in state.kept.items()},
        "blocks": [_rounded(row) for row in state.blocks],
        "final_r2": {name: round(r2, 4) for name, r2 in last.items()},
        "joint_steps": state.joint.steps or 0,
        "logit_steps": state.logits.steps or 0,
        "end_to_end_kept": kept,
        "memory": memory,
        "config": asdict(config),
    }
    program.record("calibrated", time.monotonic() - begin, metrics, seed)
    return program


def _map_unreached(
    program: Program, paired: list[Pair], reached: set[str], images: Tensor, state: CalibrationState, progress: Progress
) -> None:
    """Layers that no graph of the whole network reaches get the map and the line only, and get it first."""
    unreached = [pair.name for pair in paired if pair.name not in reached]
    if not unreached or state.layers:
        return
    assert program.student is not None
    with progress.task("map layers", len(paired)) as task:
        mapped = initialise(
            program.teacher, program.student, paired, images, lambda name, r2: task.advance(1, layer=name, r2=r2)
        )
    for name in unreached:
        if name in mapped:
            state.layers[name] = {"r2": mapped[name], "mapped_r2": mapped[name], "sweeps": 0, "steps": 0}


def _called(paired: list[Pair], names: set[str], progress: Progress) -> list[Pair]:
    """Those of ``names``, which is all but in networks whose forward takes a path that depends on the images."""
    called = [pair for pair in paired if pair.name in names]
    idle = [pair.name for pair in paired if pair.name not in names]
    if not called:
        raise AnncvtError(
            "the network sends these images through none of its adders", fix="use images like those it was trained on"
        )
    if idle:
        progress.note(f"not calibrated, because none of the images comes through: {', '.join(idle)}")
    return called


def _teachable(teacher: nn.Module, student: nn.Module, images: Tensor) -> bool:
    """Whether a gradient flows back from what they return: not from boxes, class numbers or overwritten values."""
    with torch.no_grad():
        wanted = teacher(images)
    loss = output_loss(student(images), wanted, 1.0)
    if not loss.requires_grad:
        return False
    try:
        backward(loss)
    except AnncvtError:
        return False
    finally:
        student.zero_grad()
    return True


class _Batches:
    """The images as the networks take them."""

    def __init__(self, program: Program, images: Images, own: Tensor, generator: torch.Generator) -> None:
        self.program, self.images, self.own, self.generator = program, images, own, generator

    def plain(self, indices: Tensor) -> Tensor:
        """Those at ``indices``."""
        return self._as_taken(self.images.pixels[indices])

    def next(self, count: int, mirrored: bool) -> Tensor:
        """``count`` of its own images at random: what comes next depends on the generator alone.

        Args:
            mirrored: half of them, where a mirrored picture is one of the same kind. Shifted ones, with black borders,
                give a network other statistics than it meets later.
        """
        chosen = torch.randperm(len(self.own), generator=self.generator)[:count]
        pixels = self.images.pixels[self.own[chosen]]
        if mirrored and self.images.flip and pixels.dim() == 4:
            pixels = augment(pixels, self.generator, pad=0)
        return self._as_taken(pixels)

    def _as_taken(self, pixels: Tensor) -> Tensor:
        return channels_last(normalise(pixels, self.program.preprocess))


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}


def _batch_size(wanted: int, plan: Plan, images: int, memory: int) -> int:
    """The largest batch up to ``wanted`` whose activations fit into ``memory``."""
    # Per layer: the teacher's output, the student's and its norm's, what autograd keeps of them, and their gradients.
    per_image = 8 * 4 * sum(math.prod(layer.out_shape[-3:]) for layer in plan.layers)
    return max(2, min(wanted, images, memory // max(1, per_image)))
