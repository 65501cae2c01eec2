"""Expressions the kernel generators share."""

from typing import Any

from tvm import tirx
from tvm.script import tirx as T


def span(start: Any, lanes: int, stride: int = 1) -> Any:
    """The index of ``lanes`` entries from ``start``."""
    return T.ramp(start, stride, lanes) if lanes > 1 else start


def splat(value: float, lanes: int) -> Any:
    """A float32 constant as a vector."""
    return T.broadcast(T.float32(value), lanes) if lanes > 1 else T.float32(value)


def padded(X: Any, n: Any, row: Any, column: Any, channel: Any, lanes: int, height: int, width: int) -> Any:
    """``lanes`` channels of a pixel, zero outside the image."""
    inside = tirx.all(row >= 0, row < height, column >= 0, column < width)
    return T.if_then_else(inside, X[n, row, column, span(channel, lanes)], splat(0.0, lanes))


def tree(lane: Any, start: int, count: int) -> Any:
    """The sum of ``count`` scalars of a local vector, pairwise."""
    if count == 1:
        return lane[start]
    half = count // 2
    return tree(lane, start, half) + tree(lane, start + half, count - half)


def choose(table: tuple[int, ...], index: Any) -> Any:
    """``table[index]`` for an index known at run time."""
    value: Any = T.int32(table[-1])
    for i, entry in reversed(list(enumerate(table[:-1]))):
        if entry != table[-1] or any(e != table[-1] for e in table[i:]):
            value = T.Select(index == i, T.int32(entry), value)
    return value
