"""An adder network as a list of pieces, each of which becomes one step of an integer network.

A piece is an accumulator (adder, convolution, pooling sum, or the input itself) and the BatchNorm, the residual and
the activation behind it, fused: what hardware does between reading one feature map and writing the next.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from anncvt.copies import sharing
from anncvt.errors import AnncvtError
from anncvt.modes import eval_mode
from anncvt.nn import _AdderNd
from anncvt.passes.trace import defaults, forget_defaults, hold_constants
from anncvt.passes.walk import execute
from anncvt.runtime.integer import Window
from anncvt.runtime.integer_network import INPUT

#: What assertions consist of.
_QUESTIONS = {torch._assert, getattr, operator.getitem}
_QUESTIONS |= {operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge}


@dataclass
class Piece:
    """``clip(scale * accumulate(inputs) + shift + residual, low, high)``, per output channel.

    ``node`` computes the whole of it in the float network, ``line`` what precedes residual and activation.
    """

    name: str
    op: str  # see anncvt.runtime.integer.OPS
    inputs: tuple[str, ...]
    shape: tuple[int, int, int]
    node: fx.Node
    line: fx.Node
    window: Window = field(default_factory=Window)
    kernel: tuple[int, int] = (1, 1)
    weight: Tensor | None = None  # [O, C/groups, kh, kw] float64
    scale: Tensor | None = None  # [O] float64; None: keeps the grid of its input
    shift: Tensor | None = None  # [O] float64
    residual: str | None = None
    low: float = -math.inf
    high: float = math.inf
    channels: tuple[int, int] = (0, 0)

    @property
    def active(self) -> bool:
        """Whether it has its activation."""
        return self.low > -math.inf or self.high < math.inf


@dataclass
class Pieces:
    """A network's pieces in order, and the graph that the float network is run by."""

    graph: fx.Graph
    order: list[Piece]

    def __getitem__(self, name: str) -> Piece:
        return next(piece for piece in self.order if piece.name == name)

    def node(self, name: str) -> fx.Node:
        """What computes a tensor in the float network."""
        if name != INPUT:
            return self[name].node
        return next(node for node in self.graph.nodes if node.op == "placeholder")

    def owners(self, name: str) -> tuple[str, ...]:
        """The tensors (pieces' outputs, or the input) whose grid ``name`` is on: of a concatenation several."""
        if name == INPUT or self[name].scale is not None:
            return (name,)
        return tuple(dict.fromkeys(owner for source in self[name].inputs for owner in self.owners(source)))

    def sharing(self) -> dict[str, tuple[str, ...]]:
        """For each tensor whose channels are concatenated with others': all that need one grid for that, in order."""
        groups: list[set[str]] = []
        for piece in self.order:
            if piece.op == "concatenate":
                joined = set(self.owners(piece.name))
                groups, apart = [], [*groups]
                for group in apart:
                    if group & joined:
                        joined |= group
                    else:
                        groups.append(group)
                groups.append(joined)
        ordered = [tuple(piece.name for piece in self.order if piece.name in group) for group in groups]
        return {name: group for group in ordered for name in group}


