"""What a handler of an ATen operator works with: the registry, the graph being lowered, a node's arguments."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from torch import Tensor, fx

from anncvt.runtime.kernels.emitter import Emitter
from anncvt.runtime.kernels.fusion import Pending, Value, View


class Unsuitable(Exception):
    """This use of an operator has no kernel here (layout, rank, dtype): take the general way."""


class Lowering(Protocol):
    """What a handler sees of the graph being lowered."""

    emitter: Emitter

    def value(self, argument: Any) -> Value: ...

    def blocked(self, argument: Any) -> Value: ...

    def pending(self, argument: Any) -> Pending: ...

    def view(self, argument: Any) -> View: ...

    def lazy(self, argument: Any) -> Any: ...

    def constant(self, argument: Any) -> Tensor | None: ...


Handler = Callable[[Lowering, fx.Node], Any]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler for ATen overloads, ``"relu.default"``."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """A positional or keyword argument of ``node``."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def arguments(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.args)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape torch.export recorded for ``node``."""
    return tuple(int(size) for size in node.meta["val"].shape)


def pair(values: Any) -> tuple[int, int]:
    if isinstance(values, int):
        return (values, values)
    first, *rest = values
    return (int(first), int(rest[0] if rest else first))


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def overload_of(node: fx.Node) -> str:
    return overload_name(node.target)


def overload_name(target: Any) -> str:
    """``"relu.default"`` for ``torch.ops.aten.relu.default``."""
    return "getitem" if target is operator.getitem else getattr(target, "__name__", str(target))
