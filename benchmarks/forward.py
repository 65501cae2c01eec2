"""Inference kernels on the layers of ResNet-50, against convolutions and against other implementations of the adder."""

from __future__ import annotations

import argparse
import importlib
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
import tvm
from onnx import helper
from sessions import Session
from shapes import RESNET50, Layer
from timing import interleaved
from torch import Tensor

from anncvt import zoo
from anncvt.errors import AnncvtError
from anncvt.runtime.geometry import Padding
from anncvt.runtime.kernels import cache, fixed_point, inference
from anncvt.runtime.kernels import layer as kernel_layer
from anncvt.runtime.kernels.deployment import Deployment

#: Calls of one contestant between those of the next.
_COLUMNS = ("adder", "fixed", "conv", "onnxruntime", "onnxruntime node", "torch")
_Clock = Callable[[], float]


def measure(options: argparse.Namespace, clock: _Clock, peaks: dict[str, float]) -> dict[str, Any]:
    """Print a row per layer and the sums over the network; returns them.

    ``adder``, ``fixed`` (in 16-bit fixed point, from AVX2 on) and ``conv`` are this package's kernels in the blocked
    layout of a compiled network, with scale, shift and ReLU. ``onnxruntime`` is a call of a model of one Conv and Relu,
    and includes the change of layout at its borders; ``onnxruntime node`` is the time of the Conv alone by its profiler
    (wall time). ``torch`` is conv2d in the better of its layouts.

    The share of the limit, which knows no caches, is that of the adder called by itself, again and again: what the
    contestants leave in the caches for each other is no matter of a kernel's instructions.
    """
    batch = options.batch or 1
    cache.use_threads(options.threads)
    peers = _peers() if options.peers else {}
    host = Deployment.parse("cpu")
    fixed = fixed_point.form_of(host.architecture, host.features) is not None
    columns = [name for name in _COLUMNS if fixed or name != "fixed"]
    rows, totals, shares = [], dict.fromkeys([*columns, *peers], 0.0), []
    print(f"{'layer, batch ' + str(batch):30}" + "".join(f"{name:>17}" for name in totals) + "   Gop/s; share of limit")
    for layer in RESNET50:
        times = _layer_times(layer, batch, options, clock, peers, fixed)
        alone = times.pop("adder alone")
        speeds = {name: layer.ops(batch) / seconds / 1e9 for name, seconds in times.items()}
        totals = {name: totals[name] + layer.count * times[name] for name in totals}
        if "max_fma" in peaks:
            shares.append(layer.ops(batch) / alone / 1e9 / (peaks["max_fma"] * options.threads))
        share = f"   {shares[-1]:.2f}" if shares else ""
        print(f"{layer!s:30}" + "".join(f"{speeds[name]:17.1f}" for name in totals) + share, flush=True)
        rows.append({"layer": str(layer), "seconds": times})
    print(f"{'all layers, ms':30}" + "".join(f"{totals[name] * 1e3:17.1f}" for name in totals))
    ratios = "".join(f"{totals['adder'] / totals[name]:17.4f}" for name in totals)
    print(f"{'adder / it':30}" + ratios)
    if shares:
        print(f"median share of the limit: {statistics.median(shares):.2f}")
    return {"batch": batch, "layers": rows, "totals": totals, "shares": shares}


