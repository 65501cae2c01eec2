"""Run a teacher and its student through their common graph, from one layer to the next, over a whole set of images."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils._pytree import tree_leaves

#: What is known of one chunk of images at some point of the graph, per node that is still to be read.
Values = dict[fx.Node, Any]
#: The teacher's values and the student's.
Known = tuple[Values, Values]
#: Per chunk, how many nodes are computed and what is known there (``None``: nothing yet).
Mark = list[tuple[int, Known | None]]

_IN_PLACE = {getattr(operator, name) for name in dir(operator) if name.startswith("i") and name[1:] in dir(operator)}


class Walk:
    """Both networks advance together, each chunk of images from the last stop where its values were remembered.

    The two have the same graph because a conversion replaces modules in place. What is remembered at a stop are the
    values that somebody reads later; where these take more than ``memory`` (wide layers of large images), nothing is
    remembered, and the next stretch starts at an earlier stop once more. A network that narrows now and then, as all
    do, is computed little more than once. Chunks that a stop does not need stay behind until they are.

    Args:
        graph: of the teacher.
        teacher, student: in eval mode. What is changed in the student before the next stop takes effect.
        chunks: each gives its images ``[n, C, H, W]``.
        memory: bytes that may be remembered.
    """

    def __init__(
        self,
        graph: fx.Graph,
        teacher: nn.Module,
        student: nn.Module,
        chunks: Sequence[Callable[[], Tensor]],
        memory: int,
    ) -> None:
        self.networks, self.chunks, self.memory = (teacher, student), chunks, memory
        self._nodes = [node for node in graph.nodes if node.op != "output"]
        self._spent = last_readers(graph.nodes)
        self._at: Mark = [(0, None)] * len(chunks)

    def before(self, node: fx.Node, chunks: int | None = None) -> Iterator[Known]:
        """Of the first ``chunks`` (of all), what is known just before ``node``: the values it and later ones read."""
        return self._reach(self._nodes.index(node), chunks)

    def after(self, node: fx.Node, chunks: int | None = None) -> Iterator[Known]:
        """Of the first ``chunks`` (of all), what is known just after ``node``."""
        return self._reach(self._nodes.index(node) + 1, chunks)

    def mark(self) -> Mark:
        """Where the walk is, to come back to with :meth:`rewind`."""
        return [*self._at]

    def rewind(self, mark: Mark) -> None:
        self._at = [*mark]

    def _reach(self, stop: int, chunks: int | None) -> Iterator[Known]:
        spare = True
        count = len(self.chunks) if chunks is None else chunks
        for at in range(count):
            known = self._advance(at, stop)
            if at == 0:
                spare = count * _bytes(known) <= self.memory
            if spare:
                self._at[at] = (stop, known)
            yield known

    @torch.no_grad()
    def _advance(self, at: int, stop: int) -> Known:
        begin, remembered = self._at[at]
        images = self.chunks[at]() if remembered is None else None
        reached = []
        for which, network in enumerate(self.networks):
            values: Values = {} if remembered is None else dict(remembered[which])
            shared = {storage(tensor) for tensor in tree_leaves(values) if isinstance(tensor, Tensor)}
            if images is not None:
                shared.add(storage(images))
            for node in self._nodes[begin:stop]:
                values[node] = images if node.op == "placeholder" else execute(node, network, values, shared)
                for dead in self._spent.get(node, ()):
                    del values[dead]
            reached.append(values)
        return reached[0], reached[1]


def reader(node: fx.Node) -> fx.Node | None:
    """The only node that reads ``node``, or None if there are several (or none)."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def execute(node: fx.Node, network: nn.Module, values: Values, shared: Container[int] = ()) -> Any:
    """Compute ``node``; tensors whose storage is ``shared`` with what is remembered are not changed in place."""
    module = network.get_submodule(str(node.target)) if node.op == "call_module" else None

    def value(source: fx.Node) -> Any:
        found = values[source]
        if isinstance(found, Tensor) and storage(found) in shared and may_change_inputs(node, module):
            return found.clone(memory_format=torch.preserve_format)
        return found

    args, kwargs = _own(fx.node.map_arg((node.args, node.kwargs), value))
    if module is not None:
        return module(*args, **kwargs)
    if callable(node.target):
        return node.target(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    owner, _, leaf = node.target.rpartition(".")
    return getattr(network.get_submodule(owner), leaf)


def _own(value: Any) -> Any:
    """``value`` with containers of its own: those of a graph refuse to be changed, which some modules do with lists."""
    if isinstance(value, immutable_dict):
        return {key: _own(part) for key, part in value.items()}
    if type(value) is tuple:
        return tuple(map(_own, value))
    return [*map(_own, value)] if isinstance(value, immutable_list) else value


def may_change_inputs(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an operator may work on its inputs in place; ``module``: the one that it calls."""
    if module is not None:
        known = type(module).__module__.startswith("torch.nn.") or not any(True for _ in module.children())
        return bool(getattr(module, "inplace", False)) or not known
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    flags = (*node.args[1:], *node.kwargs.values())
    return node.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or any(f is True for f in flags)


def storage(tensor: Tensor) -> int:
    """What tells whether two tensors share memory."""
    return tensor.untyped_storage().data_ptr()


def _bytes(both: Known) -> int:
    """Of the tensors in both, those they share counted once."""
    sizes = {
        storage(leaf): leaf.untyped_storage().nbytes()
        for values in both
        for leaf in tree_leaves(values)
        if isinstance(leaf, Tensor)
    }
    return sum(sizes.values())


def last_readers(nodes: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For every one of ``nodes``, the values that none of them reads after it (its own, if none reads that at all)."""
    seen: set[fx.Node] = set()
    spent: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed([*nodes]):
        for source in (*node.all_input_nodes, node):
            if source not in seen:
                seen.add(source)
                spent.setdefault(node, []).append(source)
    return spent