class Fuser:
    """Grows pieces node by node."""

    def __init__(self, graph: fx.Graph, values: dict[fx.Node, Any]) -> None:
        self.graph, self.values = graph, values
        self.pieces = Pieces(graph, [])
        self.tensors: dict[fx.Node, str] = {}  # node -> the tensor that holds its value, once everything is fused

    def shape(self, node: fx.Node) -> tuple[int, int, int]:
        """Channels, height and width of what a node computes; ``[N, F]`` counts as ``[N, F, 1, 1]``."""
        sizes = tuple(self.values[node].shape[1:])
        if len(sizes) not in (1, 3):
            raise refused(node, f"has a {len(sizes) + 1}-d output")
        return (sizes[0], 1, 1) if len(sizes) == 1 else sizes

    def tensor(self, node: fx.Node) -> str:
        """The tensor that holds what a node computes."""
        if node not in self.tensors:
            raise refused(node, "computes something else than one tensor")
        return self.tensors[node]

    def name(self, node: fx.Node) -> str:
        """A name for the piece that begins at ``node``: the layer's own where there is one."""
        wanted = str(node.target) if node.op == "call_module" else node.name
        taken = {piece.name for piece in self.pieces.order} | {INPUT}
        return next(name for name in (wanted, node.name, f"{wanted}.{node.name}") if name not in taken)

    def begin(self, node: fx.Node, op: str, source: fx.Node, **parts: Any) -> Piece:
        """A new piece that reads ``source``."""
        source_tensor, shape = self.tensor(source), self.shape(node)
        piece = Piece(self.name(node), op, (source_tensor,), shape, node, node, **parts)
        self.pieces.order.append(piece)
        self.tensors[node] = piece.name
        return piece

    def repeated(self, source: fx.Node, times: int) -> str:
        """The tensor of what ``source`` computes so many times, one behind the other; made if it is not there."""
        tensor, (channels, height, width) = self.tensor(source), self.shape(source)
        if times == 1:
            return tensor
        shape = (times * channels, height, width)
        return self._extra(Piece(f"{tensor}.x{times}", "concatenate", (tensor,) * times, shape, source, source))

    def concatenate(self, node: fx.Node, sources: Sequence[fx.Node]) -> None:
        """The channels of ``sources``, which get one grid; the input, which has that of its pixels, is copied to it."""
        if len(sources) == 1:
            self.same(node, sources[0])
            return
        tensors = [self.tensor(source) for source in sources]
        if any(self.pieces.owners(tensor) != (INPUT,) for tensor in tensors):
            tensors = [self._off_the_pixels(source) for source in sources]
        self.begin(node, "concatenate", sources[0]).inputs = tuple(tensors)

    def _off_the_pixels(self, source: fx.Node) -> str:
        """The tensor of what ``source`` computes, or a copy if that is on the grid of the input."""
        tensor, shape = self.tensor(source), self.shape(source)
        if self.pieces.owners(tensor) != (INPUT,):
            return tensor
        scale, shift = torch.ones(shape[0], dtype=torch.float64), torch.zeros(shape[0], dtype=torch.float64)
        name = f"{tensor}.rescaled"
        return self._extra(Piece(name, "rescale", (tensor,), shape, source, source, scale=scale, shift=shift))

    def _extra(self, piece: Piece) -> str:
        """The name of a piece that no node of the graph stands for; it is added if it is not there yet."""
        if all(other.name != piece.name for other in self.pieces.order):
            self.pieces.order.append(piece)
        return piece.name

    def rescale(self, node: fx.Node, source: fx.Node) -> Piece:
        """A new piece that takes ``source`` as it is."""
        self.tensor(source)
        channels = self.shape(source)[0]
        scale, shift = torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
        return self.begin(node, "rescale", source, scale=scale, shift=shift)

    def same(self, node: fx.Node, source: fx.Node) -> None:
        """``node`` computes what ``source`` does."""
        self.tensors[node] = self.tensor(source)
        piece = self.growing(source)
        if piece is not None:
            if piece.line is piece.node:
                piece.line = node
            piece.node = node

    def growing(self, node: fx.Node) -> Piece | None:
        """The piece that ends at ``node``, if only one node reads it, so that more can be fused into it."""
        name = self.tensor(node)
        if name == INPUT or len(node.users) != 1:
            return None
        piece = self.pieces[name]
        return piece if piece.node is node and piece.scale is not None else None

    def affine(self, node: fx.Node, source: fx.Node, scale: Tensor, shift: Tensor) -> None:
        """``scale * source + shift`` per channel."""
        piece = self.growing(source)
        if piece is None or piece.active or piece.residual is not None:
            piece = self.rescale(node, source)
        assert piece.scale is not None and piece.shift is not None
        piece.scale, piece.shift = piece.scale * scale, piece.shift * scale + shift
        self._extend(piece, node, line=True)

    def clip(self, node: fx.Node, source: fx.Node, low: float, high: float) -> None:
        """``source`` limited to low..high."""
        piece = self.growing(source) or self.rescale(node, source)
        piece.low, piece.high = max(piece.low, low), min(piece.high, high)
        self._extend(piece, node, line=False)

    def add(self, node: fx.Node, first: fx.Node, second: fx.Node) -> None:
        """``first + second``: the later of the two that still grows takes the other as its residual."""
        if self.values[first].shape != self.values[second].shape:
            raise refused(node, "adds tensors of different shapes")
        open_pieces = []
        for at, other in ((first, second), (second, first)):
            piece = self.growing(at) if first is not second else None
            if piece is not None and not piece.active and piece.residual is None:
                open_pieces.append((self.pieces.order.index(piece), piece, other))
        if open_pieces:
            _, piece, other = max(open_pieces, key=lambda found: found[0])
        else:
            piece, other = self.rescale(node, first), second
        piece.residual = self.tensor(other)
        # Nothing reads it before this node, and its residual may have been computed after it began.
        self.pieces.order.remove(piece)
        self.pieces.order.append(piece)
        self._extend(piece, node, line=False)

    def _extend(self, piece: Piece, node: fx.Node, *, line: bool) -> None:
        piece.node = node
        if line:
            piece.line = node
        self.tensors[node] = piece.name


