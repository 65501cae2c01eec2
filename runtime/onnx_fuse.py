"""Fusing an exported model's adders with what follows them: BatchNorm, a residual addition, ReLU or ReLU6.

``Adder2d -> BatchNormalization [-> Add] [-> Relu | Clip]`` becomes one ``ai.anncvt::FusedAdder2d`` (with a residual:
``FusedAdder2dResidual``) node. These nodes pass blocked tensors on to each other; ``Block`` and ``Unblock`` nodes stand
where other operators are (:mod:`anncvt.runtime.onnx_fused_body`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir
from onnx_ir import Node, Value

from anncvt.runtime.onnx_body import DOMAIN, OP_TYPE
from anncvt.runtime.onnx_fused_body import LANES, functions


def fuse(model: onnx_ir.Model, opset: int) -> int:
    """Fuse the 2-d adders of ``model`` in place, definitions included; returns how many there were.

    ``opset`` is that of the model. Sizes must be known but for the batch; adders whose are not stay as they are.
    """
    graph = model.graph
    adders = [node for node in graph if (node.domain, node.op_type) == (DOMAIN, OP_TYPE) and _sized(node.outputs[0])]
    chains: list[_Chain] = []
    for node in adders:
        taken = {other for chain in chains for other in chain.nodes}
        if (found := _follow(node, taken)) is not None:
            chains.append(found)
    if not chains:
        return 0
    place = {node: index for index, node in enumerate(graph)}
    chains.sort(key=lambda chain: place[chain.nodes[-1]])  # a residual comes before the layer that adds it
    layout = _Layout(graph)
    for chain in chains:
        layout.replace(chain)
    layout.finish()
    for name in _unused(graph):
        del graph.initializers[name]
    for proto in functions(opset):
        function = onnx_ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function
    return len(chains)


@dataclass(frozen=True)
class _Chain:
    """An adder and the operators that join it; ``scale`` and ``shift`` are float64 ``[O]``."""

    nodes: tuple[Node, ...]
    scale: np.ndarray
    shift: np.ndarray
    residual: Value | None = None
    low: float = -math.inf
    high: float = math.inf

    @property
    def output(self) -> Value:
        return self.nodes[-1].outputs[0]

    def with_node(self, node: Node, **changes: object) -> _Chain:
        return dataclasses.replace(self, nodes=(*self.nodes, node), **changes)  # type: ignore[arg-type]


def _follow(adder: Node, taken: set[Node]) -> _Chain | None:
    """The longest chain from ``adder`` without nodes of ``taken``; None where the layer cannot be fused."""
    x, weight = adder.inputs
    if x is None or weight is None or not _sized(x):
        return None
    filters = _channels(adder.outputs[0])
    chain = _Chain((adder,), np.ones(filters), np.zeros(filters))
    while (node := _only_user(chain.output)) is not None and node not in taken:
        longer = _join(chain, node)
        if longer is None:
            break
        chain = longer
    return chain


def _join(chain: _Chain, node: Node) -> _Chain | None:
    """``chain`` with ``node`` at its end, if that can be fused."""
    if node.domain not in ("", "ai.onnx"):
        return None
    clipped = (chain.low, chain.high) != (-math.inf, math.inf)
    if node.op_type == "Relu" and not clipped:
        return chain.with_node(node, low=0.0)
    if node.op_type == "Clip" and not clipped:
        bounds = [_number(value) for value in (*node.inputs, None, None)[1:3]]
        if any(bound is None for bound in bounds):
            return None
        low, high = (float(bound) for bound in bounds if bound is not None)
        return chain.with_node(node, low=low, high=high)
    if clipped or chain.residual is not None:
        return None
    if node.op_type == "BatchNormalization":
        return _normalised(chain, node)
    if node.op_type == "Add":
        return _added(chain, node)
    return None


def _normalised(chain: _Chain, node: Node) -> _Chain | None:
    parameters = [_array(value) for value in node.inputs[1:5]]
    if len(node.outputs) != 1 or any(array is None for array in parameters):
        return None
    gamma, beta, mean, variance = (np.asarray(array, np.float64) for array in parameters)
    scale = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    return chain.with_node(node, scale=chain.scale * scale, shift=(chain.shift - mean) * scale + beta)


def _added(chain: _Chain, node: Node) -> _Chain | None:
    (other,) = [value for value in node.inputs if value is not chain.output] or [None]
    if other is None:
        return None
    bias = _array(other)
    if bias is not None:
        lanes = bias.shape[-3] if bias.ndim >= 3 else 1
        if bias.size != lanes or lanes not in (1, len(chain.shift)):
            return None
        return chain.with_node(node, shift=chain.shift + bias.reshape(-1))
    if not _sized(other) or not _sized(node.outputs[0]) or other.shape != node.outputs[0].shape:
        return None
    return chain.with_node(node, residual=other)


class _Layout:
    """Replaces chains by fused nodes; knows which values there are in which layout."""

    def __init__(self, graph: onnx_ir.Graph) -> None:
        self.graph = graph
        self.blocked: dict[Value, Value] = {}
        self.made: list[tuple[Value, Node]] = []

    def replace(self, chain: _Chain) -> None:
        adder, last = chain.nodes[0], chain.nodes[-1]
        x, weight = adder.inputs
        assert x is not None and weight is not None
        inputs = [self._block(x, last), weight]
        for kind, values in (("scale", chain.scale), ("shift", chain.shift)):
            inputs.append(self._constant(f"{adder.name}.{kind}", values))
        if chain.residual is not None:
            inputs.append(self._block(chain.residual, last))
        op = f"Fused{OP_TYPE}" + ("Residual" if chain.residual is not None else "")
        attributes = [*adder.attributes.values(), *_floats(low=chain.low, high=chain.high)]
        node = self._node(op, inputs, attributes, chain.output, str(adder.name), blocked=True)
        self.graph.insert_before(last, node)
        self.blocked[chain.output] = node.outputs[0]
        self.made.append((chain.output, node))
        # The plain value stays, made from the blocked one; whoever turns out to read it decides whether it is needed.
        channels = [onnx_ir.AttrInt64("channels", _channels(chain.output))]
        plain = self._node("Unblock", [node.outputs[0]], channels, chain.output, f"{adder.name}.unblock", blocked=False)
        self.graph.insert_before(last, plain)
        name = chain.output.name
        chain.output.replace_all_uses_with(plain.outputs[0], replace_graph_outputs=True)
        self.graph.remove(list(reversed(chain.nodes)), safe=True)
        plain.outputs[0].name = name
        self.blocked[plain.outputs[0]] = node.outputs[0]

    def finish(self) -> None:
        """Remove changes of layout that nobody reads."""
        for node in reversed(list(self.graph)):
            idle = not any(value.uses() or value.is_graph_output() for value in node.outputs)
            if node.domain == DOMAIN and node.op_type in ("Block", "Unblock") and idle:
                self.graph.remove(node, safe=True)

    def _block(self, value: Value, before: Node) -> Value:
        """``value`` in blocked layout, for a node that stands before ``before``."""
        if value not in self.blocked:
            node = self._node("Block", [value], [], value, f"{value.name}.block", blocked=True)
            producer = value.producer()
            if producer is not None:
                self.graph.insert_after(producer, node)
            else:
                self.graph.insert_before(self.graph[0], node)
            self.blocked[value] = node.outputs[0]
        return self.blocked[value]

    def _constant(self, name: str, values: np.ndarray) -> Value:
        tensor = onnx_ir.tensor(values.astype(np.float32), name=name)
        shape, kind = onnx_ir.Shape(values.shape), onnx_ir.TensorType(tensor.dtype)
        value = Value(name=name, shape=shape, type=kind, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    @staticmethod
    def _node(
        op: str, inputs: Sequence[Value], attributes: Sequence[onnx_ir.Attr], like: Value, name: str, *, blocked: bool
    ) -> Node:
        """A node whose output is ``like`` in one layout or the other."""
        node = Node(DOMAIN, op, inputs, attributes, name=name)
        assert like.shape is not None
        (batch, _, height, width), channels = like.shape, _channels(like)
        size = [batch, -(-channels // LANES), height, width, LANES] if blocked else [batch, channels, height, width]
        (output,) = node.outputs
        output.shape, output.type = onnx_ir.Shape(size), like.type
        output.name = f"{like.name}.blocked" if blocked else f"{like.name}.plain"
        return node


def _only_user(value: Value) -> Node | None:
    users = value.uses()
    if value.is_graph_output() or len(users) != 1:
        return None
    return next(iter(users)).node


def _sized(value: Value) -> bool:
    """Whether it is ``[N, C, H, W]`` with C, H and W known."""
    shape = value.shape
    return shape is not None and len(shape) == 4 and all(isinstance(size, int) for size in shape[1:])


def _channels(value: Value) -> int:
    assert value.shape is not None and isinstance(value.shape[1], int)
    return value.shape[1]


def _array(value: Value | None) -> np.ndarray | None:
    """The constant ``value`` is."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def _number(value: Value | None) -> float | None:
    array = _array(value)
    return None if array is None or array.size != 1 else float(array.reshape(()))


def _floats(**values: float) -> list[onnx_ir.Attr]:
    return [onnx_ir.AttrFloat32(name, value) for name, value in values.items()]


def _unused(graph: onnx_ir.Graph) -> list[str]:
    return [str(value.name) for value in graph.initializers.values() if not value.uses()]
