"""What the CUDA generators share: arguments, thread indices, registers, and values as they lie in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from anncvt.runtime.kernels.cuda.variant import FLOATS, HALVES, Variant


def function(variant: Variant, lanes: dict[str, int], body: Callable[..., None]) -> tirx.PrimFunc:
    """The kernel ``body(block, thread, **arguments)`` emits: pointers are buffers ``[n, lanes]``, numbers variables.

    Args:
        lanes: how many values one entry of each pointer's buffer holds; loads and stores take a whole entry.
        body: emits the statements; ``block`` is (x, y, z), ``thread`` one index.
    """
    types = {"x": variant.dtype, "r": variant.dtype, "g": variant.dtype, "y": variant.out}
    if variant.kind == "integer":
        types["w"] = variant.dtype
    if variant.kind == "finish":
        types["r"] = variant.out
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(variant.name)
            T.func_attr({"tirx.noalias": True})
            arguments: dict[str, Any] = {}
            for name in variant.pointers:
                shape = (tirx.Var(f"{name}_entries", "int32"), lanes[name])
                arguments[name] = T.arg(name, T.buffer(shape, stored(types.get(name, "float32"))))
            for name in variant.numbers:
                arguments[name] = T.arg(name, T.float32() if name in FLOATS else T.int32())
            with contextlib.ExitStack() as launched:
                block = [
                    launched.enter_context(T.launch_thread(f"blockIdx.{axis}", arguments.pop(f"grid_{axis}")))
                    for axis in "xyz"
                ]
                thread = launched.enter_context(T.launch_thread("threadIdx.x", variant.tile.threads))
                body(block, thread, **arguments)
        return builder.get()


def stored(dtype: str) -> str:
    """How a type lies in memory: halves as their bits."""
    return "uint16" if dtype in HALVES else dtype


def loaded(value: Any, dtype: str) -> Any:
    """A stored value as what is computed with: halves become float32."""
    return tirx.call_pure_extern("float32", f"anncvt_from_{dtype}", value) if dtype in HALVES else value


def rounded(value: Any, dtype: str) -> Any:
    """The reverse of :func:`loaded`."""
    return tirx.call_pure_extern("uint16", f"anncvt_to_{dtype}", value) if dtype in HALVES else value


def slope(difference: Any, sharpness: Any) -> Any:
    """``saturate(sharpness*difference + 0.5)``."""
    return tirx.call_pure_extern("float32", "anncvt_slope", difference, sharpness)


def registers(count: int, dtype: str = "float32") -> Any:
    """A local array; indices must be constants once loops are unrolled."""
    return T.alloc_local((count,), dtype)


def cleared(count: int, dtype: str = "float32") -> Any:
    """Registers that hold zero."""
    array = registers(count, dtype)
    for i in range(count):
        T.buffer_store(array, tirx.const(0, dtype), [i])
    return array


def variable(value: Any) -> Any:
    """An integer in a register; read and written as ``name[0]``."""
    array = registers(1, "int32")
    T.buffer_store(array, value, [0])
    return array


def held(value: Any) -> Any:
    """An integer computed once, here. (A bound variable would be replaced by its definition wherever it is used.)"""
    return variable(value)[0]


def put(array: Any, value: Any) -> None:
    """Assign to a :func:`variable`."""
    T.buffer_store(array, value, [0])


def div(a: Any, b: Any) -> Any:
    """``a / b`` of integers that are not negative."""
    return tirx.truncdiv(a, b)


def mod(a: Any, b: Any) -> Any:
    """``a % b`` of integers that are not negative."""
    return tirx.truncmod(a, b)


def whole(at: Any, lanes: int) -> Any:
    """The index of ``lanes`` neighbours."""
    return T.ramp(at, 1, lanes) if lanes > 1 else at


def take(target: Any, at: int, source: Any, entry: Any, lanes: int, inside: Any, otherwise: Any = None) -> None:
    """``target[at:at+lanes] = source[entry]`` where ``inside``, else ``otherwise`` (zero)."""
    fill = tirx.const(0, source.dtype) if otherwise is None else otherwise
    outside = T.broadcast(fill, lanes) if lanes > 1 else fill
    value = T.if_then_else(inside, source[entry, whole(0, lanes)], outside)
    T.buffer_store(target, value, [whole(at, lanes)])


def give(target: Any, entry: Any, values: list[Any], dtype: str) -> None:
    """``target[entry] = values``."""
    lanes = len(values)
    if lanes == 1:
        T.buffer_store(target, rounded(values[0], dtype), [entry, 0])
        return
    packed = registers(lanes, stored(dtype))
    for i, value in enumerate(values):
        T.buffer_store(packed, rounded(value, dtype), [i])
    T.buffer_store(target, packed[whole(0, lanes)], [entry, whole(0, lanes)])


@contextlib.contextmanager
def when(condition: Any) -> Iterator[None]:
    """An ``if`` without an ``else``."""
    with T.If(condition), T.Then():
        yield