def refused(node: fx.Node, why: str) -> AnncvtError:
    """An operation that integer networks do not have."""
    name = str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return AnncvtError(
        f"{why}: integer networks cannot hold it yet",
        where=f"{name} ({node.name})" if name != node.name else name,
        fix="quantize a network of convolutions, adders, BatchNorm, ReLU, sums, concatenation, pools and Linear layers",
    )


def flat_graph(network: nn.Module) -> fx.Graph:
    """The network's graph down to torch's own modules, in eval mode.

    Raises:
        AnncvtError: its Python cannot be traced.
    """
    outline = sharing(network)
    with eval_mode(outline), torch.no_grad():
        try:
            graph = _FlatTracer().trace(outline, defaults(outline))
        except Exception as error:  # arbitrary Python code meets proxies
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise AnncvtError(
                f"its data flow cannot be traced: {lines[0][:160]}",
                fix="quantize a network whose forward has no control flow on values",
            ) from error
    hold_constants(graph, outline)
    forget_defaults(graph)
    for node in reversed([*graph.nodes]):
        if not node.users and node.target in _QUESTIONS:  # they would count among the readers of a tensor
            graph.erase_node(node)
    return graph


class _FlatTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (_ConvNd, _AdderNd)) or super().is_leaf_module(m, module_qualified_name)


@torch.no_grad()
def node_values(graph: fx.Graph, network: nn.Module, images: Tensor) -> dict[fx.Node, Any]:
    """What every node of ``graph`` computes in ``network`` for ``images`` ``[N, C, H, W]``."""
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "output":
            break
        if node.op == "placeholder":
            values[node] = images.clone()
            continue
        inputs = {source: values[source] for source in node.all_input_nodes}
        if _writes_in_place(node, network):
            _refuse_shared(node)
            # The value before is wanted as well.
            inputs = {source: value.clone() for source, value in inputs.items()}
        values[node] = execute(node, network, inputs)
    return values


def _writes_in_place(node: fx.Node, network: nn.Module) -> bool:
    if node.op == "call_module":
        return bool(getattr(network.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    inplace = bool(node.kwargs.get("inplace", False)) or name in ("iadd", "isub", "imul")
    return inplace or (node.op == "call_method" and name.endswith("_") and not name.endswith("__"))


def _refuse_shared(node: fx.Node) -> None:
    """A value that is overwritten and read again has no place in a data flow."""
    if any(len(source.users) > 1 for source in node.all_input_nodes[:1]):
        raise refused(node, "overwrites a tensor that is read elsewhere")
