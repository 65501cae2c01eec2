"""The sweep's own machinery, on rows made up for it and one network of torch's own classes."""

import json
import sys
from pathlib import Path

import pytest

from anncvt import zoo

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import coverage


def row(model, status, **more):
    return {"model": model, "status": status, "seconds": 1.0, **more}


@pytest.fixture(autouse=True)
def versions(monkeypatch):
    """Of packages that need not be installed here."""
    monkeypatch.setattr("importlib.metadata.version", lambda package: "1.2.3")


ROWS = [
    row(
        "timm:good",
        "converted",
        parameters=2_500_000,
        input=[3, 64, 64],
        swapped=9,
        convolutions=12,
        swapped_share=0.75,
        inserted=2,
        kept=["stem: it reads the image", "depthwise"],
        equal=1,
        run=True,
        onnx="exported",
        onnx_difference=2e-6,
    ),
    row("timm:flat", "refused", reason="nothing to convert: a | b", linear=0.99),
    row("torchvision:giant", "left out", reason="more than 150 M parameters"),
    row("torchvision:bad", "failed", reason="KeyError: 'x'", step="rewrite"),
]


def test_the_document_names_what_failed_and_counts_the_rest():
    shown = coverage.document({r["model"]: r for r in ROWS}, ["timm:later"])
    assert "| torchvision | 2 | 0 | 0 | 0 | 1 | 1 |" in shown and "| timm | 2 | 1 | 1 | 1 | 0 | 0 |" in shown
    assert "| torchvision:bad | KeyError: 'x' (at: rewrite) |" in shown
    assert "nothing to convert: a \\| b | 99% |" in shown
    assert "| timm:good | 2.5 | 3x64x64 | yes | 9 of 12 | 75% | 2 |  | stem; depthwise |" in shown
    assert "1 of a sample of 1" in shown and "1 give torch's outputs" in shown
    assert "not measured yet: timm:later" in shown


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(coverage, "OUT", tmp_path)
    monkeypatch.setattr(coverage, "ROWS", tmp_path / "rows.jsonl")
    monkeypatch.setattr(coverage, "NAMES", tmp_path / "names.json")
    monkeypatch.setattr(coverage, "DOCUMENT", tmp_path / "coverage.md")
    (tmp_path / "names.json").write_text(json.dumps(["timm:a", "timm:b", "timm:c"]))
    return tmp_path


class Worker:
    def __init__(self):
        self.asked = []

    def examine(self, name):
        self.asked.append(name)
        if name == "timm:c":
            raise KeyboardInterrupt
        return row(name, "refused", reason="no")


def test_a_cut_run_goes_on(place, monkeypatch):
    worker = Worker()
    monkeypatch.setattr(coverage, "_Worker", lambda *options: worker)
    monkeypatch.setattr(sys, "argv", ["coverage.py"])
    with pytest.raises(KeyboardInterrupt):
        coverage.main()
    assert worker.asked == ["timm:a", "timm:b", "timm:c"] and set(coverage.measured()) == {"timm:a", "timm:b"}
    worker.examine = lambda name: row(name, "failed", reason="x")
    assert coverage.main() == 1, "something failed"
    assert "| timm:c | x |" in (place / "coverage.md").read_text()


def test_networks_that_break_are_rows_not_tracebacks(monkeypatch):
    monkeypatch.setenv("ANNCVT_KERNELS", "torch")
    if not zoo.names("torchvision"):
        pytest.skip("torchvision is not installed")
    assert coverage.examine("torchvision:no_such")["status"] == "refused"
    found = coverage.examine("torchvision:squeezenet1_1")
    assert found["status"] == "converted" and found["equal"] >= 1 and found["inserted"] == found["swapped"]
