"""Run a teacher and its student through their common graph, node by node, over a whole set of images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

#: What a node computed, per chunk of images.
Values = dict[fx.Node, list[Any]]


class Walk:
    """Both networks advance together: when a node is reached, everything before it has been computed in both.

    The two have the same graph because a conversion replaces modules in place. Values are dropped after their last
    reader, so the memory is that of the widest point of the network.

    Args:
        graph: of the teacher.
        teacher, student: in eval mode.
        images: in chunks ``[n, C, H, W]``.
    """

    def __init__(self, graph: fx.Graph, teacher: nn.Module, student: nn.Module, images: list[Tensor]) -> None:
        self.graph, self.images = graph, images
        self.networks = (teacher, student)
        self.teacher: Values = {}
        self.student: Values = {}
        self._spent = _last_readers(graph)

    def __iter__(self) -> Iterator[fx.Node]:
        """Yield each node before it is computed; what the caller changes in the student's module takes effect."""
        for node in self.graph.nodes:
            if node.op == "output":
                return
            yield node
            for values, network in zip((self.teacher, self.student), self.networks, strict=True):
                values[node] = self._compute(node, values, network)
            for dead in self._spent.get(node, ()):
                del self.teacher[dead], self.student[dead]

    @torch.no_grad()
    def _compute(self, node: fx.Node, values: Values, network: nn.Module) -> list[Any]:
        if node.op == "placeholder":
            # An in-place operation on the input must not reach the caller's images.
            return [chunk.clone(memory_format=torch.preserve_format) for chunk in self.images]
        results = []
        for at in range(len(self.images)):
            results.append(execute(node, network, {source: values[source][at] for source in node.all_input_nodes}))
        return results


def reader(node: fx.Node) -> fx.Node | None:
    """The only node that reads ``node``, or None if there are several (or none)."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def execute(node: fx.Node, network: nn.Module, inputs: dict[fx.Node, Any]) -> Any:
    """What ``node`` computes in ``network`` from the values of the nodes it reads."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), inputs.__getitem__)
    if node.op == "call_module":
        return network.get_submodule(str(node.target))(*args, **kwargs)
    if callable(node.target):
        return node.target(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    owner, _, leaf = node.target.rpartition(".")
    return getattr(network.get_submodule(owner), leaf)


def _last_readers(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For every node, the values that nobody reads after it (its own, if nobody reads that at all)."""
    seen: set[fx.Node] = set()
    spent: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for source in (*node.all_input_nodes, node):
            if source not in seen:
                seen.add(source)
                spent.setdefault(node, []).append(source)
    return spent
