"""Block-wise fitting: the layers of a block, the kept ones too, learn together to give the teacher's block output.

Layer by layer, nothing makes up for what a single adder cannot express. In a block, its neighbours do: the kept
convolutions and the norms learn to give the adders inputs they can work with. Targets are block outputs as in BRECQ
(Li et al., arXiv 2102.05426).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anncvt.passes.blocks import Block
from anncvt.passes.examples import HELD_OUT, shuffled
from anncvt.passes.mixing import BlockExamples, Mixer
from anncvt.passes.objectives import backward, unexplained
from anncvt.passes.pairing import Pair, channels_last
from anncvt.passes.schedule import cosine, set_rates, steps_within


@dataclass(frozen=True)
class BlockFit:
    """How a block is fitted; the rates are the best of those tried on ResNet-20 and on a block of MobileNetV2."""

    steps: int = 400
    most_steps: int = 1500  # however long the time is
    least_steps: int = 10  # however short the time is
    layers: int = 4  # swapped layers in a block, at least
    positions: int = 16384  # output pixels per step, of the layer with most; this many images where that is too few:
    least_images: int = 8
    most_images: int = 64
    weight_lr: float = 0.2  # of adder weights, relative to the standard deviation of their layer's input
    kept_lr: float = 0.02  # of the weights of kept layers, relative to their own standard deviation
    norm_lr: float = 0.02
    scarcity: float = 4.0  # over the targets per weight, that is the share of mixed examples
    most_mixed: float = 0.5
    least_mixed: float = 0.1  # less is none

    def images(self, pixels: int) -> int:
        """Per step, for a block whose widest layer has so many output pixels per image."""
        return max(self.least_images, min(self.most_images, self.positions // pixels))

    def mixed(self, targets: int, weights: int) -> float:
        """Share of a block's examples that are mixed ones: the more, the fewer targets there are for its weights."""
        share = min(self.most_mixed, self.scarcity * weights / targets)
        return share if share >= self.least_mixed else 0.0


@dataclass(frozen=True)
class FittedBlock:
    """What came of one block; R^2 of its output on images that it was not fitted on."""

    r2: float
    before_r2: float
    steps: int
    mixed: float  # share of the examples that were mixed ones


def fit_block(
    block: Block,
    teacher: nn.Module,
    student: nn.Module,
    graph: fx.Graph,
    examples: BlockExamples,
    how: BlockFit,
    pixels: int,
    generator: torch.Generator,
    seconds: float | None = None,
    on_step: Callable[[float], None] = lambda r2: None,
) -> FittedBlock:
    """Train every parameter of ``block`` by Adam to minimise the share of its targets that it misses.

    Args:
        teacher, student: in eval mode; come back in it.
        examples: the block's ends, of all images.
        pixels: outputs per image and channel of the block's widest swapped layer.
        generator: of the order of the images.
        seconds: time for it; the number of steps follows from it. ``None``: ``how.steps``.
        on_step: called with R^2 after every step.
    """
    inputs, targets = examples.student, examples.targets
    held = torch.arange(len(inputs)) % HELD_OUT == HELD_OUT - 1
    own, judge = (~held).nonzero().flatten(), held.nonzero().flatten()
    judge = judge if len(judge) else own
    size = max(2, min(len(own), how.images(pixels)))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    before_r2 = _score(block, student, inputs, targets, judge, size)
    optimizer = _optimizer(block, student, graph, channels_last(inputs[own[:size]]), how)
    peaks = [group["lr"] for group in optimizer.param_groups]
    batches = _Batches(block, teacher, examples, own, how, size, generator)
    norms = [pair.norm for pair in block.paired]

    def step(factor: float) -> None:
        set_rates(optimizer, peaks, factor)
        x, y = batches.next()
        error = unexplained(block.run(student, x), y)
        optimizer.zero_grad()
        backward(error)
        optimizer.step()
        on_step(1 - float(error.detach()))

    for norm in norms:
        norm.train()
    steps = how.steps
    if seconds is not None:
        steps = min(how.most_steps, steps_within(seconds, lambda: step(0.0), least=how.least_steps))
    for at in range(steps):
        step(cosine(at, steps))
    if steps:
        _settle(block, student, inputs, own, size)
    student.eval()
    r2 = _score(block, student, inputs, targets, judge, size)
    if not r2 >= before_r2 and steps:  # also where it is not a number
        student.load_state_dict(before)
        r2 = before_r2
    return FittedBlock(r2, before_r2, steps, batches.share)


