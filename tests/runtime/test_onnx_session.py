"""Native or stock, and why."""

import shutil

import numpy as np
import onnx
import pytest
import torch
from native import compiled_calls
from networks import ZeroPadded
from onnx import numpy_helper
from quantized import adder_program, noise
from tiny import SIZE, tiny_program

from anncvt.errors import AnncvtError
from anncvt.passes.quantize import QuantizeConfig, quantize
from anncvt.runtime import artifact, integer_network, onnx_native, processor
from anncvt.runtime.onnx import export, export_integers, run, session
from anncvt.runtime.onnx_session import VARIABLE

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with a model and its library."""
    folder = tmp_path_factory.mktemp("built")
    model = export(tiny_program(), folder / "model.onnx")
    onnx_native.build([model], folder / onnx_native.LIBRARY, target="cpu")
    return folder


@pytest.fixture
def folder(built, tmp_path):
    return shutil.copytree(built, tmp_path / "program")


@pytest.fixture
def images():
    return np.random.default_rng(0).normal(size=(3, *SIZE)).astype(np.float32)


def changed(folder, change):
    path = folder / "model.onnx"
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    return path


def resealed(folder, **entries):
    """The library with another manifest."""
    path = folder / onnx_native.LIBRARY
    manifest = {**artifact.read_manifest(path), **entries}
    artifact.seal(path, manifest)
    return path


def test_the_library_beside_the_model_is_taken(folder, images):
    native, stock = session(folder / "model.onnx"), session(folder / "model.onnx", library="none")
    assert native.anncvt.native and native.anncvt.library == folder / onnx_native.LIBRARY
    assert not stock.anncvt.native
    before = compiled_calls(folder / onnx_native.LIBRARY)
    found = run(native, images)
    assert compiled_calls(folder / onnx_native.LIBRARY) == before + len(images)
    np.testing.assert_allclose(found, run(stock, images), rtol=1e-4, atol=1e-5)


def test_integers_bit_for_bit(tmp_path):
    program = adder_program(ZeroPadded(), 8)
    program.folder = str(tmp_path)
    network = quantize(program, noise(16, SIZE), QuantizeConfig(bits=5))
    integer_network.save(network, program.folder)
    paths = [export_integers(program, tmp_path / f"{fuse}.onnx", fuse=fuse) for fuse in (False, True)]
    library = onnx_native.build(paths, tmp_path / onnx_native.LIBRARY, target="cpu")
    test = noise(3, SIZE, 5)
    images = test.batch(torch.arange(len(test)), program.preprocess).numpy()
    expected = integer_network.run(network, test.pixels.numpy()) * np.float32(network.steps[-1].grid.scale)
    adders = sum(step.op == "adder" for step in network.steps)
    # Fused, every step but the last is a layer, and layers take whole batches.
    layers = sum(step.epilogue is not None and step.epilogue.high <= 255 for step in network.steps)
    for path, calls in zip(paths, (adders * len(images), layers), strict=True):
        native = session(path)
        assert native.anncvt.native
        before = compiled_calls(library)
        logits = run(native, images)
        assert compiled_calls(library) - before == calls > 0
        np.testing.assert_array_equal(logits, expected.reshape(logits.shape))


def test_registering_again_is_harmless(folder, images):
    sessions = [session(folder / "model.onnx", threads=threads) for threads in (1, 2, 1)]
    results = [run(each, images) for each in sessions]
    del sessions[0]
    for each, result in zip(sessions, results[1:], strict=True):
        np.testing.assert_array_equal(run(each, images), result)


def test_a_library_that_was_built_for_another_model(folder, images, caplog):
    """It serves the model all the same, and says that it could do better."""
    expected = run(session(folder / "model.onnx", library="none"), images)
    onnx_native.build([], folder / onnx_native.LIBRARY, target="cpu")
    opened = session(folder / "model.onnx")
    assert opened.anncvt.native and opened.anncvt.loops == 1
    assert "1 of 1 layers in its plain loops" in opened.anncvt.why and "compile DIR --for" in opened.anncvt.why
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    np.testing.assert_allclose(run(opened, images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif("avx2" not in (processor.features() or ()), reason="needs AVX2")
def test_fixed_point_is_told(tmp_path):
    program = adder_program(ZeroPadded(), 8)
    path = export(program, tmp_path / "model.onnx", fuse=True)
    images = np.random.default_rng(0).normal(size=(3, *SIZE)).astype(np.float32)
    expected = run(session(path, library="none"), images)
    onnx_native.build([path], tmp_path / onnx_native.LIBRARY, target="cpu", fixed=True)
    opened = session(path)
    assert opened.anncvt.native and opened.anncvt.loops == 0
    assert "2 of 2 layers in 16-bit fixed point" in opened.anncvt.why
    assert np.abs(run(opened, images) - expected).max() < 1e-3 * np.abs(expected).max()


def test_no_library(folder, caplog):
    (folder / onnx_native.LIBRARY).unlink()
    choice = session(folder / "model.onnx").anncvt
    assert not choice.native and not choice.unfit and "compile DIR --for onnxruntime" in choice.why
    assert not caplog.records


def test_a_library_elsewhere(folder, monkeypatch, tmp_path):
    elsewhere = (folder / onnx_native.LIBRARY).rename(tmp_path / "elsewhere.so")
    assert session(folder / "model.onnx", library=elsewhere).anncvt.native
    monkeypatch.setenv(VARIABLE, str(elsewhere))
    assert session(folder / "model.onnx").anncvt.library == elsewhere
    monkeypatch.setenv(VARIABLE, "none")
    assert not session(folder / "model.onnx").anncvt.native
    monkeypatch.setenv(VARIABLE, str(tmp_path / "missing.so"))
    with pytest.raises(AnncvtError, match=r"missing\.so"):
        session(folder / "model.onnx")


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_library_is_not_loaded(folder, images, damage):
    path = folder / onnx_native.LIBRARY
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes({"cut": content[:-100], "flipped": content, "empty": b"", "text": b"no library"}[damage])
    choice = session(folder / "model.onnx").anncvt
    assert not choice.native and str(path) in choice.why and "compile it again" in choice.why
    with pytest.raises(AnncvtError, match=str(path)):
        session(folder / "model.onnx", library=path)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"architecture": "vax"}, "made for vax"),
        ({"format": 99}, "another version"),
        ({"domain": {"ai.anncvt": 2}}, "another version"),
        ({"ops": {}}, "has no Adder2d"),
    ],
    ids=lambda value: str(value),
)
def test_a_library_for_something_else(folder, entries, said, caplog):
    resealed(folder, **entries)
    choice = session(folder / "model.onnx").anncvt
    assert not choice.native and choice.unfit and said in choice.why and "compile DIR --for" in choice.why
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_compiled_network_is_no_library(folder):
    path = folder / onnx_native.LIBRARY
    manifest = artifact.read_manifest(path)
    del manifest["domain"]
    artifact.seal(path, manifest)
    with pytest.raises(AnncvtError, match="not a library for onnxruntime"):
        session(folder / "model.onnx", library=path)


def test_a_model_without_adders(folder):
    def without(model):
        kept = [node for node in model.graph.node if node.domain == ""][:2]
        del model.graph.node[:]
        model.graph.node.extend(kept)
        kept[-1].output[0] = model.graph.node[-1].output[0] = "logits"

    choice = session(changed(folder, without)).anncvt
    assert not choice.native and choice.why == "the model has no adders"


def test_weights_in_half_precision_run_on_the_definitions(folder, images):
    from onnxruntime.transformers.float16 import convert_float_to_float16

    expected = run(session(folder / "model.onnx"), images)

    def halved(model):
        model.CopyFrom(convert_float_to_float16(model, keep_io_types=True))

    opened = session(changed(folder, halved))
    assert not opened.anncvt.native and "float16" in opened.anncvt.why
    np.testing.assert_allclose(run(opened, images), expected, rtol=0.05, atol=0.05)


def test_what_the_library_refuses_falls_back_whole(folder, images):
    """Weights that are computed have no type to look at before the model is opened."""
    expected = run(session(folder / "model.onnx"), images)

    def computed(model):
        (node,) = [node for node in model.graph.node if node.domain]
        (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == node.input[1]]
        array = numpy_helper.to_array(weight).astype(np.float16)
        weight.CopyFrom(numpy_helper.from_array(array, weight.name))
        del model.graph.value_info[:]
        for name, source, to in (("x_half", node.input[0], 10), ("w_half", weight.name, 10)):
            position = list(model.graph.node).index(node)
            model.graph.node.insert(position, onnx.helper.make_node("Cast", [source], [name], to=to))
        node.input[:] = ["x_half", "w_half"]
        result = node.output[0]
        node.output[0] = "y_half"
        position = list(model.graph.node).index(node)
        model.graph.node.insert(position + 1, onnx.helper.make_node("Cast", ["y_half"], [result], to=1))

    path = changed(folder, computed)
    opened = session(path)
    assert not opened.anncvt.native and "did not work" in opened.anncvt.why
    np.testing.assert_allclose(run(opened, images), expected, rtol=0.05, atol=0.05)
    with pytest.raises(AnncvtError, match="with the native library"):
        session(path, library=folder / onnx_native.LIBRARY)
