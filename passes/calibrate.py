"""One-shot conversion: from a pretrained CNN to an adder network that works, in minutes, from unlabelled images.

1. Layers, one after the other: weights by quantile map (:mod:`anncvt.passes.quantile_map`), then fitted to what the
   teacher computes there (:mod:`anncvt.passes.fit_layers`).
2. All together: end to end, to the teacher's logits (KL divergence) and to its outputs behind every converted layer.
3. The BatchNorm statistics are taken again.

All steps use the op's exact (sign) gradient: the smoothed one of AdderNet training measures worse here.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anncvt.errors import AnncvtError
from anncvt.images import augment, normalise
from anncvt.passes.fit_layers import LayerFit, fit_layers
from anncvt.passes.initialise import initialise
from anncvt.passes.objectives import divergence, unexplained
from anncvt.passes.pairing import Pair, gradients, outputs_of, pairs
from anncvt.passes.schedule import cosine, set_rates, steps_within
from anncvt.passes.trace import trace
from anncvt.program import Plan, Program
from anncvt.progress import SILENT, Progress

if TYPE_CHECKING:
    from anncvt.images import Images

#: Memory for the activations of one training step, and for those kept while layers are fitted.
MEMORY = 4 << 30


@dataclass(frozen=True)
class CalibrationConfig:
    """Hyper-parameters; the defaults are what measured best (benchmarks/RESULTS.md)."""

    layer: LayerFit = field(default_factory=LayerFit)
    layer_share: float = 0.6  # of a time budget
    joint_steps: int = 300
    batch_size: int = 64
    lr: float = 3e-4  # Adam, of everything but adder weights
    weight_lr: float = 0.001  # Adam, of adder weights, relative to the standard deviation of each layer's input
    temperature: float = 2.0
    feature_weight: float = 1.0
    augment: bool = True


def calibrate(
    program: Program,
    images: Images,
    *,
    budget: float | None = None,
    seed: int = 0,
    config: CalibrationConfig | None = None,
    progress: Progress = SILENT,
) -> Program:
    """Fit the rewritten student to its teacher on unlabelled ``images``.

    Args:
        program: rewritten; its student's weights are changed in place and the stage is recorded.
        images: calibration images; labels are not looked at.
        budget: seconds to spend. The numbers of steps are chosen from the measured time of a step, and recorded.
            ``None``: exactly the numbers in ``config``.
        seed: of the order of the images and their augmentation.
        config: hyper-parameters.

    Raises:
        AnncvtError: the program is not rewritten, there are no images, or the fit diverged.
    """
    begin = time.monotonic()
    paired = pairs(program)
    student, plan = program.student, program.plan
    assert student is not None and plan is not None
    if len(images) == 0:
        raise AnncvtError("no calibration images", fix="name a data set with images")
    config = config or CalibrationConfig()
    config = replace(config, batch_size=_batch_size(config.batch_size, plan, len(images)))
    run = _Calibration(program, student, paired, images, config, torch.Generator().manual_seed(seed), progress)
    deadline = None if budget is None else begin + budget
    try:
        with gradients(paired, "exact"):
            fitted = run.fit_layers(plan, deadline)
            steps = run.fit_jointly(deadline)
            run.refresh_statistics()
    finally:
        student.eval()
    metrics = {
        "data": images.name,
        "images": len(images),
        "budget": budget,
        "fitted_r2": {name: round(r2, 4) for name, r2 in fitted.items()},
        "final_r2": {name: round(r2, 4) for name, r2 in run.r2.items()},
        "joint_steps": steps,
        "config": asdict(config),
    }
    program.record("calibrated", time.monotonic() - begin, metrics, seed)
    return program


@dataclass
class _Calibration:
    """What the stages share."""

    program: Program
    student: nn.Module
    paired: list[Pair]
    images: Images
    config: CalibrationConfig
    generator: torch.Generator
    progress: Progress
    r2: dict[str, float] = field(default_factory=dict)  # of the last batch

    def fit_layers(self, plan: Plan, deadline: float | None) -> dict[str, float]:
        """Stage 1. Layers that no graph of the whole network reaches get the map and the line only."""
        seconds = None if deadline is None else self.config.layer_share * (deadline - time.monotonic())
        chunks = self._chunks(_kept_images(plan, len(self.images)))
        fitted: dict[str, float] = {}
        linear = any(layer.kind == "Linear" for layer in plan.swapped)
        graph = trace(self.program.teacher, linear=linear).parts[0].graph
        with self.progress.task("fit layers", len(self.paired)) as task:
            at = self.paired[0].name

            def show(name: str, error: float) -> None:
                nonlocal at
                task.advance(name != at, layer=name, r2=1 - error)
                at = name

            if graph is not None:
                fitted = fit_layers(
                    graph,
                    self.program.teacher.eval(),
                    self.student.eval(),
                    self.paired,
                    chunks,
                    self.config.layer,
                    self.generator,
                    seconds,
                    show,
                )
            rest = [pair for pair in self.paired if pair.name not in fitted]
            if rest:
                fitted |= initialise(
                    self.program.teacher, self.student, rest, chunks[0], lambda name, r2: show(name, 1 - r2)
                )
            task.advance(1)
        return fitted

    def fit_jointly(self, deadline: float | None) -> int:
        """Stage 2. Returns the number of steps."""
        config = self.config
        spread = self._input_spread()
        groups = [{"params": [p.adder.weight], "lr": config.weight_lr * spread[p.name]} for p in self.paired]
        weights = {pair.adder.weight for pair in self.paired}
        others = [parameter for parameter in self.student.parameters() if parameter not in weights]
        optimizer = torch.optim.Adam([*groups, {"params": others, "lr": config.lr}])
        peaks = [group["lr"] for group in optimizer.param_groups]
        batches = self._batches()
        self._train_mode()

        def step(factor: float) -> float:
            set_rates(optimizer, peaks, factor)
            loss = self._loss(self._batch(next(batches), config.augment))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        steps = config.joint_steps
        if deadline is not None:
            steps = steps_within(deadline - time.monotonic(), lambda: step(0.0))
        with self.progress.task("fit jointly", steps) as task:
            for at in range(steps):
                loss = step(cosine(at, steps))
                if not math.isfinite(loss):
                    raise AnncvtError(
                        f"calibration diverged: the loss is {loss} at step {at + 1} of {steps}",
                        fix="use images like those the network was trained on, and check --mean and --std",
                    )
                task.advance(1, loss=loss, r2=sum(self.r2.values()) / len(self.r2))
        return steps

    @torch.no_grad()
    def _input_spread(self) -> dict[str, float]:
        """Standard deviation of what arrives at each adder: the natural unit of its weights."""
        spread: dict[str, float] = {}

        def measure(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            spread[name] = float(inputs[0].std().clamp_min(1e-6))

        handles = [p.adder.register_forward_pre_hook(functools.partial(measure, p.name)) for p in self.paired]
        self.student.eval()(self._batch(next(self._batches()), augmented=False))
        for handle in handles:
            handle.remove()
        return spread

    def _loss(self, x: Tensor) -> Tensor:
        ends = [pair.conv_end for pair in self.paired] + [pair.adder_end for pair in self.paired]
        with outputs_of(ends) as outputs:
            with torch.no_grad():
                wanted = self.program.teacher(x)
            got = self.student(x)
        missed = {pair.name: unexplained(outputs[pair.adder_end][0], outputs[pair.conv_end][0]) for pair in self.paired}
        self.r2 = {name: 1 - float(share.detach()) for name, share in missed.items()}
        features = self.config.feature_weight * torch.stack(list(missed.values())).mean()
        return features + divergence(got, wanted, self.config.temperature)

    @torch.no_grad()
    def refresh_statistics(self, images: int = 2048) -> None:
        """Stage 3: cumulative statistics of the fitted norms."""
        norms = [pair.norm for pair in self.paired if isinstance(pair.norm, _BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        self._train_mode()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
        order = torch.randperm(len(self.images), generator=self.generator)[:images]
        for batch in order.split(self.config.batch_size):
            if len(batch) == self.config.batch_size:
                self.student(self._batch(batch, augmented=False))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

    def _train_mode(self) -> None:
        """Batch statistics in the fitted norms; everything else (dropout, the kept layers) as at inference."""
        self.student.eval()
        for pair in self.paired:
            pair.norm.train()

    def _batches(self) -> Iterator[Tensor]:
        while True:
            order = torch.randperm(len(self.images), generator=self.generator)
            yield from (part for part in order.split(self.config.batch_size) if len(part) == self.config.batch_size)

    def _batch(self, indices: Tensor, augmented: bool) -> Tensor:
        pixels = self.images.pixels[indices]
        if augmented:
            pad = max(1, pixels.shape[-1] // 8)
            pixels = augment(pixels, self.generator, pad=pad, flip=self.images.flip)
        return normalise(pixels, self.program.preprocess).contiguous(memory_format=torch.channels_last)

    def _chunks(self, count: int, size: int = 256) -> list[Tensor]:
        order = torch.randperm(len(self.images), generator=self.generator)[:count]
        return [self._batch(part, augmented=False) for part in order.split(size)]


def _batch_size(wanted: int, plan: Plan, images: int) -> int:
    """The largest batch up to ``wanted`` whose activations fit into :data:`MEMORY`."""
    # Per layer: the teacher's output, the student's and its norm's, what autograd keeps of them, and their gradients.
    per_image = 8 * 4 * sum(math.prod(layer.out_shape[-3:]) for layer in plan.layers)
    return max(2, min(wanted, images, MEMORY // max(1, per_image)))


def _kept_images(plan: Plan, images: int) -> int:
    """How many images' activations at the widest layer fit into :data:`MEMORY`."""
    # Input, target and shortcut of the layer, in both networks.
    widest = max(math.prod(layer.in_shape[-3:]) + math.prod(layer.out_shape[-3:]) for layer in plan.layers)
    return max(2, min(images, MEMORY // (6 * 4 * widest)))
