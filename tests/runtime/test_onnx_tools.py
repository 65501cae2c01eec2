"""What other ONNX tools do to an exported file: the statements of docs/onnx.md, one test each."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import onnxscript.optimizer
import onnxscript.version_converter
import pytest
from onnx import inliner, version_converter
from onnx.utils import extract_model
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from tiny import SIZE, tiny_program

from anncvt.errors import AnncvtError
from anncvt.runtime.onnx import export, run, session
from anncvt.runtime.onnx_body import DOMAIN

IMAGES = np.random.default_rng(0).standard_normal((2, *SIZE)).astype("float32")


class Calibration(quantization.CalibrationDataReader):
    def __init__(self):
        self.batches = iter([{"image": IMAGES}])

    def get_next(self):
        return next(self.batches, None)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return export(tiny_program(), tmp_path_factory.mktemp("tools") / "model.onnx")


def optimise(source, target, **options):
    model = onnx_ir.load(source)
    onnxscript.optimizer.optimize(model, **options)
    onnx_ir.save(model, target)


def to_opset_21(source, target):
    model = onnx_ir.load(source)
    onnxscript.version_converter.convert_version(model, 21)
    onnx_ir.save(model, target)


def save_optimised(source, target):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(target)
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


KEEP = {
    "onnx.utils.extract_model": lambda source, target: extract_model(source, target, ["image"], ["logits"]),
    "onnx_ir.load and save": lambda source, target: onnx_ir.save(onnx_ir.load(source), target),
    "onnxscript.optimizer.optimize(inline=False)": lambda source, target: optimise(source, target, inline=False),
    # 7-bit weights: onnxruntime's products of bytes saturate on processors with AVX2 but no VNNI.
    "onnxruntime quantize_static": lambda source, target: quantization.quantize_static(
        source, target, Calibration(), reduce_range=True
    ),
    "onnxruntime quantize_dynamic": lambda source, target: quantization.quantize_dynamic(
        source, target, reduce_range=True
    ),
    "onnxruntime convert_float_to_float16": lambda source, target: onnx.save(
        convert_float_to_float16(onnx.load(source), keep_io_types=True), target
    ),
}
INLINE = {
    "onnx.inliner": lambda source, target: onnx.save(inliner.inline_local_functions(onnx.load(source)), target),
    "onnxscript.optimizer.optimize": optimise,
    "onnxscript.version_converter": to_opset_21,
    "onnxruntime quant_pre_process": lambda source, target: quant_pre_process(source, target, skip_symbolic_shape=True),
    "onnxruntime optimized_model_filepath": save_optimised,
}


def adders(path):
    return sum(node.domain == DOMAIN for node in onnx.load(path).graph.node)


def assert_same_network(path, source, tolerance):
    wanted = run(session(source), IMAGES)
    np.testing.assert_allclose(run(session(path), IMAGES), wanted, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("tool", KEEP)
def test_tools_that_keep_the_op(tool, source, tmp_path):
    target = tmp_path / "after.onnx"
    KEEP[tool](source, target)
    assert adders(target) == 1
    lossy = "quantize" in tool or "float16" in tool
    assert_same_network(target, source, 0.05 if lossy else 1e-6)


@pytest.mark.parametrize("tool", INLINE)
def test_tools_that_inline_the_op(tool, source, tmp_path):
    target = tmp_path / "after.onnx"
    INLINE[tool](source, target)
    assert adders(target) == 0
    assert_same_network(target, source, 1e-6)


def test_onnx_version_converter_drops_the_definition(source, tmp_path):
    target = tmp_path / "after.onnx"
    onnx.save(version_converter.convert_version(onnx.load(source), 21), target)
    assert adders(target) == 1 and not onnx.load(target).functions
    with pytest.raises(AnncvtError, match="lacks the definition"):
        session(target)


def test_onnx_version_converter_works_on_the_inlined_model(source, tmp_path):
    target = tmp_path / "after.onnx"
    onnx.save(version_converter.convert_version(inliner.inline_local_functions(onnx.load(source)), 21), target)
    assert_same_network(target, source, 1e-6)
