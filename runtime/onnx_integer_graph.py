"""The ONNX graph of an integer network while it grows, and the names its values have.

Every tensor of the network is a value of the graph, plain (``NAME/integers``), blocked (``NAME/blocked``, see
:mod:`anncvt.runtime.onnx_fused_body`) or both; the other layout is made where it is first read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from anncvt.program import versions
from anncvt.runtime.integer import Step
from anncvt.runtime.integer_network import INPUT, IntegerNetwork
from anncvt.runtime.onnx_body import DOMAIN, VERSION
from anncvt.runtime.onnx_fused_body import LANES

#: What torch's exporter writes, too; the oldest onnxruntime that is supported reads no newer one.
IR_VERSION = 10
BATCH = "batch"
#: What the names of ops that change the layout of integers end with.
KIND = "Integer"


def integers_of(name: str) -> str:
    """The value of the graph that holds a tensor of the network, ``[batch, C, H, W]`` uint8 (logits: int32)."""
    return f"{name}/integers"


def blocked_of(name: str) -> str:
    """The value of a fused graph that holds a tensor of the network, ``[batch, ceil(C/16), H, W, 16]`` uint8."""
    return f"{name}/blocked"


def blocked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """``[C, H, W]`` in blocked layout, without the batch."""
    return (-(-shape[0] // LANES), *shape[1:], LANES)


def accumulator_of(name: str) -> str:
    """The value of the graph that holds a step's accumulators, ``[batch, C, H, W]`` int32."""
    return f"{name}/accumulator"


def shape_of(network: IntegerNetwork, name: str) -> tuple[int, ...]:
    """``(C, H, W)`` of a tensor of the network, :data:`anncvt.runtime.integer_network.INPUT` included."""
    return network.input_shape if name == INPUT else network.step(name).shape


def window_of(step: Step) -> dict[str, Any]:
    """A step's window as the attributes of an ONNX convolution, without its kernel's shape."""
    window = step.window
    return {
        "strides": window.stride,
        "pads": window.padding,
        "dilations": window.dilation,
        "group": window.groups,
    }


class Graph:
    """A graph while it grows.

    Args:
        network: what the graph will compute.
        opset: version of the standard operators that it is written in.
    """

    def __init__(self, network: IntegerNetwork, opset: int) -> None:
        self.network, self.opset = network, opset
        #: Tensors of the network of which there is more than the plain value, and in which layouts there are.
        self.layouts: dict[str, set[str]] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.shapes: list[onnx.ValueInfoProto] = []

    def node(
        self, op: str, inputs: Sequence[str], output: str, domain: str = "", name: str = "", **attributes: Any
    ) -> str:
        """Add a node, by default named after its one ``output``, which is returned."""
        node = helper.make_node(op, inputs, [output], name=name or output, domain=domain, **attributes)
        self.nodes.append(node)
        return output

    def constant(self, name: str, value: Any) -> str:
        """Add a constant with the shape and type that numpy gives ``value``; returns its name."""
        self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def arithmetic(self, op: str, value: str, output: str, **constants: Any) -> str:
        """Add an operation of an int64 value and int64 constants; returns its ``output``."""
        names = [self.constant(f"{output}/{name}", np.asarray(c, np.int64)) for name, c in constants.items()]
        return self.node(op, [value, *names], output)

    def plain(self, name: str) -> str:
        """The plain value of a tensor of the network, see :func:`integers_of`; made of the blocked one if need be."""
        value, known = integers_of(name), self.layouts.get(name, {integers_of(name)})
        if value not in known:
            channels = self.network.step(name).shape[0]
            self.node(f"Unblock{KIND}", [blocked_of(name)], value, DOMAIN, channels=channels)
            self.shaped(value, TensorProto.UINT8, self.network.step(name).shape)
            known.add(value)
        return value

    def blocked(self, name: str) -> str:
        """The blocked value of a tensor of the network, see :func:`blocked_of`; made of the plain one if need be."""
        value, known = blocked_of(name), self.layouts.setdefault(name, {integers_of(name)})
        if value not in known:
            self.in_blocks(integers_of(name), value, shape_of(self.network, name))
            known.add(value)
        return value

    def in_blocks(self, plain: str, value: str, shape: Sequence[int]) -> str:
        """Add the blocked ``value`` of a plain one of ``shape`` ``[C, H, W]`` uint8; returns its name."""
        self.node(f"Block{KIND}", [plain], value, DOMAIN)
        self.shaped(value, TensorProto.UINT8, blocked_shape(shape))
        return value

    def shaped(self, value: str, element: int, shape: Sequence[int]) -> None:
        """State the type of a value, for whoever infers none through the op; ``shape`` is without the batch."""
        self.shapes.append(helper.make_tensor_value_info(value, element, [BATCH, *shape]))

    def model(self, image: str, logits: str, functions: list[onnx.FunctionProto]) -> onnx.ModelProto:
        """The finished graph, from ``image`` ``[batch, C, H, W]`` to ``logits`` ``[batch, classes]``, both float32."""
        network = self.network
        classes = network.steps[-1].shape[0]
        graph = helper.make_graph(
            self.nodes,
            "integers",
            [helper.make_tensor_value_info(image, TensorProto.FLOAT, [BATCH, *network.input_shape])],
            [helper.make_tensor_value_info(logits, TensorProto.FLOAT, [BATCH, classes])],
            list(self.constants.values()),
            value_info=self.shapes,
        )
        opsets = [helper.make_opsetid("", self.opset)]
        if functions:
            opsets.append(helper.make_opsetid(DOMAIN, VERSION))
        return helper.make_model(
            graph,
            functions=functions,
            opset_imports=opsets,
            ir_version=IR_VERSION,
            producer_name="anncvt",
            producer_version=versions().get("anncvt", "unknown"),
        )
