"""Exported files in the oldest and the newest onnxruntime that is supported, each in an environment of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import Residual
from quantized import adder_program, noise

from anncvt.passes.quantize import quantize
from anncvt.runtime import integer_network
from anncvt.runtime.onnx import export, export_integers
from anncvt.runtime.onnx_body import BODIES, OPSETS

ROOT = Path(__file__).parents[2]
#: Opsets that the oldest onnxruntime does not know yet.
LATER = (22, 23)
IMAGES = noise(3, (3, 8, 8), 5)
RUN = """
import json, sys
import numpy, onnxruntime
found = {}
images = numpy.load(sys.argv[1])
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
for path in sys.argv[2:]:
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        found[path] = session.run(["logits"], {"image": images})[0].tolist()
    except Exception as error:
        found[path] = str(error)
print(json.dumps({"version": onnxruntime.__version__, "found": found}))
"""


def oldest() -> str:
    """As pyproject.toml says."""
    stated = re.search(r'"onnxruntime>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert stated is not None
    return stated[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files by kind, body and opset, images, and the logits of both kinds."""
    folder = tmp_path_factory.mktemp("exported")
    program = adder_program(Residual(), 8)
    program.folder = str(folder)
    network = quantize(program, noise(16, (3, 8, 8)))
    integer_network.save(network, folder)
    paths = {}
    for opset in OPSETS:
        for body in BODIES:
            target = folder / f"integers-{body}-{opset}.onnx"
            paths["integers", body, opset] = export_integers(program, target, opset=opset, body=body)
    for body, opset in [("scan", 18), ("one", 18), ("scan", 21), ("scan", 23)]:
        paths["floats", body, opset] = export(program, folder / f"floats-{body}-{opset}.onnx", opset=opset, body=body)
    images = IMAGES.batch(torch.arange(3), program.preprocess)
    np.save(folder / "images.npy", images.numpy())
    with torch.no_grad():
        floats = program.student(images).numpy()
    integers = integer_network.run(network, IMAGES.pixels.numpy()) * np.float32(network.steps[-1].grid.scale)
    return folder / "images.npy", paths, {"floats": floats, "integers": integers}


@pytest.mark.slow
@pytest.mark.parametrize("requirement", [f"onnxruntime=={oldest()}.0", "onnxruntime"], ids=["oldest", "newest"])
def test_files_run_in(requirement, files, tmp_path):
    images, paths, expected = files
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    installed = subprocess.run([python, "-m", "pip", "install", "-q", requirement], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"cannot install {requirement} here: {installed.stderr.strip().splitlines()[-1]}")
    command = [python, "-c", RUN, images, *paths.values()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": ""})
    told = json.loads(done.stdout)
    for (kind, body, opset), path in paths.items():
        found, where = told["found"][str(path)], f"onnxruntime {told['version']}: {kind}, {body}, opset {opset}"
        if opset in LATER and told["version"].startswith(oldest()):
            assert isinstance(found, str) and "opset" in found.lower(), where
        elif kind == "integers":
            np.testing.assert_array_equal(np.array(found, np.float32), expected[kind], where)
        else:
            np.testing.assert_allclose(np.array(found), expected[kind], atol=1e-5, err_msg=where)