def _layer_times(
    layer: Layer,
    batch: int,
    options: argparse.Namespace,
    clock: _Clock,
    peers: dict[str, Callable[..., Tensor]],
    fixed: bool,
) -> dict[str, float]:
    x = torch.randn(batch, layer.channels, layer.size, layer.size)
    weight = torch.randn(layer.outputs, layer.channels // layer.groups, layer.kernel, layer.kernel)
    last = x.to(memory_format=torch.channels_last)
    arguments = (None, layer.stride, layer.padding, 1, layer.groups)
    with torch.inference_mode():
        sessions = [_session(layer, x.numpy(), weight.numpy(), options.threads, full) for full in (True, False)]
        calls: dict[str, Callable[[], object]] = {
            "adder": _compiled(layer, "max", x.numpy(), weight.numpy()),
            "conv": _compiled(layer, "conv", x.numpy(), weight.numpy()),
            "onnxruntime": sessions[0].call,
            "onnxruntime, plain layout": sessions[1].call,
            "torch": lambda: F.conv2d(x, weight, *arguments),
            "torch, channels last": lambda: F.conv2d(last, weight, *arguments),
        }
        if fixed:
            calls["fixed"] = _compiled(layer, "fixed", x.numpy(), weight.numpy())
        times = interleaved(calls, options.repeats, clock)
        times["adder alone"] = interleaved({"": calls["adder"]}, options.repeats, clock)[""]
        times["onnxruntime node"] = min(session.node_seconds("Conv", "FusedConv") for session in sessions)
        # The slow ones apart, and once: they would empty the caches between the calls of the others.
        peer_calls = {
            name: lambda peer=peer: peer(x, weight, layer.stride, layer.padding) for name, peer in peers.items()
        }
        times |= interleaved(peer_calls, 1, clock)
    times["onnxruntime"] = min(times["onnxruntime"], times.pop("onnxruntime, plain layout"))
    times["torch"] = min(times["torch"], times.pop("torch, channels last"))
    return times


def _compiled(layer: Layer, mode: str, x: np.ndarray, weight: np.ndarray) -> Callable[[], object]:
    """A call of the kernel that a compiled network would use for ``layer``."""
    size, side = (layer.size, layer.size), layer.padding
    spec = kernel_layer.Layer(
        mode,
        x.shape[0],
        layer.channels,
        size,
        layer.outputs,
        (layer.kernel, layer.kernel),
        (layer.stride, layer.stride),
        Padding(side, side, side, side),
        groups=layer.groups,
        activation=("relu",),
    )
    target = Deployment.parse("cpu")
    if mode == "fixed":
        function = fixed_point.generate(spec, target.architecture, target.features)
    else:
        function = inference.build(spec, target.cut(spec), target.assembly)
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    kernel = tvm.compile(module, target.target)["main"]
    blocks = x.reshape(x.shape[0], -1, kernel_layer.LANES, *size).transpose(0, 1, 3, 4, 2)
    pack = fixed_point.pack if mode == "fixed" else inference.pack
    constants = pack(spec, weight, np.ones(layer.outputs), np.zeros(layer.outputs))
    arrays = [np.ascontiguousarray(blocks), *constants, np.zeros(spec.out_shape, np.float32)]
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    return lambda: kernel(*tensors)


def _session(layer: Layer, x: np.ndarray, weight: np.ndarray, threads: int, full: bool) -> Session:
    """Conv and Relu; ``full`` lets onnxruntime change to its blocked layout."""
    window = {"strides": [layer.stride] * 2, "pads": [layer.padding] * 4, "group": layer.groups}
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], **window), helper.make_node("Relu", ["c"], ["y"])]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "layer", ends[:1], ends[1:], [onnx.numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return Session(model, {"x": x}, threads, full)


def _peers() -> dict[str, Callable[[Tensor, Tensor, int, int], Tensor]]:
    """Other implementations of the adder layer: as AdderNet's code does it, with cdist, and pylocron's if installed."""
    found: dict[str, Callable[[Tensor, Tensor, int, int], Tensor]] = {"cdist": _cdist, "broadcast": _broadcast}
    try:
        zoo.import_torchvision()  # pylocron imports it, too
        functional = importlib.import_module("holocron.nn.functional")
    except (ImportError, AnncvtError) as error:
        print(f"pylocron is left out: {error}")
    else:
        found["pylocron"] = lambda x, w, stride, padding: functional.add2d(x, w, None, stride, padding)
    return found


def _cdist(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """The fastest formulation in plain torch that is in use."""
    columns = F.unfold(x, weight.shape[2:], padding=padding, stride=stride).transpose(1, 2)
    return -torch.cdist(columns, weight.flatten(1)[None], p=1)


def _broadcast(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """All differences at once, as in the code that came with the AdderNet paper."""
    columns = F.unfold(x, weight.shape[2:], padding=padding, stride=stride)
    return -(weight.flatten(1)[None, :, :, None] - columns[:, None]).abs().sum(2)
