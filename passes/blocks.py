"""Where a network can be cut into blocks: between them, one tensor is all that flows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from anncvt.passes.pairing import Pair
from anncvt.passes.walk import Values, execute, last_readers, storage


@dataclass(frozen=True)
class Block:
    """What is computed from ``start`` (the images, for the first block) to ``end``, and the swapped layers in it."""

    start: fx.Node
    end: fx.Node
    nodes: tuple[fx.Node, ...]  # behind start, up to and with end
    paired: tuple[Pair, ...]

    def run(self, network: nn.Module, x: Tensor) -> Tensor:
        """``end`` from ``start``; ``x`` is left as it is."""
        values: Values = {self.start: x}
        spent = last_readers(self.nodes)
        for node in self.nodes:
            values[node] = execute(node, network, values, {storage(x)})
            for dead in spent.get(node, ()):
                if dead is not self.end:
                    values.pop(dead, None)
        return values[self.end]

    def parameters(self, network: nn.Module, graph: fx.Graph) -> list[nn.Parameter]:
        """Of the modules that are called in this block and nowhere else."""
        calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
        own = [str(node.target) for node in self.nodes if node.op == "call_module" and calls[str(node.target)] == 1]
        return list(dict.fromkeys(p for name in own for p in network.get_submodule(name).parameters()))


def find_blocks(
    graph: fx.Graph, paired: Sequence[Pair], shapes: Mapping[fx.Node, tuple[int, ...]], layers: int
) -> list[Block]:
    """Cut ``graph`` into blocks of ``layers`` swapped layers, or as many more as it takes to the next cut.

    The last one may have fewer. Swapped layers behind the last cut, or in a graph without any, are in no block.

    Args:
        shapes: of what every node computes (:func:`shapes_of`). What has no width any more (pooled features, logits)
            ends no block: what comes then is the classifier's business.
    """
    by_name = {pair.name: pair for pair in paired}
    cuts = _cuts(graph, shapes)
    blocks: list[Block] = []
    start: fx.Node | None = None
    end: fx.Node | None = None
    nodes: list[fx.Node] = []
    inside: list[Pair] = []

    def close() -> None:
        nonlocal start, end, nodes, inside
        assert start is not None and end is not None
        length = nodes.index(end) + 1
        blocks.append(Block(start, end, tuple(nodes[:length]), tuple(inside)))
        start, end, nodes, inside = end, None, nodes[length:], []

    for node in graph.nodes:
        if start is None:
            start = node if node.op == "placeholder" and node in cuts else None
            continue
        pair = by_name.pop(str(node.target), None) if node.op == "call_module" else None
        if pair is not None:
            if end is not None and len(inside) >= layers:
                close()
            inside.append(pair)
            end = None
        nodes.append(node)
        if inside and node in cuts:
            end = node
    if end is not None:
        close()
    return blocks


@torch.no_grad()
def shapes_of(graph: fx.Graph, network: nn.Module, image: Tensor) -> dict[fx.Node, tuple[int, ...]]:
    """Shape of what every node computes for ``image`` ``[1, C, H, W]``; ``()`` where that is no tensor."""
    values: Values = {}
    found: dict[fx.Node, tuple[int, ...]] = {}
    spent = last_readers(graph.nodes)
    for node in graph.nodes:
        if node.op == "output":
            break
        values[node] = image if node.op == "placeholder" else execute(node, network, values, {storage(image)})
        found[node] = tuple(values[node].shape) if isinstance(values[node], Tensor) else ()
        for dead in spent.get(node, ()):
            del values[dead]
    return found


def _cuts(graph: fx.Graph, shapes: Mapping[fx.Node, tuple[int, ...]]) -> set[fx.Node]:
    """The nodes after which nothing but their own output is read any more."""
    spent = last_readers(graph.nodes)
    live: set[fx.Node] = set()
    cuts: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "output":
            break
        live.add(node)
        live.difference_update(spent.get(node, ()))
        # Of the one image: what is first counts images, unless several branches are stacked there.
        if live == {node} and shapes[node][:1] == (1,) and any(size > 1 for size in shapes[node][2:]):
            cuts.add(node)
    return cuts
