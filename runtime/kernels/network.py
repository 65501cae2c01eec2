"""A whole network as one Relax module: an exported student graph, lowered to blocked kernels from stem to head."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import tvm
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from tvm import ir, relax

import anncvt.runtime.kernels.aten_layers
import anncvt.runtime.kernels.aten_spatial
import anncvt.runtime.op  # noqa: F401  (these three register operators)
from anncvt.errors import AnncvtError
from anncvt.runtime.inference import inference_copy
from anncvt.runtime.kernels.aten import HANDLERS, Unsuitable, overload_name, shape_of
from anncvt.runtime.kernels.deployment import Deployment
from anncvt.runtime.kernels.emitter import Emitter
from anncvt.runtime.kernels.foreign import Foreign, unknown
from anncvt.runtime.kernels.fusion import Combination, Pending, Value, View


def export(network: nn.Module, shape: Sequence[int]) -> torch.export.ExportedProgram:
    """``network`` in eval mode as a functional ATen graph for inputs of exactly ``shape`` (``[N, C, H, W]``).

    Raises:
        AnncvtError: torch.export cannot follow the network.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own use of treespecs
            return torch.export.export(inference_copy(network), (torch.zeros(*shape),)).run_decompositions({})
    except Exception as error:  # torch.export raises many kinds, from TypeError to its own
        raise AnncvtError(
            f"torch.export cannot follow the network: {str(error).strip().splitlines()[0]}",
            where=type(network).__name__,
            fix="compile needs a network whose control flow does not depend on the data",
        ) from error


def lower(
    programs: dict[str, torch.export.ExportedProgram], target: Deployment
) -> tuple[ir.IRModule, tuple[int, ...], bool]:
    """Lower exported networks to one module that shares kernels and constants.

    Args:
        programs: function name -> exported network (the same network at several batch sizes).
        target: what the module will be compiled for.

    Returns:
        The module, with functions ``name(image[N, C, H, W]) -> logits[N, ...]``; the logits' shape without the batch:
        ``(classes,)``, or ``(classes, H', W')`` of a segmentation network; and whether any layer is in fixed point.

    Raises:
        AnncvtError: an operator has no compiled form (all of them are named), or the network does not map one image
            batch to one float32 tensor of a row for each image.
    """
    builder = relax.BlockBuilder()
    emitter = Emitter(builder, target)
    shapes = [_Graph(emitter, program).emit(name) for name, program in programs.items()]
    return builder.get(), shapes[0], emitter.fixed


