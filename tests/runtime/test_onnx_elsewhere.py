"""The native library in other programs: C++ without Python, under valgrind, in other versions of onnxruntime."""

import os
import re
import shutil
import subprocess
import venv
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from networks import ZeroPadded
from quantized import adder_program, noise
from test_onnx_fuse import SIZE, Block, settled

from anncvt.passes.quantize import quantize
from anncvt.runtime import integer_network, onnx_native
from anncvt.runtime.onnx import export_integers, export_network, run, session

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")]

ROOT = Path(__file__).parent.parent.parent
BATCH = 3
#: Models and the sizes of their images.
MODELS = {"plain": SIZE, "fused": SIZE, "integers": (3, 8, 8)}
#: A library without compiled kernels, and one in 16-bit fixed point.
LOOPS = "loops.so"
FIXED = "fixed.so"
#: The oldest that the project supports, and the newest that there is.
VERSIONS = ["onnxruntime==1.19.*", "onnxruntime"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The models, of floats plain and fused, of integers fused, with a library for all, images and logits."""
    folder = tmp_path_factory.mktemp("elsewhere")
    torch.manual_seed(0)
    network = settled(Block())
    models = [export_network(network, SIZE, folder / f"{name}.onnx", fuse=name == "fused") for name in list(MODELS)[:2]]
    program = adder_program(ZeroPadded(), 8)
    program.folder = str(folder)
    integer_network.save(quantize(program, noise(16, MODELS["integers"])), folder)
    models.append(export_integers(program, folder / "integers.onnx", opset=18, fuse=True))
    # valgrind knows no AVX-512.
    target = "avx2" if "avx2" in cpu_flags() else "cpu"
    onnx_native.build(models, folder / onnx_native.LIBRARY, target=target)
    if target == "avx2":
        onnx_native.build(models, folder / FIXED, target=target, fixed=True)
    onnx_native.build([], folder / LOOPS, target="cpu")
    for path in models:
        images = np.random.default_rng(0).normal(size=(BATCH, *MODELS[path.stem])).astype(np.float32)
        images.tofile(path.with_suffix(".bin"))
        np.savez(path.with_suffix(".npz"), images=images, logits=run(session(path, library="none"), images))
    return folder


def cpu_flags() -> set[str]:
    return set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())


@pytest.fixture(scope="module")
def program(folder):
    compiler = shutil.which("c++") or pytest.skip("needs a C++ compiler")
    source, program = ROOT / "tests" / "run_onnx.cpp", folder / "run_onnx"
    command = [compiler, "-O1", "-g", f"-I{ROOT}/runtime/ort", "-o", program, source, "-ldl"]
    subprocess.run(command, check=True)
    return program


def command(program, folder, model, threads, library=onnx_native.LIBRARY):
    (shared,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so*")
    numbers = [threads, BATCH, *MODELS[model]]
    files = [folder / f"{model}.bin", folder / "out.bin"]
    return list(map(str, [program, shared, folder / library, folder / f"{model}.onnx", *numbers, *files]))


def assert_logits(folder, model, precision=1e-4):
    expected = np.load(folder / f"{model}.npz")["logits"]
    actual = np.fromfile(folder / "out.bin", np.float32).reshape(expected.shape)
    tolerance = 0 if model == "integers" else precision * np.abs(expected).max()
    assert np.abs(actual - expected).max() <= tolerance


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_from_cpp(program, folder, model, threads):
    done = subprocess.run(command(program, folder, model, threads), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_logits(folder, model)


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("library", [onnx_native.LIBRARY, LOOPS, FIXED])
def test_under_valgrind(program, folder, model, library):
    """No wrong access and no leak that the library has a part in (onnxruntime's own are not ours to judge)."""
    if not (folder / library).exists():
        pytest.skip("fixed point needs AVX2")
    options = ["--leak-check=full", "--show-leak-kinds=definite,indirect,possible", "--num-callers=40"]
    done = subprocess.run(
        ["valgrind", *options, *command(program, folder, model, 2, library)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_logits(folder, model, 1e-3 if library == FIXED else 1e-4)
    assert "ERROR SUMMARY" in done.stderr
    assert not re.findall(rf"(?:at|by) 0x\w+: .*{re.escape(library)}.*", done.stderr)


SCRIPT = """
import sys
import numpy as np
import onnxruntime
folder, library = sys.argv[1:]
for model in ("plain", "fused", "integers"):
    stored = np.load(f"{folder}/{model}.npz")
    images, expected = stored["images"], stored["logits"]
    for registered in (False, True):
        options = onnxruntime.SessionOptions()
        if registered:
            options.register_custom_ops_library(library)
        session = onnxruntime.InferenceSession(f"{folder}/{model}.onnx", options, providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {"image": images})
        assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max(), (model, registered)
print(onnxruntime.__version__)
"""


@pytest.mark.parametrize("requirement", VERSIONS)
def test_other_versions(folder, tmp_path, requirement):
    venv.create(tmp_path, with_pip=True)
    python = tmp_path / "bin" / "python"
    installed = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", requirement, "numpy"], capture_output=True, text=True
    )
    if installed.returncode:
        pytest.skip(f"{requirement} cannot be installed here: {installed.stderr.strip().splitlines()[-1]}")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", SCRIPT, folder, folder / onnx_native.LIBRARY],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(re.sub(r"^onnxruntime(==)?|\*$", "", requirement))
