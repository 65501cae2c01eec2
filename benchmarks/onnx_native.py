"""The native library of onnxruntime against the op's definition, and against onnxruntime's own CNN, on this machine.

    python benchmarks/onnx_native.py layers     layers of ResNet-20: definition over native
    python benchmarks/onnx_native.py memory     layers of ResNet-50: memory that the definition takes
    python benchmarks/onnx_native.py integers   layers of ResNet-50 in integers: native over QLinearConv
    python benchmarks/onnx_native.py network    ResNet-50: native, native with fused adders, and TVM, over the CNN

One thread, batch 1, processor time, minima over interleaved repeats; memory is the peak of a process of its own.
Kernels of floats are in float32, not in 16-bit fixed point.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import anncvt  # noqa: F401  (before torch: it sets the environment of the thread pools)

# isort: split
import numpy as np
import onnx
from int8 import qlinear_convolution
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession
from residual import pair
from shapes import RESNET20, RESNET50, Layer
from timing import CLOCKS, interleaved
from torch import nn

from anncvt.nn import AdderConv2d
from anncvt.program import Preprocess
from anncvt.runtime import onnx_native, tvm
from anncvt.runtime.onnx import export_network, session
from anncvt.runtime.onnx_body import DOMAIN, VERSION
from anncvt.runtime.onnx_session import Choice, open_session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["layers", "memory", "integers", "network"])
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        {"layers": layers, "memory": memory, "integers": integers, "network": network}[options.what](
            Path(scratch), options.repeats
        )


def layers(folder: Path, repeats: int) -> None:
    functions = definitions(folder)
    paths = [write(folder, index, layer, functions) for index, layer in enumerate(RESNET20)]

    def sessions(layer: Layer, path: Path, library: Path) -> tuple[InferenceSession, InferenceSession]:
        return session(path, threads=1, library="none"), session(path, threads=1, library=library)

    compare(RESNET20, paths, sessions, Table("definition", "native", repeats))


def memory(folder: Path, repeats: int) -> None:
    """The output is part of it."""
    functions = definitions(folder)
    print(f"{'layer':30}{'memory, MB':>12}")
    for index, layer in enumerate(RESNET50):
        path = write(folder, index, layer, functions)
        done = subprocess.run([sys.executable, "-c", _PEAK, str(path)], capture_output=True, text=True, check=True)
        print(f"{layer!s:30}{int(done.stdout.split()[-1]) / 1e6:12.1f}", flush=True)


#: Bytes that the first call adds at its peak to what the opened session has; imports as little as it can.
_PEAK = """
import sys
import numpy, onnxruntime
def read(name):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
x = numpy.ones([1, *session.get_inputs()[0].shape[1:]], numpy.float32)
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = read("VmRSS")
session.run(None, {"x": x})
print(read("VmHWM") - before)
"""


def integers(folder: Path, repeats: int) -> None:
    """The adder ends with int32 sums in plain layout, QLinearConv with requantised bytes."""
    paths = [write(folder, index, layer, [], integer=True) for index, layer in enumerate(RESNET50)]

    def sessions(layer: Layer, path: Path, library: Path) -> tuple[InferenceSession, InferenceSession]:
        shape = (layer.outputs, layer.channels, layer.kernel, layer.kernel)
        weight = np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)
        peer = path.with_suffix(".peer.onnx")
        onnx.save(qlinear_convolution(layer, weight), peer)
        return open_session(path, 1, library), open_session(peer, 1)

    compare(RESNET50, paths, sessions, Table("native", "QLinearConv", repeats))


#: Opens the two models that a layer's row compares: of a layer, its file and the library.
Sessions = Callable[[Layer, Path, Path], tuple[InferenceSession, InferenceSession]]


def compare(layers: Sequence[Layer], paths: Sequence[Path], sessions: Sessions, table: Table) -> None:
    """The rows of ``table``, one for each layer and its file; a library is built for all of them."""
    library = onnx_native.build(paths, paths[0].parent / onnx_native.LIBRARY, target="cpu", fixed=False)
    for layer, path in zip(layers, paths, strict=True):
        table.add(layer, *sessions(layer, path, library))
    table.total()


def network(folder: Path, repeats: int) -> None:
    cnn, adders = pair(64)
    size = (3, 224, 224)
    paths = {
        "CNN": export_network(cnn, size, folder / "cnn.onnx"),
        "native": export_network(adders, size, folder / "native.onnx"),
        "fused": export_network(adders, size, folder / "fused.onnx", fuse=True),
    }
    onnx_native.build([paths["native"], paths["fused"]], folder / onnx_native.LIBRARY, target="cpu", fixed=False)
    sessions = {name: session(path, threads=1) for name, path in paths.items()}
    choices: dict[str, Choice] = {name: opened.anncvt for name, opened in sessions.items()}
    assert choices["native"].native and choices["fused"].native
    x = {"image": np.random.default_rng(0).normal(size=(1, *size)).astype(np.float32)}
    calls = {name: lambda s=opened: s.run(None, x) for name, opened in sessions.items()}
    preprocess = Preprocess(size, (0.5,), (0.5,))
    compiled = tvm.load(tvm.compile_network(adders, preprocess, folder / "model.so", fixed=False), threads=1)
    calls["TVM"] = lambda: compiled(x["image"])
    times = interleaved(calls, repeats, CLOCKS["cpu"])
    for name, seconds in times.items():
        print(f"{name:10}{seconds * 1e3:10.1f} ms{seconds / times['CNN']:8.3f}")


class Table:
    """Times of two sessions on one layer after the other, and the first over the second."""

    def __init__(self, first: str, second: str, repeats: int) -> None:
        self.totals, self.repeats = {first: 0.0, second: 0.0}, repeats
        print(f"{'layer':30}{first + ', ms':>16}{second + ', ms':>16}{'ratio':>8}")

    def add(self, layer: Layer, *sessions: InferenceSession) -> None:
        """A row; the sessions take the same image, of the type that they want."""
        shape, random = (1, layer.channels, layer.size, layer.size), np.random.default_rng(0)
        floats = sessions[0].get_inputs()[0].type == "tensor(float)"
        image = random.normal(size=shape).astype(np.float32) if floats else random.integers(0, 256, shape, np.uint8)
        calls = {
            name: lambda s=each: s.run(None, {"x": image}) for name, each in zip(self.totals, sessions, strict=True)
        }
        times = interleaved(calls, self.repeats, CLOCKS["cpu"])
        self.totals = {name: total + layer.count * times[name] for name, total in self.totals.items()}
        self._print(str(layer), times)

    def total(self) -> None:
        """The sum over the layers of the network."""
        self._print("all layers", self.totals)

    @staticmethod
    def _print(title: str, times: dict[str, float]) -> None:
        first, second = times.values()
        print(f"{title:30}{first * 1e3:16.3f}{second * 1e3:16.3f}{first / second:8.2f}", flush=True)


def definitions(folder: Path) -> list[onnx.FunctionProto]:
    """The ops' definitions, from a file that was exported."""
    path = export_network(nn.Sequential(AdderConv2d(3, 4, 1), nn.Flatten()).eval(), (3, 4, 4), folder / "small.onnx")
    return list(onnx.load(path).functions)


