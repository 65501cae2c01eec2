"""First stage of calibration: layer by layer and block by block, against the teacher's values at the same places."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from anncvt.passes.blocks import Block, find_blocks, shapes_of
from anncvt.passes.examples import POSITIONS
from anncvt.passes.fit_blocks import BlockFit, fit_block
from anncvt.passes.fit_kept import FittedKept, kept_layers
from anncvt.passes.fit_layers import LayerFit, fit_layers, layer_cost, step_cost
from anncvt.passes.mixing import BlockExamples
from anncvt.passes.pairing import Pair
from anncvt.passes.schedule import Shares
from anncvt.passes.walk import Mark, Walk
from anncvt.progress import SILENT, Progress

#: Of the memory, the share that goes to the walk, to a layer's windows, and (both copies) to a block's ends.
SHARE = 4
#: Images for a layer or block, at least (if there are so many).
IMAGES = 256


class LocalFit:
    """Fits what the graph reaches; ``layers``, ``kept``, ``blocks`` say what is done and may come from an earlier run.

    Args:
        teacher, student: in eval mode.
        order: indices of the images, shuffled; where memory is short, the first of them serve.
        batch: images of some indices, as the networks take them.
        memory: bytes for activations.
    """

    def __init__(
        self,
        graph: fx.Graph,
        teacher: nn.Module,
        student: nn.Module,
        paired: Sequence[Pair],
        order: Tensor,
        batch: Callable[[Tensor], Tensor],
        memory: int,
        layer: LayerFit,
        block: BlockFit,
    ) -> None:
        self.graph, self.teacher, self.student, self.layer, self.block = graph, teacher, student, layer, block
        #: Gradients come with the block, at whose rates it is soon forgotten what they did to a layer before.
        self.begun = replace(layer, steps=0) if layer.sweeps and block.steps else layer
        shapes = shapes_of(graph, teacher, batch(order[:1]))
        reached = {str(node.target) for node in graph.nodes if node.op == "call_module"}
        self.paired = [pair for pair in paired if pair.name in reached]
        self.blocks_found = find_blocks(graph, self.paired, shapes, block.layers)
        self.inside = {pair.name for found in self.blocks_found for pair in found.paired}
        self.kept_found = kept_layers(graph, student, {pair.name for pair in self.paired}) if layer.regress else {}
        computed = {str(node.target): math.prod(shape) for node, shape in shapes.items() if node.op == "call_module"}
        self.pixels = {pair.name: computed[pair.name] // pair.adder.out_channels for pair in self.paired}
        for name in self.kept_found:
            self.pixels[name] = computed[name] // len(student.get_parameter(f"{name}.weight"))
        self.order = order[: _images(self.blocks_found, shapes, len(order), memory)]
        chunk = max(2, min(256, memory // (16 * 4 * max(map(math.prod, shapes.values())))))
        self.parts = self.order.split(chunk)
        chunks = [functools.partial(batch, part) for part in self.parts]
        self.walk = Walk(graph, teacher, student, chunks, memory // SHARE)
        self.layers: dict[str, dict[str, Any]] = {}
        self.blocks: list[dict[str, Any]] = []
        self.kept: dict[str, dict[str, Any]] = {}

    def run(
        self,
        generator: torch.Generator,
        deadline: float | None,
        shares: tuple[float, float],
        on_done: Callable[[], None] = lambda: None,
        progress: Progress = SILENT,
    ) -> None:
        """Do what is not done yet.

        Args:
            generator: of the order of the images.
            deadline: on the monotonic clock, ``None``: the numbers of steps are those configured.
            shares: weights of all layers and of all blocks in the time there is.
            on_done: called after every layer and block.
        """
        clock = Shares(self._weights(*shares), deadline)
        blocks = self.blocks_found
        total = len(self.paired) + len(self.kept_found) + len(blocks)
        with progress.task("fit layers and blocks", total) as task:
            task.advance(len(self.layers) + len(self.kept) + len(self.blocks))
            for at, block in enumerate(blocks):
                if at < len(self.blocks):
                    continue
                count = max(self._chunks(pair.name) for pair in block.paired)
                for _ in self.walk.after(block.start, count):
                    pass
                mark = self.walk.mark()
                inside = {str(node.target) for node in block.nodes} & set(self.kept_found)
                self._layers(list(block.paired), inside, self.begun, clock, generator, on_done, task)
                self._block(f"block {at + 1}", block, mark, clock, generator, task)
                on_done()
            rest = [pair for pair in self.paired if pair.name not in self.inside]
            self._layers(rest, set(self.kept_found), self.layer, clock, generator, on_done, task)

    def _layers(
        self,
        paired: list[Pair],
        kept: set[str],
        how: LayerFit,
        clock: Shares,
        generator: torch.Generator,
        on_done: Any,
        task: Any,
    ) -> None:
        todo = [pair for pair in paired if pair.name not in self.layers]
        results = fit_layers(
            self.walk,
            self.graph,
            todo,
            self._chunks,
            [len(part) for part in self.parts],
            how,
            generator,
            clock.take,
            lambda name, r2: task.advance(0, layer=name, r2=r2),
            kept - set(self.kept),
        )
        for name, result in results:
            done = self.kept if isinstance(result, FittedKept) else self.layers
            done[name] = asdict(result)
            task.advance(1, layer=name, r2=result.r2)
            on_done()

    def _block(self, name: str, block: Block, mark: Mark, clock: Shares, generator: torch.Generator, task: Any) -> None:
        seconds = clock.take(name)
        begin = time.monotonic()
        if self.block.steps:
            count = max(self._chunks(pair.name) for pair in block.paired)
            targets = torch.cat([teacher[block.end] for teacher, _ in self.walk.after(block.end, count)])
            self.walk.rewind(mark)
            starts = [
                (teacher[block.start], student[block.start]) for teacher, student in self.walk.after(block.start, count)
            ]
            theirs, mine = (torch.cat(parts) for parts in zip(*starts, strict=True))
            del starts
            result = fit_block(
                block,
                self.teacher,
                self.student,
                self.graph,
                BlockExamples(theirs, mine, targets),
                self.block,
                max(self.pixels[pair.name] for pair in block.paired),
                generator,
                None if seconds is None else seconds - (time.monotonic() - begin),
                lambda r2: task.advance(0, layer=name, r2=r2),
            )
            self.blocks.append({"layers": [pair.name for pair in block.paired], **asdict(result)})
            task.advance(1, layer=name, r2=result.r2)
        else:
            self.blocks.append({"layers": [pair.name for pair in block.paired], "steps": 0})
            task.advance(1)

    def _chunks(self, name: str) -> int:
        """How many chunks a layer is fitted on: a few images of large maps say as much as many of small ones."""
        images = max(IMAGES, POSITIONS // self.pixels[name])
        return min(len(self.parts), math.ceil(images / len(self.parts[0])))

    def _weights(self, layers: float, blocks: float) -> dict[str, float]:
        """Of every layer and block that is to be done, by what it costs to do all of it."""
        of_layers = {
            pair.name: layer_cost(pair, self.begun if pair.name in self.inside else self.layer) for pair in self.paired
        }
        of_blocks = {}
        for at, block in enumerate(self.blocks_found):
            size = self.block.images(max(self.pixels[pair.name] for pair in block.paired))
            cost = sum(self.pixels[pair.name] * step_cost(pair) for pair in block.paired)
            of_blocks[f"block {at + 1}"] = size * cost
        weights = {name: layers * cost / sum(of_layers.values()) for name, cost in of_layers.items()}
        weights |= {name: blocks * cost / sum(of_blocks.values()) for name, cost in of_blocks.items()}
        done = {*self.layers, *(f"block {at + 1}" for at in range(len(self.blocks)))}
        return {name: weight for name, weight in weights.items() if name not in done}


def _images(blocks: list[Block], shapes: dict[fx.Node, tuple[int, ...]], images: int, memory: int) -> int:
    """How many images' block ends fit: the student's and the teacher's input, and the target, each twice at a time."""
    ends = [math.prod(shapes[block.start]) + math.prod(shapes[block.end]) for block in blocks]
    return max(2, min(images, memory // (2 * 2 * 4 * max(ends, default=1))))
