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

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """One small geometry."""
    monkeypatch.setattr(gpu, "LOW", (2, 4, 5, 1, 5, 2, 1, 1, 1))
    monkeypatch.setattr(gpu, "HIGH", (2, 4, 5, 1, 5, 2, 1, 1, 1))


@pytest.mark.slow
def test_every_section_runs_on_the_cpu(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert gpu.main(["--device", "cpu", "--quick", "--batch", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    assert {row["section"] for row in rows} == {"about", *gpu.SECTIONS}
    checked = [row for row in rows if "worst" in row]
    assert len(checked) == 3 and all(len(row["worst"]) == 6 for row in checked)
    assert all(took > 0 for row in rows if "Gtaps" in row and row["layer"] != "all" for took in row["ms"].values())
    assert all(row["images/s"] > 0 for row in rows if "network" in row)
    inference = [row["layers"] for row in rows if row["section"] == "inference" and "layers" in row]
    assert inference == ["conv", "adder", "adder, fused"]


def test_a_section_that_breaks_leaves_the_others(monkeypatch, capsys):
    def broken(*arguments):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(gpu, "correctness", broken)
    monkeypatch.setattr(gpu, "steps", lambda *_: iter([{"network": "none"}]))
    assert gpu.main(["--device", "cpu", "--sections", "correctness,steps", "--quick"]) == 3
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"section": "correctness", "failed": "RuntimeError: an illegal memory access"} in rows
    assert {"section": "steps", "network": "none"} in rows


@pytest.mark.parametrize("flaw", ["wrong", "racing"])
def test_flaws_are_found(monkeypatch, flaw):
    right, turns = gpu.op, []

    def op(*arguments):
        turns.append(1)
        return right(*arguments) * (1.01 if flaw == "wrong" or len(turns) % 2 else 1)

    monkeypatch.setattr(gpu, "op", op)
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
    monkeypatch.setattr(gpu.torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(gpu.kernels, "usable", lambda x: False)
    monkeypatch.setattr("anncvt.runtime.kernels.cuda.obstacle", lambda device: "not prebuilt for sm_90")
    (row,) = gpu.run(torch.device("cuda"), ["layers"], True, 1)
    assert row["failed"] == "not prebuilt for sm_90"


def test_tvm_is_not_needed():
    program = (
        "import sys; sys.modules['tvm'] = None; sys.path.insert(0, 'benchmarks'); import gpu;"
        "import anncvt.runtime.kernels.cuda.launch, anncvt.runtime.kernels.cuda.trial;"
        "sys.exit(gpu.main(['--device', 'cpu', '--sections', 'limit']))"
    )
    root = Path(gpu.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
