"""Operators without a kernel of ours: TVM's own translation of ATen, in torch's layout, one node at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, fx
from tvm import relax
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from anncvt.errors import AnncvtError
from anncvt.runtime.kernels.aten import Lowering, argument, overload_name
from anncvt.runtime.kernels.emitter import Emitter
from anncvt.runtime.kernels.fusion import Value


class Foreign:
    """Translates single nodes into the function that ``emitter`` is building."""

    def __init__(self, emitter: Emitter) -> None:
        self._emitter = emitter
        self._importer = ExportedProgramImporter()
        self._importer.block_builder = emitter.builder
        self._table = self._importer.create_convert_map()
        self._table |= {
            "_unsafe_view.default": self._table["view.default"],
            "amax.default": lambda node: self._extremum(relax.op.max, node),
            "amin.default": lambda node: self._extremum(relax.op.min, node),
        }

    def _extremum(self, reduce: Callable[..., Any], node: fx.Node) -> Any:
        """``amax`` and ``amin``, which TVM's translation lacks."""
        axes, keep = argument(node, 1, "dim", ()), argument(node, 2, "keepdim", False)
        return self._emitter.emit(reduce(self._importer.env[node.args[0]], axis=list(axes) or None, keepdims=keep))

    def missing(self, nodes: Iterable[fx.Node]) -> list[str]:
        """Names of operators among ``nodes`` that have no translation."""
        names = {overload_name(node.target) for node in nodes if node.op == "call_function"}
        return sorted(names - set(self._table))

    def translate(self, context: Lowering, node: fx.Node) -> Value | tuple[Value, ...]:
        """The result of ``node`` in torch's layout.

        Raises:
            AnncvtError: TVM does not know the operator, or not with these arguments.
        """
        name = overload_name(node.target)
        if name not in self._table:
            raise unknown([str(node.target)])
        inputs = {source: self._input(context, source) for source in node.all_input_nodes}
        self._importer.env = dict(inputs)
        try:
            result = self._table[name](node)
        except Exception as error:  # the translator raises whatever its assertions and the compiler's C++ raise
            raise AnncvtError(
                f"the operator {node.target} cannot be compiled with these arguments: {_first_line(error)}",
                where=str(node),
                fix="keep the network in torch or onnxruntime, or replace this operator in the model",
            ) from error
        meta = node.meta["val"]
        if isinstance(meta, tuple | list):
            whole = self._emitter.emit(result)
            if not isinstance(whole.ty, relax.TupleType):  # of a norm TVM gives the first result alone
                return (Value(whole, tuple(meta[0].shape), False),)
            return tuple(
                Value(self._emitter.emit(relax.TupleGetItem(whole, i)), tuple(part.shape), False)
                for i, part in enumerate(meta)
            )
        return Value(result, tuple(int(size) for size in meta.shape), False)

    def _input(self, context: Lowering, node: fx.Node) -> Any:
        constant = context.constant(node)
        if isinstance(constant, Tensor):
            return relax.const(constant.detach().numpy())
        return self._emitter.plain(context.value(node)).expr


def unknown(names: list[str]) -> AnncvtError:
    """The error for operators nobody can translate."""
    return AnncvtError(
        f"no compiled form of: {', '.join(names)}",
        where="compile",
        fix="run this network with torch or onnxruntime (`anncvt export`), or replace these operators in the model",
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
