"""An integer network as an ONNX graph that computes the integers of :mod:`anncvt.runtime.integer`, bit for bit.

Adders are ``ai.anncvt::AdderInteger2d``, everything else is in standard operators. Every tensor of the network is a
value of the graph: ``NAME/integers`` what a step puts out, ``NAME/accumulator`` what its epilogue works on. What
belongs to no step has a name that begins with a slash.

Fused, a step and its epilogue are one node whose accumulators are no value. Such nodes pass blocked tensors on to
each other (``NAME/blocked``, see :mod:`anncvt.runtime.onnx_fused_body`); plain ones are made where others read them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir
from onnx import TensorProto

from anncvt.program import Preprocess
from anncvt.runtime.integer_network import IntegerNetwork, verify
from anncvt.runtime.onnx_body import adder_integer2d_function
from anncvt.runtime.onnx_fused_body import integer_functions
from anncvt.runtime.onnx_integer_fused import fused_adder, fused_convolution
from anncvt.runtime.onnx_integer_graph import Graph, accumulator_of, blocked_of, blocked_shape, integers_of
from anncvt.runtime.onnx_integer_image import enter
from anncvt.runtime.onnx_integer_layers import LAYERS, ends_in_bytes, finish
from anncvt.runtime.onnx_integer_moves import BLOCKED_MOVES, MOVES, stays_blocked

__all__ = ["accumulator_of", "blocked_of", "blocked_shape", "integer_model", "integers_of"]


def integer_model(
    network: IntegerNetwork,
    preprocess: Preprocess,
    opset: int,
    body: str,
    image: str,
    logits: str,
    *,
    fuse: bool = False,
) -> onnx_ir.Model:
    """The network from ``image`` (float32 ``[batch, C, H, W]``, normalised) to ``logits`` (float32).

    The image is turned back into the pixels it was made of, since pixels are what the network's table takes.

    Raises:
        AnncvtError: a sum of a layer may overflow.
    """
    verify(network)
    graph = Graph(network, opset)
    enter(graph, preprocess, image)
    for step in network.steps:
        if step.epilogue is None and stays_blocked(graph, step):
            BLOCKED_MOVES[step.op](graph, step)
        elif step.epilogue is None:
            MOVES[step.op](graph, step, [graph.plain(name) for name in step.inputs])
            graph.shaped(integers_of(step.name), TensorProto.UINT8, step.shape)
        elif fuse and step.op == "adder" and ends_in_bytes(step.epilogue):
            fused_adder(graph, step, step.epilogue)
        elif fuse and ends_in_bytes(step.epilogue):
            fused_convolution(graph, step, step.epilogue)
        else:
            LAYERS[step.op](graph, step, [graph.plain(name) for name in step.inputs])
            graph.shaped(accumulator_of(step.name), TensorProto.INT32, step.shape)
            finish(graph, step, step.epilogue)
    last = network.steps[-1]
    flat = graph.node("Flatten", [graph.plain(last.name)], f"/{logits}/flat", axis=1)
    graph.node("DequantizeLinear", [flat, graph.constant(f"/{logits}/scale", np.float32(last.grid.scale))], logits)
    functions = [adder_integer2d_function(opset, body)] if any(s.op == "adder" for s in network.steps) else []
    if graph.layouts:
        functions += integer_functions(opset)
    return onnx_ir.from_proto(graph.model(image, logits, functions))