class _Batches:
    """What the block should give, and for what.

    Where images are scarce, a share of the inputs is mixed, and as large a share of the targets is what the teacher's
    block makes of the student's input: how to make up for the errors of earlier blocks is what is learned by heart.
    """

    def __init__(
        self,
        block: Block,
        teacher: nn.Module,
        examples: BlockExamples,
        own: Tensor,
        how: BlockFit,
        size: int,
        generator: torch.Generator,
    ) -> None:
        self.block, self.teacher, self.examples, self.generator = block, teacher, examples, generator
        weights = sum(pair.adder.weight.numel() for pair in block.paired)
        exact = block.start.op == "placeholder"  # The student's input is the teacher's, and images there are enough.
        self.share = 0.0 if exact else how.mixed(len(own) * examples.targets[0].numel(), weights)
        self.count = round(self.share * size)
        self.mixer = Mixer(examples, own) if self.count else None
        self.stream = (own[part] for part in shuffled(len(own), size, generator))

    @torch.no_grad()
    def next(self) -> tuple[Tensor, Tensor]:
        batch = next(self.stream)
        x, y = channels_last(self.examples.student[batch]), self.examples.targets[batch]
        if self.mixer is None:
            return x, y
        theirs, mine = self.mixer.mixed(batch[: self.count], self.generator)
        x = channels_last(torch.cat([mine, x[self.count :]]))
        y = torch.cat([self.block.run(self.teacher, channels_last(theirs)), y[self.count :]])
        return x, torch.lerp(y, self.block.run(self.teacher, x), self.share)


def _optimizer(block: Block, student: nn.Module, graph: fx.Graph, x: Tensor, how: BlockFit) -> torch.optim.Adam:
    spread = input_spread(block.paired, lambda: block.run(student, x))
    adders = {pair.adder.weight: how.weight_lr * spread[pair.name] for pair in block.paired}
    others = [p for p in block.parameters(student, graph) if p not in adders and p.requires_grad]
    groups: list[dict[str, object]] = [{"params": [weight], "lr": rate} for weight, rate in adders.items()]
    for parameter in others:
        kept = how.kept_lr * float(parameter.detach().std()) if parameter.dim() > 1 else how.norm_lr
        groups.append({"params": [parameter], "lr": kept})
    return torch.optim.Adam(groups)


@torch.no_grad()
def input_spread(paired: tuple[Pair, ...] | list[Pair], run: Callable[[], object]) -> dict[str, float]:
    """Standard deviation of what arrives at each adder when ``run`` runs: the natural unit of its weights."""
    spread: dict[str, float] = {}

    def measure(pair: Pair) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            spread[pair.name] = float(inputs[0].std().clamp_min(1e-6))

        return hook

    handles = [pair.adder.register_forward_pre_hook(measure(pair)) for pair in paired]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return spread


@torch.no_grad()
def _settle(block: Block, student: nn.Module, inputs: Tensor, own: Tensor, size: int, images: int = 1024) -> None:
    """Cumulative statistics of the block's norms."""
    norms = [cast(_BatchNorm, pair.norm) for pair in block.paired]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    for batch in own[: max(size, images)].split(size):
        if len(batch) == size:
            block.run(student, channels_last(inputs[batch]))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def _score(block: Block, student: nn.Module, inputs: Tensor, targets: Tensor, judge: Tensor, size: int) -> float:
    missed = 0.0
    for batch in judge.split(size):
        missed += float((block.run(student, channels_last(inputs[batch])) - targets[batch]).square().sum())
    return 1 - missed / (targets[judge].numel() * max(float(targets[judge].var()), 1e-12))
