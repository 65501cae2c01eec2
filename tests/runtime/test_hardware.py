"""The package: complete, self-consistent, and right when programs in other languages read it."""

import hashlib
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from networks import Inverted, Joined, Residual, Shuffled, ZeroPadded
from quantized import adder_program, noise

from anncvt.errors import AnncvtError
from anncvt.passes.choice import Choice
from anncvt.passes.quantize import QuantizeConfig, quantize
from anncvt.runtime import hardware, integer_network

IMAGES = noise(2, (3, 8, 8), 5).pixels.numpy()
CONFIGS = {
    "plain": (Residual, QuantizeConfig()),
    "zero-padded": (ZeroPadded, QuantizeConfig(bits=4)),
    "inverted": (Inverted, QuantizeConfig(bits=6, groups=2)),
    "concatenations": (Joined, QuantizeConfig(bits=5)),
    "shuffled channels": (Shuffled, QuantizeConfig()),
    "two weights per input": (Residual, QuantizeConfig(), 2),
}


@pytest.fixture(scope="module", params=CONFIGS)
def network(request):
    cnn, config, *copies = CONFIGS[request.param]
    program = adder_program(cnn(), 8, choice=Choice.of(copies=copies[0] if copies else 1))
    return quantize(program, noise(32, (3, 8, 8)), config)


@pytest.fixture(scope="module")
def package(network, tmp_path_factory):
    return hardware.export(network, tmp_path_factory.mktemp("package") / "out", IMAGES, about={"model": "tiny"})


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The C program, built as a stranger would, strictly."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler (cc) here")
    program = tmp_path_factory.mktemp("reference") / "reference"
    source = hardware.CHIP / "reference.c"
    strict = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O1", "-fsanitize=undefined,address"]
    subprocess.run([compiler, *strict, "-o", program, source], check=True)
    return program


def verdict(reference, package):
    return subprocess.run([reference, package], capture_output=True, text=True, timeout=120)


def test_the_c_program_reproduces_every_layer(network, package, reference):
    shown = verdict(reference, package)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert f"2 images, {len(network.steps)} layers each: {2 * len(network.steps)} equal, 0 different" in shown.stdout


@pytest.mark.parametrize("kind", ["accumulator", "output"])
def test_the_c_program_notices_a_single_wrong_number(package, reference, tmp_path, kind):
    copy = shutil.copytree(package, tmp_path / "copy")
    file = sorted((copy / "golden" / "001").glob(f"*.{kind}.hex"))[-1]
    lines = file.read_text().splitlines()
    lines[-1] = f"{(int(lines[-1], 16) + 1) % 16 ** len(lines[-1]):0{len(lines[-1])}x}"
    file.write_text("\n".join(lines) + "\n")
    shown = verdict(reference, copy)
    assert shown.returncode == 1 and file.name in shown.stdout


def test_the_c_program_tells_what_is_missing(package, reference, tmp_path):
    copy = shutil.copytree(package, tmp_path / "copy")
    (copy / "table.hex").write_text("00\n")
    shown = verdict(reference, copy)
    assert shown.returncode == 2 and "table" in shown.stderr
    assert verdict(reference, tmp_path / "nothing").returncode == 2


def test_golden_logits_are_those_of_the_network(network, package):
    golden = np.load(package / "golden" / "golden.npz")
    logits = golden[f"{network.steps[-1].name}/output"].reshape(2, -1)
    assert np.array_equal(logits, integer_network.run(network, IMAGES))
    assert np.array_equal(golden["pixels"], IMAGES)
    assert {f"{step.name}/accumulators" in golden for step in network.steps if step.epilogue} == {True}


def test_the_manifest_accounts_for_every_file(network, package):
    manifest = json.loads((package / "manifest.json").read_text())
    found = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == found - {"manifest.json"}
    for name, entry in manifest["files"].items():
        content = (package / name).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (entry["sha256"], entry["bytes"])
    rows = {row["name"]: row for row in manifest["steps"]}
    for step in network.steps:
        if step.op == "adder":
            row, taps = rows[step.name], int(np.prod(step.weight.shape[1:]))
            bound = network.step(step.inputs[0]).grid.bits + 1 + int(np.ceil(np.log2(taps)))
            assert row["accumulator_bits"] <= max(bound, 9 + int(np.ceil(np.log2(taps))))
    assert manifest["model"] == "tiny"


def test_arrays_are_the_same_in_every_form(network, package):
    arrays = np.load(package / "network.npz")
    header = (package / "network.h").read_text()
    step = next(step for step in network.steps if step.op == "adder")
    assert np.array_equal(arrays[f"{step.name}/weight"], step.weight)
    file = next((package / "layers").glob(f"*_{step.name}.weight.hex"))
    numbers = [int(line, 16) for line in file.read_text().split()]
    assert numbers == step.weight.ravel().tolist()
    name = f"layer_{network.steps.index(step):03d}_{step.name.replace('.', '_')}_weight"
    listed = re.search(rf"{name}\[\d+\] = {{\n(.*?)}};", header, re.DOTALL)
    assert [int(number) for number in re.findall(r"\d+", listed[1])] == numbers


def test_the_header_compiles(package, tmp_path):
    compiler = shutil.which("cc") or pytest.skip("no C compiler (cc) here")
    source = tmp_path / "use.c"
    source.write_text('#include "network.h"\nint main(void) { return input_table[0] == 256; }\n')
    subprocess.run([compiler, "-std=c99", "-Werror", f"-I{package}", "-o", tmp_path / "use", source], check=True)


def test_a_package_replaces_a_package_and_nothing_else(network, package, tmp_path):
    copy = shutil.copytree(package, tmp_path / "copy")
    (copy / "layers" / "stray.hex").write_text("00")
    hardware.export(network, copy, IMAGES[:1])
    assert not (copy / "layers" / "stray.hex").exists() and not (copy / "golden" / "001").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    with pytest.raises(AnncvtError, match="something else"):
        hardware.export(network, other, IMAGES)
    assert (other / "thesis.tex").read_text() == "precious" and len(list(tmp_path.iterdir())) == 2


def test_no_images_is_told(network, tmp_path):
    with pytest.raises(AnncvtError, match="golden"):
        hardware.export(network, tmp_path / "out", IMAGES[:0])


@pytest.mark.slow
def test_the_verilog_layer_reproduces_its_golden_vectors(network, package, tmp_path):
    """Simulated with Icarus; a wrong weight must show."""
    if shutil.which("iverilog") is None:
        pytest.skip("Icarus Verilog (iverilog) is not installed")
    if hardware.testbench_step(network) is None:
        assert not (package / "verilog").exists()
        return
    copy = shutil.copytree(package, tmp_path / "copy")
    assert "PASS" in simulated(copy)
    weight = next(line for line in (copy / "verilog" / "layer.vh").read_text().splitlines() if "WEIGHT_FILE" in line)
    file = (copy / "verilog" / weight.split('"')[1]).resolve()
    lines = file.read_text().splitlines()
    lines[0] = f"{int(lines[0], 16) ^ 1:02x}"
    file.write_text("\n".join(lines) + "\n")
    assert "FAIL" in simulated(copy)


def simulated(package):
    folder = package / "verilog"
    build = ["iverilog", "-g2005", "-Wall", "-o", "layer", "adder_layer.v", "adder_layer_tb.v"]
    subprocess.run(build, cwd=folder, check=True, capture_output=True, timeout=120)
    return subprocess.run(["vvp", "layer"], cwd=folder, capture_output=True, text=True, timeout=600).stdout
