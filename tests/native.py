"""Models of one adder node, without a definition: only the native library can run them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from anncvt.runtime.integer import Window
from anncvt.runtime.onnx_body import DOMAIN, VERSION

TYPES = {
    "float32": TensorProto.FLOAT,
    "uint8": TensorProto.UINT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}


def attributes(window: Window, **more: float) -> dict[str, object]:
    """Those that every adder node states."""
    return {
        "strides": list(window.stride),
        "pads": list(window.padding),
        "dilations": list(window.dilation),
        "group": window.groups,
        **more,
    }


def node_model(
    op: str,
    inputs: Mapping[str, np.ndarray],
    constants: Mapping[str, np.ndarray],
    settings: Mapping[str, object],
    result: str = "float32",
    shape: Sequence[object] | None = None,
) -> onnx.ModelProto:
    """``op(*inputs, *constants)``; the batch of the inputs is open, and the whole output unless ``shape`` says else."""
    node = helper.make_node(op, [*inputs, *constants], ["y"], name="layer", domain=DOMAIN, **settings)
    ends = [
        helper.make_tensor_value_info(name, TYPES[array.dtype.name], ["batch", *array.shape[1:]])
        for name, array in inputs.items()
    ]
    tensors = [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in constants.items()]
    output = helper.make_tensor_value_info("y", TYPES[result], shape)
    graph = helper.make_graph([node], "layer", ends, [output], tensors)
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def native_session(model: onnx.ModelProto, library: Path, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def compiled_calls(library: Path) -> int:
    """How often the kernels of a loaded library ran."""
    count = ctypes.CDLL(str(library)).anncvt_compiled_calls
    count.restype = ctypes.c_uint64
    return count()


def layers_made(library: Path) -> np.ndarray:
    """Adder layers of the sessions so far: that may have a compiled kernel, that have one, in 16-bit fixed point."""
    counts = (ctypes.c_uint64 * 3)()
    ctypes.CDLL(str(library)).anncvt_layers(counts)
    return np.array(counts)


def to_blocks(x: np.ndarray) -> np.ndarray:
    """``[N, C, H, W]`` as ``[N, ceil(C/16), H, W, 16]``, lanes beyond the last channel zero."""
    full = np.pad(x, ((0, 0), (0, -x.shape[1] % 16), (0, 0), (0, 0)))
    return np.ascontiguousarray(full.reshape(len(x), -1, 16, *x.shape[2:]).transpose(0, 1, 3, 4, 2))
