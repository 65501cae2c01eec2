"""The network's data flow as FX graphs: which tensor each convolution reads and who reads its output.

Tracing is hierarchical and lean. Hierarchical: a submodule whose Python cannot be traced (control flow on values,
``*args`` games) becomes a leaf, and its children are traced on their own, so one awkward block does not cost the whole
network. Lean: only subtrees that own a convolution are inlined; everything else is a leaf, because tracing through it
gains nothing and may fail. Conversion replaces modules in place; the graphs serve to decide, and to fit layers one by
one.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_unflatten

from anncvt.copies import sharing
from anncvt.errors import first_line
from anncvt.nn import _AdderNd

#: What fx puts behind an argument that was given when it traced.
_ASSERTIONS = (torch._assert, fx._symbolic_trace._assert_is_none)
_Classes = tuple[type[nn.Module], ...]


@dataclass(frozen=True)
class TracedModule:
    """One module's own graph. Node targets are relative to :attr:`path`."""

    path: str  # qualified name, "" for the network itself
    graph: fx.Graph | None  # None: untraceable
    reason: str | None  # why not


@dataclass(frozen=True)
class Trace:
    """Every graph of a network, outermost first."""

    parts: tuple[TracedModule, ...]
    readers: dict[str, tuple[str, ...]] = field(default_factory=dict)  # convolution -> who reads its output

    @property
    def untraceable(self) -> tuple[TracedModule, ...]:
        return tuple(part for part in self.parts if part.graph is None)


def trace(network: nn.Module, *, training: bool = False, linear: bool = False) -> Trace:
    """Trace ``network``. Never fails; what cannot be traced is listed with its reason.

    The network is not touched: a copy that shares its tensors is traced, because Python code that stores what it sees
    would store proxies.

    Args:
        training: in training mode, where other branches may run, instead of eval mode.
        linear: inline subtrees that own a Linear layer, too.
    """
    outline = sharing(network).train(training)
    wanted = (_ConvNd, _AdderNd, nn.Linear) if linear else (_ConvNd, _AdderNd)
    with torch.no_grad():
        parts = tuple(_hierarchical(outline, "", wanted))
    if parts[0].graph is not None:
        forget_defaults(parts[0].graph)
    readers: dict[str, tuple[str, ...]] = {}
    modules = dict(outline.named_modules(remove_duplicate=False))
    for part in parts:
        if part.graph is not None:
            readers.update(_readers(part.path, part.graph, modules))
    return Trace(parts, readers)


def _readers(path: str, graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for node in graph.nodes:
        name = _join(path, str(node.target))
        if node.op == "call_module" and isinstance(modules.get(name), _ConvNd):
            users = tuple(_user(path, user) for user in _beyond_identity(node, path, modules))
            found[name] = found.get(name, ()) + users
    return found


def _beyond_identity(node: fx.Node, path: str, modules: dict[str, nn.Module]) -> list[fx.Node]:
    """The users of a node; where one is an ``nn.Identity``, its users."""
    users: list[fx.Node] = []
    for user in node.users:
        module = modules.get(_join(path, str(user.target))) if user.op == "call_module" else None
        users += _beyond_identity(user, path, modules) if type(module) is nn.Identity else [user]
    return users


def _user(path: str, node: fx.Node) -> str:
    if node.op == "call_module":
        return _join(path, str(node.target))
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{path}.{target}()"


def _hierarchical(module: nn.Module, path: str, wanted: _Classes) -> list[TracedModule]:
    graph, reason, leaves = _trace_one(module, wanted)
    parts = [TracedModule(path, graph, reason)]
    if graph is None:
        todo = [name for name, _ in module.named_children()]
    else:
        called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
        todo = sorted(leaves & called)
    for name in todo:
        for inner, child in _with_forward(name, module.get_submodule(name)):
            builtin = type(child).__module__.startswith("torch.nn.") and not isinstance(child, nn.Sequential)
            if not (isinstance(child, wanted) or builtin) and _relevant(child, wanted):
                parts += _hierarchical(child, _join(path, inner), wanted)
    return parts


def _trace_one(module: nn.Module, wanted: _Classes) -> tuple[fx.Graph | None, str | None, set[str]]:
    """Trace one module's forward; each child that fails is made a leaf and the trace is tried again."""
    leaves: set[str] = set()
    while True:
        tracer = _LeanTracer(leaves, wanted)
        try:
            graph = tracer.trace(module, concrete_args=defaults(module))
            hold_constants(graph, module)
            return graph, None, leaves
        except Exception as error:  # arbitrary Python code meets proxies
            if tracer.failed_at is None or tracer.failed_at in leaves:
                return None, f"{type(error).__name__}: {first_line(error)[:160]}", leaves
            leaves.add(tracer.failed_at)


class _LeanTracer(fx.Tracer):
    def __init__(self, leaves: set[str], wanted: _Classes) -> None:
        super().__init__(param_shapes_constant=True)
        self.leaves, self.wanted = leaves, wanted
        self.failed_at: str | None = None  # the innermost child whose forward raised

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            module_qualified_name in self.leaves
            or isinstance(m, (*self.wanted, _BatchNorm))
            or not _relevant(m, self.wanted)
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed_at is None:
                self.failed_at = self.path_of_module(m)
            raise


def _relevant(module: nn.Module, wanted: _Classes) -> bool:
    """Whether the subtree owns a wanted layer, or a parameter that a functional convolution could use."""
    return any(
        isinstance(m, wanted) or any(p.dim() >= 3 for p in m.parameters(recurse=False)) for m in module.modules()
    )


def defaults(module: nn.Module) -> dict[str, Any] | None:
    """Optional arguments of forward take their defaults, so that only real inputs are placeholders."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty} or None


def forget_defaults(graph: fx.Graph) -> None:
    """Take out what arguments that took their defaults leave behind: placeholders, assertions, flattened outputs."""
    for node in graph.find_nodes(op="placeholder"):
        readers = [*node.users, *(second for first in node.users for second in first.users)]
        asserted = all(reader.users or reader.target in _ASSERTIONS for reader in readers)
        if (node.args or str(node.target).startswith("*")) and asserted:
            for reader in reversed(readers):
                graph.erase_node(reader)
            graph.erase_node(node)
    flattened = getattr(graph._codegen, "pytree_info", None)
    if flattened is not None:
        output = graph.output_node()
        output.args = (tree_unflatten(cast("list[Any]", output.args[0]), flattened.out_spec),)
        graph.set_codegen(fx.graph.CodeGen())


class Constant:
    """A tensor that a forward pass makes anew every time (``torch.tensor(...)``), as it was when that was traced."""

    __name__ = "constant"  # with these, fx takes it for a function

    def __init__(self, value: Tensor) -> None:
        self.value = value.detach()

    def __call__(self) -> Tensor:
        return self.value.clone()


def hold_constants(graph: fx.Graph, traced: nn.Module) -> None:
    """Put tensors into ``graph`` that fx left as attributes in what it traced, where no other copy has them."""
    for node in graph.find_nodes(op="get_attr"):
        if str(node.target).startswith("_tensor_constant"):
            with graph.inserting_before(node):
                held = graph.call_function(Constant(getattr(traced, str(node.target))))
            node.replace_all_uses_with(held)
            graph.erase_node(node)


def _with_forward(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """ModuleList and ModuleDict have no forward of their own: their entries stand for them."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return [found for inner, child in module.named_children() for found in _with_forward(f"{name}.{inner}", child)]
    return [(name, module)]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