def write(
    folder: Path, index: int, layer: Layer, functions: list[onnx.FunctionProto], *, integer: bool = False
) -> Path:
    """A model of the adder layer alone."""
    random = np.random.default_rng(1)
    shape = (layer.outputs, layer.channels, layer.kernel, layer.kernel)
    weight = random.integers(0, 256, shape).astype(np.uint8) if integer else random.normal(size=shape).astype("f")
    op = "AdderInteger2d" if integer else "Adder2d"
    window = {
        "strides": [layer.stride] * 2,
        "pads": [layer.padding] * 4,
        "dilations": [1, 1],
        "group": 1,
    }
    node = helper.make_node(op, ["x", "w"], ["y"], domain=DOMAIN, **window)
    element, result = (TensorProto.UINT8, TensorProto.INT32) if integer else (TensorProto.FLOAT, TensorProto.FLOAT)
    x = helper.make_tensor_value_info("x", element, ["batch", layer.channels, layer.size, layer.size])
    y = helper.make_tensor_value_info("y", result, None)
    graph = helper.make_graph([node], "layer", [x], [y], [numpy_helper.from_array(weight, "w")])
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=9, functions=functions)
    path = folder / f"{op}-{index}.onnx"
    onnx.save(model, path)
    return path


if __name__ == "__main__":
    main()
