"""The benchmark for GPUs, where there is none: its sections run on the CPU and find what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import gpu
import gpu_correctness
import resnets
from sass import disassembler, instructions

from anncvt.runtime.kernels.cuda import build

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """One small geometry."""
    monkeypatch.setattr(gpu_correctness, "LOW", (2, 4, 5, 1, 5, 2, 1, 1, 1))
    monkeypatch.setattr(gpu_correctness, "HIGH", (2, 4, 5, 1, 5, 2, 1, 1, 1))


@pytest.mark.slow
def test_every_section_runs_on_the_cpu(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert gpu.main(["--device", "cpu", "--quick", "--batch", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    assert {row["section"] for row in rows} == {"about", *gpu.SECTIONS, "aims"}
    checked = [row for row in rows if "worst" in row]
    assert len(checked) == 3 and all(len(row["worst"]) == 6 for row in checked)
    assert all(took > 0 for row in rows if "Gtaps" in row and row["layer"] != "all" for took in row["ms"].values())
    assert all(row["images/s"] > 0 for row in rows if "network" in row)
    inference = [row["layers"] for row in rows if row["section"] == "inference" and "layers" in row]
    assert inference == ["conv", "adder", "adder, fused"]
    assert list(rows[-1]) == [
        "section",
        "both ways, times a convolution's (at most 3)",
        "both ways, times as fast as cdist (20)",
        "ResNet-20 training, images/s (20000)",
    ]


def test_a_section_that_breaks_leaves_the_others(monkeypatch, capsys):
    def broken(*arguments):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(gpu, "correctness", broken)
    monkeypatch.setattr(gpu, "steps", lambda *_: iter([{"network": "none"}]))
    assert gpu.main(["--device", "cpu", "--sections", "correctness,steps", "--quick"]) == 3
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"section": "correctness", "failed": "RuntimeError: an illegal memory access"} in rows
    assert {"section": "steps", "network": "none"} in rows


@pytest.mark.slow
def test_the_cuda_kernels_pass_on_the_cpu(monkeypatch):
    """With the limits that GPUs are given, on layers as large as theirs."""
    emulator = pytest.importorskip("cuda_emulator", reason="needs TVM")
    if emulator.COMPILER is None:
        pytest.skip("g++ compiles the kernels for the CPU")
    from anncvt.runtime.kernels.cuda import launch

    monkeypatch.setattr(gpu_correctness, "LOW", (1, 1, 1, 1, 1, 1, 1, 0, 1))
    monkeypatch.setattr(gpu_correctness, "HIGH", (2, 70, 70, 3, 9, 3, 3, 2, 2))
    generator, results = torch.Generator().manual_seed(0), set()
    with emulator.in_the_ops_place():
        for at in range(18):
            dtype = (torch.float32, torch.float16, torch.bfloat16)[at % 3]
            case, tensors, config = gpu_correctness.drawn(generator, CPU, dtype)
            found = [*gpu_correctness.compared(*tensors, config, repeats=2)]
            found += gpu_correctness.compared_integers(launch.integer_forward, *tensors[:2], config, repeats=2)
            for result, error, limit in found:
                assert error <= limit, (case, result)
                results.add(result)
    assert results == {"forward", "fused", "full dx", "full dw", "exact dx", "exact dw", "uint8"}


@pytest.mark.parametrize("flaw", ["wrong", "racing"])
def test_flaws_are_found(monkeypatch, flaw):
    right, turns = gpu_correctness.op, []

    def op(*arguments):
        turns.append(1)
        return right(*arguments) * (1.01 if flaw == "wrong" or len(turns) % 2 else 1)

    monkeypatch.setattr(gpu_correctness, "op", op)
    rows = list(gpu.correctness(CPU, True))
    assert all(row["wrong"] for row in rows)
    monkeypatch.setattr(gpu, "correctness", lambda *_: iter(rows))
    assert gpu.main(["--device", "cpu", "--sections", "correctness", "--quick"]) == 3


def test_what_does_not_fit_the_time_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "layers", lambda *_: iter([{"layer": "first"}, {"layer": "second"}]))
    assert gpu.main(["--device", "cpu", "--sections", "layers,limit", "--minutes", "0"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row for row in rows if row["section"] == "layers"][:2] == [
        {"section": "layers", "layer": "first"},
        {"section": "layers", "out of time": True},
    ]
    # A type has one case at least.
    assert [row["cases"] for row in gpu.correctness(CPU, False, until=0.0)] == [1, 1, 1]


@pytest.mark.parametrize("arguments", [["--device", "cpu", "--sections", "speed"], ["--device", "cuda"]])
def test_what_cannot_be_run_is_told(arguments, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as error:
        gpu.main(arguments)
    assert error.value.code == 2
    assert "--sections takes correctness" in (told := capsys.readouterr().err) or "no GPU is visible" in told


def test_kernels_that_cannot_be_used_fail(monkeypatch):
    """Plain torch would be measured in their place, and be right."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(gpu, "compile_all", lambda device: {})
    monkeypatch.setattr("anncvt.runtime.kernels.cuda.obstacle", lambda device: "not prebuilt for sm_90")
    (row,) = gpu.run(torch.device("cuda"), ["layers"], True, 1)
    assert row["failed"] == "not prebuilt for sm_90"


