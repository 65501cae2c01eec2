"""The first nodes of an integer network as ONNX: images, as runtimes are given them, become the network's integers."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from anncvt.program import Preprocess
from anncvt.runtime.integer import Array
from anncvt.runtime.integer_network import INPUT, IntegerNetwork
from anncvt.runtime.onnx_integer_graph import Graph, integers_of

#: A line that is rounded must not come nearer to a tie: some sixteen times what float32 resolves at 255.
TIE = 2**-12


def enter(graph: Graph, preprocess: Preprocess, image: str) -> None:
    """Normalised floats -> the pixels they were -> the integers of the table.

    Args:
        preprocess: how the pixels were normalised.
        image: the value to start from, float32 ``[batch, C, H, W]``. It becomes the network's input, uint8.
    """
    network = graph.network
    channels = network.input_shape[0]
    per_channel = (channels, 1, 1)
    std, mean = (
        np.broadcast_to(np.asarray(values, np.float32), channels).reshape(per_channel)
        for values in (preprocess.std, preprocess.mean)
    )
    spread = graph.node("Mul", [image, graph.constant("/pixels/std", std)], "/pixels/spread")
    unit = graph.node("Add", [spread, graph.constant("/pixels/mean", mean)], "/pixels/unit")
    scale, zero = graph.constant("/pixels/scale", np.float32(1 / 255)), graph.constant("/pixels/zero", np.uint8(0))
    pixels = graph.node("QuantizeLinear", [unit, scale, zero], "/pixels")
    graph.shaped(integers_of(INPUT), TensorProto.UINT8, network.input_shape)
    if (line := _line(network, std)) is not None:
        slope, start = graph.constant("/pixels/slope", line[0]), graph.constant("/pixels/start", line[1])
        floats = graph.node("Cast", [pixels], "/pixels/floats", to=TensorProto.FLOAT)
        sloped = graph.node("Mul", [floats, slope], "/pixels/sloped")
        places = graph.node("Add", [sloped, start], "/pixels/places")
        graph.node("QuantizeLinear", [places, graph.constant("/pixels/one", np.float32(1)), zero], integers_of(INPUT))
        return
    rows = np.arange(0, 256 * channels, 256, dtype=np.int32).reshape(per_channel)
    offsets = graph.node("Cast", [pixels], "/pixels/offsets", to=TensorProto.INT32)
    places = graph.node("Add", [offsets, graph.constant("/pixels/rows", rows)], "/pixels/places")
    table = graph.constant("/pixels/table", network.table.reshape(-1))
    graph.node("Gather", [table, places], integers_of(INPUT), axis=0)


def _line(network: IntegerNetwork, std: Array) -> tuple[Array, Array] | None:
    """Slope and start, float32 ``[C, 1, 1]``, of lines that round to the rows of the network's table, if there are any.

    The table of a normalisation is a rounded line, which runtimes compute ten times as fast as they look pixels up.
    """
    slope = (1 / (255 * std.astype(np.float64) * network.input_grid.scale)).astype(np.float32).reshape(-1, 1)
    sloped, wanted = np.arange(256, dtype=np.float32) * slope, network.table.astype(np.float64)
    least = np.where(wanted > 0, wanted - 0.5 - sloped, -np.inf).max(1)
    most = np.where(wanted < 255, wanted + 0.5 - sloped, np.inf).min(1)
    if not np.isfinite(least + most).all() or (most - least).min() < 2 * TIE:
        return None
    start = ((least + most) / 2).astype(np.float32)
    return slope.reshape(-1, 1, 1), start.reshape(-1, 1, 1)
