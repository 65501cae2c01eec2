"""The C++ example: it builds against the wheel's headers, gives Python's logits, and says what is wrong."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")

import torch
from conftest import EXAMPLES
from torch import nn

from anncvt.program import Preprocess
from anncvt.runtime import artifact, processor
from anncvt.runtime import tvm as runtime
from anncvt.runtime.integer import Epilogue, Grid, Step
from anncvt.runtime.integer_network import INPUT, IntegerNetwork

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("cmake") and shutil.which("c++")), reason="needs cmake and a C++ compiler (c++)"
    ),
]
PREPROCESS = Preprocess((3, 4, 5), (0.5, 0.4, 0.3), (0.2,))
CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox"]
RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cpp")
    for command in (
        ["-S", EXAMPLES / "cpp", "-B", folder, f"-DPython3_EXECUTABLE={sys.executable}"],
        ["--build", folder],
    ):
        done = subprocess.run(["cmake", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "classify"


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, (4, 5)), nn.Flatten())
    path = tmp_path_factory.mktemp("floats") / "model.so"
    return runtime.compile_network(network, PREPROCESS, path, batch=2, about={"classes": CLASSES})


@pytest.fixture(scope="module")
def integers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weight = RANDOM.integers(0, 256, (6, 3, 4, 5)).astype(np.uint8)
    end = Epilogue(np.full(6, 300, np.int32), np.arange(6) << 20, 4, -(2**31), 2**31 - 1)
    group = np.zeros(6, np.uint8)
    shape, grid = (6, 1, 1), Grid(0.25, 0, 32)
    step = Step("end", "adder", (INPUT,), shape, grid, weight=weight, filter_group=group, pad_values=(0,), epilogue=end)
    table = RANDOM.permuted(np.tile(np.arange(256, dtype=np.uint8), (3, 1)), axis=1)
    network = IntegerNetwork((step,), (3, 4, 5), Grid(1.0, 0), table, {"bits": 8})
    path = tmp_path_factory.mktemp("integers") / "model.int8.so"
    return runtime.compile_network(network, PREPROCESS, path, batch=2)


def classify(built: Path, *arguments: object, code: int = 0) -> str:
    done = subprocess.run([built, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def logits(built: Path, *arguments: object) -> np.ndarray:
    return np.array([line.split() for line in classify(built, *arguments, "--logits").splitlines()], np.float64)


def test_tensors_give_the_logits_of_python(built, floats, integers, tmp_path):
    images = RANDOM.standard_normal((5, 3, 4, 5)).astype(np.float32)
    pixels = RANDOM.integers(0, 256, (5, 3, 4, 5)).astype(np.uint8)
    for model, given in ((floats, images), (integers, pixels)):
        given.tofile(tmp_path / "x.raw")
        expected = runtime.load(model)(given)
        printed = logits(built, model, tmp_path / "x.raw").astype(expected.dtype)
        np.testing.assert_array_equal(printed, expected)


def test_pictures(built, floats, integers, tmp_path):
    pixels = RANDOM.integers(0, 256, (1, 3, 4, 5)).astype(np.uint8)
    picture = tmp_path / "picture.ppm"
    picture.write_bytes(b"P6\n# a comment\n5 4\n255\n" + pixels[0].transpose(1, 2, 0).tobytes())
    np.testing.assert_array_equal(logits(built, integers, picture), runtime.load(integers)(pixels))
    channel = np.float64([0.5, 0.4, 0.3])[:, None, None]
    expected = runtime.load(floats)(((pixels / 255 - channel) / 0.2).astype(np.float32))[0]
    np.testing.assert_allclose(logits(built, floats, picture)[0], expected, rtol=1e-5)
    best = [line.split("\t") for line in classify(built, floats, picture).splitlines()]
    order = np.argsort(-expected)[:5]
    assert [name for name, _ in best] == [CLASSES[at] for at in order]
    np.testing.assert_allclose([float(value) for _, value in best], expected[order], rtol=1e-4)
    scaled = classify(built, integers, picture).split()
    assert float(scaled[1]) == pytest.approx(0.25 * runtime.load(integers)(pixels).max(), rel=1e-5)


def test_mistakes_are_told(built, floats, tmp_path):
    cut = tmp_path / "cut.so"
    cut.write_bytes(floats.read_bytes()[:-1])
    assert "cut off" in classify(built, cut, floats, code=1)
    odd = tmp_path / "odd.raw"
    odd.write_bytes(b"1234")
    assert "240 bytes" in classify(built, floats, odd, code=1)
    odd.write_bytes(b"P5 4 4 255\n" + bytes(16))
    assert "1x4x4, the network takes 3x4x5" in classify(built, floats, odd, code=1)
    assert "cannot read" in classify(built, floats, tmp_path / "none", code=1)
    assert "usage" in classify(built, floats, code=2)


def test_foreign_processors_are_named_before_any_code_runs(built, tmp_path):
    path = tmp_path / "model.so"
    path.write_bytes(b"not even a library")
    features = [*sorted(processor.features() or ()), "quantum"]
    target = {"architecture": processor.architecture(), "flags": processor.flags(features)}
    artifact.seal(path, {"target": target})
    assert "this processor lacks quantum" in classify(built, path, path, code=1)
    path.write_bytes(b"not even a library")
    artifact.seal(path, {"target": {**target, "architecture": "riscv64"}})
    assert "compiled for riscv64" in classify(built, path, path, code=1)
