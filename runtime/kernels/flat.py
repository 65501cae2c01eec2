"""Kernels with buffers addressed as one long row: the index arithmetic is the kernel's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from anncvt.runtime.kernels.layer import LANES


def function(
    shapes: Mapping[str, tuple[Any, ...] | None],
    body: Callable[..., None],
    dtypes: str | Mapping[str, str] = "float32",
) -> tirx.PrimFunc:
    """A PrimFunc of arguments ``shapes`` (the last is the output), of one dtype or of each its own.

    ``body(**buffers)`` emits its statements. A size may be a variable. What has no shape is a number, not a buffer.
    """
    kinds = dict.fromkeys(shapes, dtypes) if isinstance(dtypes, str) else dtypes
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("kernel")
            T.func_attr({"tirx.noalias": True, "op_pattern": 8})  # 8: opaque, the graph fusion leaves it alone
            arguments = {
                key: T.arg(key, tirx.Var(key, kinds[key]) if shape is None else T.buffer(shape, kinds[key]))
                for key, shape in shapes.items()
            }
            flat = {
                key: argument if shape is None else T.decl_buffer((math.prod(shape),), kinds[key], data=argument.data)
                for (key, argument), shape in zip(arguments.items(), shapes.values(), strict=True)
            }
            with T.sblock("root"):  # the graph passes expect one
                body(**flat)
        return builder.get().without_attr("global_symbol")  # a module names it


def workspace(count: int, dtype: str) -> Any:
    """A buffer on the heap, of this scope alone on a CPU.

    TVM puts small others on the stack, where LLVM makes registers of them, but lets them share memory with larger ones.
    """
    return T.alloc_buffer((count,), dtype, scope="local")


def f32(value: float) -> Any:
    """A float32 constant."""
    return tirx.const(value, "float32")


def zero(dtype: str) -> Any:
    """The constant 0."""
    return tirx.const(0, dtype)


def prefetch(buffer: Any, at: Any, *, write: bool = False) -> None:
    """Bring the cache line of ``buffer[at]`` closer, to be read or written, without waiting for it."""
    address = T.address_of(buffer[at])
    # 3: into all caches, data. Requests for the second level alone come too late more often.
    T.evaluate(tirx.call_intrin("void", "tirx.prefetch", address, int(write), 3, 1))


def store(target: Any, at: Any, value: Callable[[Any], Any] | Any, lanes: int = LANES) -> None:
    """``target[at + lane] = value(lane)`` (or a constant) for one vector of ``lanes``."""
    with T.vectorized(lanes) as lane:
        T.buffer_store(target, value(lane) if callable(value) else value, [at + lane])


def ramp(at: Any, count: int) -> Any:
    """``count`` indices from ``at``."""
    return tirx.Ramp(at, 1, count) if count > 1 else at


def splat(value: int, dtype: str, count: int) -> Any:
    """A vector of ``count`` times ``value``."""
    return spread(tirx.const(value, dtype), count)


def spread(value: Any, count: int) -> Any:
    """``value`` in every lane."""
    return tirx.Broadcast(value, count) if count > 1 else value