def test_types_without_kernels_fail(monkeypatch):
    """Those of another type would be checked in their place, and be right."""
    monkeypatch.setattr(gpu_correctness, "obstacle_to", lambda device, dtype: "none" if dtype == "float16" else None)
    rows = list(gpu.correctness(CPU, True))
    assert [row.get("failed") for row in rows] == [None, "none", None]


def test_a_check_that_breaks_is_told():
    def broken(device):
        raise RuntimeError("no compiler\nat line 1")

    assert gpu_correctness.tried(broken, CPU) == "RuntimeError: no compiler"


def test_torch_compile_is_checked():
    assert gpu_correctness.compiled_agrees(CPU)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_matrix_product_is_the_full_weight_gradient(stride):
    layer = gpu.Layer(6, 8, 5, 1, stride)
    x, weight = torch.randn(3, 8, 6, 6), torch.randn(5, 8, 1, 1)
    grad = torch.randn(3, 5, 6 // stride, 6 // stride)
    expected = gpu.fallback.full_weight_gradient(grad, x, weight, [stride] * 2, [0, 0], [1, 1], 1)
    torch.testing.assert_close(gpu.by_product(grad, x, weight, layer), expected, rtol=1e-4, atol=1e-4)


def test_aims_are_ratios_of_the_rows():
    ms = {
        "adder float32": 5.0,
        "adder uint8": 1.25,
        "adder full, both ways": 60.0,
        "convolution, both ways": 30.0,
        "cdist, both ways": 3000.0,
    }
    rows = [
        {"section": "limit", "Gtaps/s": 16000.0},
        {"section": "layers", "layer": "first", "count": 3, "Gtaps": 64.0, "ms": ms},
        {"section": "layers", "layer": "second", "count": 1, "Gtaps": 64.0, "ms": ms | {"cdist, both ways": None}},
        {"section": "layers", "layer": "all", "Gtaps": 256.0, "ms": {}},
        {"section": "steps", "network": "ResNet-20", "layers": "conv", "MiB": 100.0, "images/s": 9e4},
        {"section": "steps", "network": "ResNet-20", "layers": "full", "MiB": 120.0, "images/s": 3e4},
    ]
    assert list(gpu.aims(rows).values()) == [0.8, 4.0, 2.0, 50.0, 1.2, 3e4]
    assert gpu.aims(rows[:1]) == {}


@pytest.mark.skipif(build.nvcc() is None and build._nvrtc() is None, reason="needs a compiler of CUDA")
@pytest.mark.skipif(disassembler() is None, reason="needs nvdisasm (package nvidia-cuda-nvdisasm)")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_limit_is_that_of_additions(arch, tmp_path):
    """Two a tap and one a turn of 16 taps, whose loop is repeated for several turns; then the sums."""
    found = instructions(build.compiled(gpu.LIMIT, arch), tmp_path)
    loops = [name for name in found if name.startswith(("FADD", "FFMA", "FMUL", "HADD", "LD"))]
    turns, rest = divmod(loops.count("FADD"), 33)
    assert turns >= 1 and rest < 33 and not any(name.startswith(("FFMA", "FMUL", "LDL")) for name in loops)


def test_the_networks_are_the_published_ones():
    sizes = [
        sum(p.numel() for p in make(torch.nn.Conv2d).parameters()) for make in (resnets.resnet20, resnets.resnet50)
    ]
    assert sizes == [269_722, 25_557_032]
    network = resnets.resnet50(resnets.NETWORKS["full"])
    assert sum(isinstance(module, resnets.AdderConv2d) for module in network.modules()) == 52


def test_only_torch_is_needed():
    """No TVM, no model collection, none of what the converter needs."""
    absent = ("tvm", "torchvision", "timm", "onnx", "onnxruntime", "click", "rich", "safetensors", "PIL")
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); sys.path.insert(0, 'benchmarks'); import gpu;"
        "import anncvt.runtime.kernels.cuda.launch, anncvt.runtime.kernels.cuda.trial;"
        "sys.exit(gpu.main(['--device', 'cpu', '--sections', 'limit']))"
    )
    root = Path(gpu.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
