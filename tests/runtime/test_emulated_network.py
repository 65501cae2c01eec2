"""Whole networks compiled for 64-bit Arm, run by qemu's user emulation: the C++ example, on TVM's runtime for Arm."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")

import torch
from conftest import EXAMPLES
from emulated import EMULATOR, needs_emulator
from networks import Inverted
from quantized import adder_program, noise

from anncvt.passes.quantize import quantize
from anncvt.runtime import artifact, integer_network
from anncvt.runtime import tvm as runtime

COMPILER, SYSTEM = "aarch64-linux-gnu-g++", "/usr/aarch64-linux-gnu"
pytestmark = [
    pytest.mark.slow,
    needs_emulator,
    pytest.mark.skipif(not (shutil.which(COMPILER) and shutil.which("cmake")), reason=f"needs {COMPILER} and cmake"),
]
#: Without and with dot products of bytes.
CPUS = ["cortex-a72", "neoverse-n1"]


@pytest.fixture(scope="module")
def packages(request: pytest.FixtureRequest) -> Path:
    """TVM's packages for Arm, unpacked; downloaded once."""
    folder = (
        Path(request.config.cache.mkdir("aarch64")) if request.config.cache else pytest.skip("needs pytest's cache")
    )
    wanted = [f"{name}=={version(name)}" for name in ("apache-tvm", "apache-tvm-ffi")]
    place = folder / "-".join(wanted)
    if not place.is_dir():
        options = [
            "--no-deps",
            "--only-binary=:all:",
            "--platform=manylinux_2_28_aarch64",
            "-d",
            str(folder / "wheels"),
        ]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, *wanted], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"cannot download TVM for Arm: {done.stderr.strip().splitlines()[-1]}")
        for wheel in (folder / "wheels").iterdir():
            with zipfile.ZipFile(wheel) as archive:
                names = [n for n in archive.namelist() if n.endswith(("_runtime.so", "_ffi.so", ".h"))]
                archive.extractall(folder / "unpacked", names)
        (folder / "unpacked").rename(place)
        shutil.rmtree(folder / "wheels")
    return place


@pytest.fixture(scope="module")
def classify(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cpp")
    options = [f"-DCMAKE_CXX_COMPILER={COMPILER}", f"-DTVM={packages / 'tvm'}", f"-DTVM_FFI={packages / 'tvm_ffi'}"]
    for command in (["-S", EXAMPLES / "cpp", "-B", folder, *options], ["--build", folder]):
        done = subprocess.run(["cmake", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "classify"


@pytest.mark.parametrize("cpu", CPUS)
def test_networks_of_floats_and_of_integers(cpu: str, classify: Path, tmp_path: Path) -> None:
    program, target = adder_program(Inverted(), 8), f"llvm -mtriple=aarch64-linux-gnu -mcpu={cpu}"
    assert program.student is not None
    pixels = noise(5, (3, 8, 8), 1)
    images = pixels.batch(torch.arange(5), program.preprocess)

    def logits(model: Path, given: np.ndarray) -> np.ndarray:
        assert artifact.read_manifest(model)["target"]["architecture"] == "aarch64"
        given.tofile(tmp_path / "x.raw")
        command = [EMULATOR, "-cpu", cpu, "-L", SYSTEM, classify, model, tmp_path / "x.raw", "--logits"]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return np.array([line.split() for line in done.stdout.splitlines()], np.float64)

    with torch.no_grad():
        expected = copy.deepcopy(program.student).double()(images.double()).numpy()
    floats = runtime.compile(program, tmp_path / "model.so", target=target, batch=2)
    assert np.abs(logits(floats, images.numpy()) - expected).max() <= 1e-5 * np.abs(expected).max()

    network = quantize(program, noise(16, (3, 8, 8)))
    integers = runtime.compile_network(network, program.preprocess, tmp_path / "model.int8.so", target=target, batch=2)
    given = pixels.pixels.numpy()
    np.testing.assert_array_equal(logits(integers, given), integer_network.run(network, given))
