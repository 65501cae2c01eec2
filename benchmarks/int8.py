"""Integer layers against onnxruntime's QLinearConv on the layers of ResNet-50, on this machine.

    python benchmarks/int8.py --threads 1
    python benchmarks/int8.py --threads 2 --json int8.json

Uint8 activations, int8 weights with one scale per channel in onnxruntime, uint8 weights in the adder; results are
requantised to uint8. Every figure is a minimum over interleaved repeats. Gop/s counts one ``|x - w|`` (or multiply-add)
as one op; the limit is that of a loop of the same instructions without loads (limits.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import anncvt  # noqa: F401  (before torch: it sets the environment of the thread pools)

# isort: split
import numpy as np
import onnx
import torch
import tvm
from limits import port_limits
from onnx import helper, numpy_helper
from sessions import Session
from shapes import RESNET50, Layer
from timing import CLOCKS, interleaved

from anncvt.runtime.geometry import Padding
from anncvt.runtime.kernels import cache
from anncvt.runtime.kernels.deployment import Deployment
from anncvt.runtime.kernels.integer_launch import to_blocks
from anncvt.runtime.kernels.integer_layer import IntegerLayer
from anncvt.runtime.kernels.integer_pack import Requantisation, narrow, totals_of
from anncvt.runtime.kernels.integer_plan import Plan

#: The stem is a convolution in the adder network too; its input is plain.
STEM = Layer(224, 3, 64, 7, 2)
COLUMNS = ("adder", "conv", "onnxruntime", "onnxruntime node")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: time of all threads together")
    parser.add_argument("--json", metavar="PATH", help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cache.use_threads(options.threads)
    peaks = port_limits()
    limit = max((peaks[name] for name in ("sad", "max_dot") if name in peaks), default=None)
    print(f"{options.threads} thread(s), {options.clock} time; limit of one core: {limit and round(limit, 1)} Gop/s")
    print(
        f"{'layer, batch ' + str(options.batch):30}" + "".join(f"{name:>18}" for name in COLUMNS) + "   share, ratios"
    )
    cores = options.threads if options.clock == "wall" else 1  # processor time is that of all of them
    rows, totals, shares = [], dict.fromkeys(COLUMNS, 0.0), []
    for layer in [STEM, *RESNET50]:
        times = layer_times(layer, options.batch, options)
        totals = {name: totals[name] + layer.count * times[name] for name in COLUMNS}
        speed = {name: layer.ops(options.batch) / times[name] / 1e9 for name in COLUMNS}
        ratios = [times["adder"] / times[name] for name in COLUMNS[2:]]
        share = speed["adder"] / (limit * cores) if limit and layer is not STEM else float("nan")
        shares.append(share)
        figures = "".join(f"{speed[name]:18.1f}" for name in COLUMNS)
        print(f"{layer!s:30}{figures}   {share:.2f}  {ratios[0]:.2f} {ratios[1]:.2f}", flush=True)
        rows.append({"layer": str(layer), "count": layer.count, "seconds": times})
    print(f"{'all layers, ms':30}" + "".join(f"{totals[name] * 1e3:18.2f}" for name in COLUMNS))
    print(f"{'adder / it':30}" + "".join(f"{totals['adder'] / totals[name]:18.3f}" for name in COLUMNS))
    if limit:
        print(f"median share of the limit (without the stem): {statistics.median(shares[1:]):.2f}")
    if options.json:
        settings = {name: getattr(options, name) for name in ("threads", "batch", "clock")}
        figures = {**settings, "limits": peaks, "layers": rows, "totals": totals}
        Path(options.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")


def layer_times(layer: Layer, batch: int, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of each of :data:`COLUMNS`; ``adder`` is a convolution in the stem.

    ``adder`` and ``conv`` are this package's kernels on blocked tensors, as a network passes them on. ``onnxruntime``
    is a call of a model of one QLinearConv, with the changes of layout at its borders; ``onnxruntime node`` is the
    QLinearConv alone by its profiler (wall time).
    """
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (batch, layer.channels, layer.size, layer.size)).astype(np.uint8)
    weight = random.integers(-127, 128, (layer.outputs, layer.channels, layer.kernel, layer.kernel)).astype(np.int8)
    session = Session(qlinear_convolution(layer, weight), {"x": x}, options.threads)
    conv = kernel(layer, "conv", x, weight)
    calls: dict[str, Callable[[], object]] = {
        "adder": conv if layer is STEM else kernel(layer, "adder", x, (weight.astype(np.int16) + 128).astype("u1")),
        "conv": conv,
        "onnxruntime": session.call,
    }
    times = interleaved(calls, options.repeats, CLOCKS[options.clock])
    return {**times, "onnxruntime node": session.node_seconds("QLinearConv")}


def kernel(layer: Layer, mode: str, x: np.ndarray, weight: np.ndarray) -> Callable[[], object]:
    """A call of this package's kernel with a requantisation that uses the range of uint8."""
    taps, sides, stem = layer.channels * layer.kernel**2, [layer.padding] * 4, layer is STEM
    size, window, steps = (layer.size,) * 2, (layer.kernel,) * 2, (layer.stride,) * 2
    scale = np.full(layer.outputs, max(1, (1 << 22) // (taps * 85)), np.int32)
    centre = np.full(layer.outputs, taps * 85 if mode == "adder" else 128, np.int64)
    end = Requantisation(scale, centre * scale, 16)
    spec = IntegerLayer(
        mode,
        layer.channels,
        size,
        layer.outputs,
        window,
        steps,
        Padding(*sides),
        clamped=end.narrow,
        totals=totals_of(mode, weight, end),
        narrow=narrow(mode, weight, end),
        blocked=not stem,
    )
    constants = Plan.of(spec, Deployment.parse("cpu")).pack(weight, 128, end)
    image = torch.from_numpy(x)
    arrays = [image if stem else to_blocks(image), *constants, np.zeros((len(x), *spec.out_shape), np.uint8)]
    tensors, function = [tvm.runtime.tensor(np.asarray(array)) for array in arrays], cache.kernel(spec)
    return lambda: function(*tensors)


def qlinear_convolution(layer: Layer, weight: np.ndarray) -> onnx.ModelProto:
    """One QLinearConv with zero points of 128, as quantised networks have them."""
    constants = {
        "x_scale": np.float32(0.02),
        "x_zero": np.uint8(128),
        "w": weight,
        "w_scale": np.full(layer.outputs, 0.01, np.float32),
        "w_zero": np.zeros(layer.outputs, np.int8),
        "y_scale": np.float32(0.05),
        "y_zero": np.uint8(128),
        "bias": np.zeros(layer.outputs, np.int32),
    }
    window = {"strides": [layer.stride] * 2, "pads": [layer.padding] * 4}
    node = helper.make_node("QLinearConv", ["x", *constants], ["y"], **window)
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None) for name in ("x", "y")]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph([node], "layer", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


if __name__ == "__main__":
    main()