class _Graph:
    """One exported graph on its way into one Relax function."""

    def __init__(self, emitter: Emitter, program: torch.export.ExportedProgram) -> None:
        self.emitter, self._foreign = emitter, Foreign(emitter)
        self._nodes = list(program.graph.nodes)
        self._env: dict[fx.Node, Any] = {}
        self._inputs: list[fx.Node] = []
        self._bind_constants(program)
        self._fold_constants()
        names = [node for node in self._open_nodes() if overload_name(node.target) not in HANDLERS]
        missing = self._foreign.missing(names)
        if missing:
            raise unknown(missing)

    def emit(self, name: str) -> tuple[int, ...]:
        """Emit the function ``name``; returns the shape of its result without the batch."""
        (image,) = self._inputs
        shape = shape_of(image)
        variable = relax.Var("image", relax.TensorType(shape, "float32"))
        builder = self.emitter.builder
        with builder.function(name, [variable]):
            with builder.dataflow():
                self._env[image] = Value(variable, shape, False)
                for node in self._open_nodes():
                    self._env[node] = self._lower(node)
                logits = self.emitter.plain(self.value(self._result(shape[0])))
                output = builder.emit_output(self.emitter.emit(logits.expr))
            builder.emit_func_output(output)
        return logits.shape[1:]

    def _bind_constants(self, program: torch.export.ExportedProgram) -> None:
        placeholders = [node for node in self._nodes if node.op == "placeholder"]
        tensors = {**program.state_dict, **program.constants}
        for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
            if spec.kind == InputKind.USER_INPUT:
                self._inputs.append(node)
            elif node.users:
                self._env[node] = tensors[spec.target]

    def _fold_constants(self) -> None:
        """Evaluate what depends on parameters alone (a bias reshaped, standardised weights)."""
        for node in self._nodes:
            inputs = node.all_input_nodes
            if node.op == "call_function" and node.users and all(i in self._env for i in inputs):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._env.__getitem__)
                with torch.no_grad():
                    self._env[node] = node.target(*args, **kwargs)

    def _open_nodes(self) -> list[fx.Node]:
        return [n for n in self._nodes if n.op == "call_function" and n.users and not self._folded(n)]

    def _folded(self, node: fx.Node) -> bool:
        found = self._env.get(node)
        return all(isinstance(part, Tensor) for part in (found if isinstance(found, tuple) else (found,)))

    def _lower(self, node: fx.Node) -> Any:
        handler = HANDLERS.get(overload_name(node.target))
        if handler is not None:
            try:
                return handler(self, node)
            except Unsuitable:
                pass
        try:
            return self._foreign.translate(self, node)
        except Unsuitable as error:  # an input is no tensor that could be had, such as the places of maxima
            raise unknown([f"{overload_name(node.target)} of {node.args[0]}"]) from error

    def _result(self, batch: int) -> fx.Node:
        (results,) = self._nodes[-1].args
        results = list(results) if isinstance(results, tuple | list) else [results]
        nodes = [node for node in results if isinstance(node, fx.Node)]
        if len(results) != 1 or not nodes or not _float32(nodes[0]) or shape_of(nodes[0])[:1] != (batch,):
            raise AnncvtError(
                f"the network returns {[shape_of(node) for node in nodes] or 'nothing'}, not one tensor of logits",
                where="compile",
                fix="wrap it in a module that returns the logits, one row for each image",
            )
        return nodes[0]

    # What handlers see (aten.Lowering).

    def lazy(self, argument: Any) -> Any:
        """Whatever stands for ``argument`` so far."""
        return self._env[argument]

    def constant(self, argument: Any) -> Tensor | None:
        """The tensor ``argument`` is, if it does not depend on the input."""
        found = self._env.get(argument) if isinstance(argument, fx.Node) else None
        return found if isinstance(found, Tensor) else None

    def value(self, argument: Any) -> Value:
        """``argument``, computed."""
        found = self._env[argument]
        if isinstance(found, Pending):
            found = self.emitter.pending(found)
        elif isinstance(found, View):
            found = self.emitter.view(found)
        elif isinstance(found, Tensor):
            found = Value(self.emitter.constant(found.detach().numpy()), tuple(found.shape), False)
        if not isinstance(found, Value):
            raise Unsuitable("not a single tensor")
        self._env[argument] = found if not self._folded(argument) else self._env[argument]
        return found

    def blocked(self, argument: Any) -> Value:
        """``argument``, computed and in blocked layout."""
        value = self.value(argument)
        if len(value.shape) not in (2, 4) or not _float32(argument):
            raise Unsuitable("rank or dtype")
        return self.emitter.blocked(value)

    def pending(self, argument: Any) -> Pending:
        """``argument`` as something an epilogue may join: itself if it waits and has one user, else its value."""
        found = self._env[argument]
        if isinstance(found, Pending) and len(argument.users) == 1:
            return found
        value = self.blocked(argument)
        return Pending.of(Combination(value), value.shape)

    def view(self, argument: Any) -> View:
        """``argument`` as a window that may be cut further."""
        found = self._env[argument]
        if isinstance(found, View):
            return found
        if len(shape_of(argument)) != 4:
            raise Unsuitable("rank")
        return View.of(self.blocked(argument))


def _float32(node: fx.Node) -> bool:
    return node.meta["val"].dtype == torch.float32


def build_library(module: ir.IRModule, deployment: Deployment, path: Path, step: Callable[[], None]) -> None:
    """Compile ``module`` and link it to the shared library ``path``; ``step`` is called after each half.

    Raises:
        AnncvtError: there is no C compiler for the target, or it fails.
    """
    executable = tvm.compile(module, deployment.target)
    step()
    options = {"cc": deployment.compiler} if deployment.compiler else {}
    with tempfile.TemporaryDirectory() as workspace:
        # TVM chooses the format by the suffix, which the caller's temporary name does not have.
        library = Path(workspace) / "network.so"
        try:
            executable.export_library(str(library), workspace_dir=workspace, **options)
        except (RuntimeError, OSError, ValueError) as error:
            raise AnncvtError(
                f"linking failed: {str(error).strip().splitlines()[-1]}",
                where=deployment.compiler or "C compiler",
                fix="install a C compiler for the target (gcc or clang, g++ on PATH or in $CXX)",
            ) from error
        shutil.copyfile(library, path)
    step()
