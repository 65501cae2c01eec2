"""What the definitions of the adder ops cost in stock onnxruntime: processor time and memory of ResNet-50's layers.

    python benchmarks/onnx_bodies.py
    python benchmarks/onnx_bodies.py --network net.ann    the whole network of a quantized folder instead

Every layer runs in a process of its own, on one thread, batch 1. Memory is what a call adds to the process at its peak,
without input and output.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper

from anncvt.runtime.onnx_body import BODIES, DOMAIN, VERSION, adder2d_function, adder_integer2d_function

#: Channels, height and width, filters, kernel, stride.
LAYERS = (
    (64, 56, 64, 1, 1), (64, 56, 64, 3, 1), (64, 56, 256, 1, 1), (256, 56, 128, 1, 1), (128, 56, 128, 3, 2),
    (256, 56, 512, 1, 2), (128, 28, 128, 3, 1), (256, 14, 256, 3, 1), (512, 14, 512, 3, 2), (1024, 14, 2048, 1, 2),
    (512, 7, 512, 3, 1), (2048, 7, 512, 1, 1),
)  # fmt: skip
CALLS = 3


def one_node(integer: bool, body: str, weight: np.ndarray, channels: int, size: int, stride: int) -> ModelProto:
    """A model that is one adder layer."""
    function = adder_integer2d_function(18, body) if integer else adder2d_function(18, body)
    element, result = (TensorProto.UINT8, TensorProto.INT32) if integer else (TensorProto.FLOAT, TensorProto.FLOAT)
    more = {"pad_value": 7} if integer else {}
    pads = [weight.shape[2] // 2] * 4
    node = helper.make_node(
        function.name,
        ["x", "w"],
        ["y"],
        domain=DOMAIN,
        strides=[stride] * 2,
        pads=pads,
        dilations=[1, 1],
        group=1,
        **more,
    )
    x = helper.make_tensor_value_info("x", element, ["n", channels, size, size])
    y = helper.make_tensor_value_info("y", result, ["n", len(weight), None, None])
    graph = helper.make_graph([node], "layer", [x], [y], [numpy_helper.from_array(weight, "w")])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)


def measure(integer: bool, body: str, layer: tuple[int, ...]) -> dict[str, float]:
    """Of one layer, in this process: "ms", the least of some calls, and "mb"."""
    channels, size, filters, kernel, stride = layer
    random = np.random.default_rng(0)
    weight, x = (
        random.integers(0, 256, shape).astype(np.uint8 if integer else np.float32)
        for shape in ((filters, channels, kernel, kernel), (1, channels, size, size))
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    model = one_node(integer, body, weight, channels, size, stride).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, seconds = _status("VmRSS"), []
    for _ in range(CALLS):
        begin = time.process_time()
        (y,) = session.run(None, {"x": x})
        seconds.append(time.process_time() - begin)
    return {"ms": 1e3 * min(seconds), "mb": (_status("VmHWM") - before) / 1024 - y.nbytes / 2**20}


def _status(name: str) -> int:
    """A line of this process's status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def network(folder: str) -> None:
    """Times of a network with every definition, in floats and in integers; the sessions take turns."""
    from timing import CLOCKS, interleaved

    from anncvt.folder import open_folder
    from anncvt.runtime.onnx import export, export_integers, session

    program, calls = open_folder(folder), {}
    x = np.random.default_rng(0).normal(size=(1, *program.preprocess.input_size)).astype(np.float32)
    with tempfile.TemporaryDirectory() as scratch:
        for body in BODIES:
            for kind, write in (("floats", export), ("integers", export_integers)):
                path = write(program, Path(scratch, f"{kind}-{body}.onnx"), body=body)
                opened = session(path, threads=1, library="none")
                calls[f"{body}, {kind}"] = lambda s=opened: s.run(None, {"image": x})
    for name, seconds in interleaved(calls, 20, CLOCKS["cpu"]).items():
        print(f"{name:20}{1e3 * seconds:8.1f} ms")


def main() -> None:
    if sys.argv[1:2] == ["--network"]:
        network(sys.argv[2])
        return
    if len(sys.argv) > 1:
        integer, body, *layer = json.loads(sys.argv[1])
        print(json.dumps(measure(integer, body, tuple(layer))))
        return
    cases = [(integer, body) for body in BODIES for integer in (False, True)]
    print("| layer |" + "".join(f" {body}, {'integers' if integer else 'floats'} |" for integer, body in cases))
    print("|---|" + "---|" * len(cases))
    for layer in LAYERS:
        cells = []
        for case in cases:
            done = subprocess.run(
                [sys.executable, __file__, json.dumps([*case, *layer])], capture_output=True, text=True, check=True
            )
            cells.append("{ms:.0f} ms, {mb:.0f} MB".format(**json.loads(done.stdout)))
        channels, size, filters, kernel, stride = layer
        shape = f"{channels}x{size}x{size}, {filters} of {kernel}x{kernel}" + (
            f", stride {stride}" if stride > 1 else ""
        )
        print(f"| {shape} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
