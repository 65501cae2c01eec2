import dataclasses
import shutil

import numpy as np
import onnx
import pytest
from networks import ZeroPadded
from quantized import adder_program, noise

from anncvt.errors import AnncvtError, GateError
from anncvt.passes.quantize import QuantizeConfig, quantize
from anncvt.program import Preprocess
from anncvt.runtime import check_integers, integer_network, integer_torch
from anncvt.runtime.check_integers import check, require_equal
from anncvt.runtime.onnx import export_integers

PIXELS = noise(2, (3, 8, 8), 3).pixels.numpy()


@pytest.fixture(scope="module")
def network():
    return quantize(adder_program(ZeroPadded(), 8), noise(16, (3, 8, 8)), QuantizeConfig(bits=5))


def test_all_executions_are_equal(network):
    result = check(network, PIXELS)
    assert result["ok"] and result["images"] == 2
    assert set(result["backends"]) | set(result["missing"]) == {"torch", "TVM", "TVM library", "C", "onnxruntime"}
    assert "compile DIR --int8" in result["missing"]["TVM library"]
    assert "export DIR --int8" in result["missing"]["onnxruntime"]
    assert result["layers"] == [step.name for step in network.steps]
    require_equal(result)


def test_a_difference_is_found_at_its_layer(network, monkeypatch):
    original = integer_torch.accumulate

    def wrong(step, inputs):
        found = original(step, inputs)
        if step.name == "conv2":
            found[0, 0, 0, 0] += 1
        return found

    monkeypatch.setattr(integer_torch, "accumulate", wrong)
    result = check(network, PIXELS)
    assert not result["ok"] and result["backends"]["torch"]["different"][0] == "conv2"
    assert "conv1" not in result["backends"]["torch"]["different"]
    with pytest.raises(GateError, match="torch from conv2 on"):
        require_equal(result)


def test_the_whole_network_compiled_is_compared_by_its_logits(network, tmp_path):
    pytest.importorskip("tvm")
    from anncvt.runtime import tvm

    preprocess = Preprocess((3, 8, 8), (0.5,), (0.25,))
    library = tvm.compile_network(network, preprocess, tmp_path / "model.int8.so")
    row = check(network, PIXELS, so_path=library)["backends"]["TVM library"]
    assert row == {"ok": True, "compared": [network.steps[-1].name], "different": []}
    result = check(changed_at_the_end(network), PIXELS, so_path=library)
    assert result["backends"]["TVM library"]["different"] == [network.steps[-1].name]
    with pytest.raises(GateError, match="TVM library from head on"):
        require_equal(result)


def changed_at_the_end(network):
    last = network.steps[-1]
    other = dataclasses.replace(last, epilogue=dataclasses.replace(last.epilogue, bias=last.epilogue.bias + 2**20))
    return dataclasses.replace(network, steps=(*network.steps[:-1], other))


def test_the_c_program_is_heard(network, monkeypatch):
    """A package whose golden vectors are those of another network."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (cc) here")
    last, changed = network.steps[-1], changed_at_the_end(network)
    export = check_integers.hardware.export

    def mixed(given, path, pixels):
        package = export(given, path, pixels)
        stray = export(changed, path.parent / "other", pixels)
        shutil.rmtree(package / "golden")
        return package if shutil.copytree(stray / "golden", package / "golden") else None

    monkeypatch.setattr(check_integers.hardware, "export", mixed)
    result = check(network, PIXELS)
    assert result["backends"]["C"]["different"] == [last.name] and result["backends"]["torch"]["ok"]


def test_a_file_that_computes_something_else_is_found(network, tmp_path):
    """The file of the same integers, but for one weight."""
    program = adder_program(ZeroPadded(), 8)
    program.folder = str(tmp_path)
    integer_network.save(network, tmp_path)
    path = export_integers(program, tmp_path / "model.onnx")
    row = check(network, PIXELS, onnx_path=path)["backends"]["onnxruntime"]
    assert row["ok"] and row["compared"] == [step.name for step in network.steps]
    model = onnx.load(path)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "conv2/weight")
    changed = onnx.numpy_helper.to_array(weight).copy()
    changed[0, 0, 1, 1] ^= 1
    weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
    onnx.save(model, path)
    result = check(network, PIXELS, onnx_path=path)
    assert result["backends"]["onnxruntime"]["different"][0] == "conv2" and not result["ok"]


def test_without_a_compiler_c_is_missing(network, monkeypatch):
    monkeypatch.setattr(check_integers.shutil, "which", lambda name: None)
    result = check(network, PIXELS)
    assert result["ok"] and "cc" in result["missing"]["C"]


def test_no_images_is_told(network):
    with pytest.raises(AnncvtError, match="no images"):
        check(network, np.zeros((0, 3, 8, 8), np.uint8))
