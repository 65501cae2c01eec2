import pytest
from rich.console import Console

from anncvt import api, report


def text(table) -> str:
    console = Console(width=160, file=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.mark.parametrize(
    ("number", "shown"), [(0, "0"), (999, "999"), (1000, "1 k"), (41_213_000, "41.2 M"), (4.1e9, "4.1 G")]
)
def test_count(number, shown):
    assert report.count(number) == shown


def test_accuracy():
    measured = {"student": {"top1": 86.5, "top5": 99.0}, "teacher": {"top1": 88.0, "top5": 99.5}}
    shown = text(report.accuracy({**measured, "images": 10, "data": "x [y]"}))
    assert "86.50" in shown and "1.50" in shown and "10 images of x [y]" in shown
    alone = text(report.accuracy({"teacher": measured["teacher"], "images": 10, "data": "x"}))
    assert "student" not in alone


def test_parity_and_latency():
    row = {"ok": False, "max_abs": 0.5, "max_rel": 0.1, "top1_agreement": 99.0}
    result = {
        "ok": False,
        "backends": {"tvm": row},
        "missing": {"onnxruntime": "is not here"},
        "images": 3,
        "data": "x",
    }
    shown = text(report.parity(result))
    assert "NOT equal" in shown and "99.00" in shown and "onnxruntime is not here" in shown
    rows = [
        {"network": name, "backend": "torch", "dtype": "float32", "batch": 1, "threads": 2}
        | dict.fromkeys(("p50_ms", "p90_ms", "p99_ms"), ms)
        | {"images_per_second": 1000 / ms, "memory_mb": None, "ratio": ms / 2, "ratio_int8": None}
        for name, ms in (("teacher", 2.0), ("student", 1.0))
    ]
    shown = text(report.latency({"rows": rows, "missing": {}, "settings": {}}))
    assert shown.index("student") < shown.index("teacher"), "the fastest first"
    assert "batch 1, threads 2" in shown and "0.50x" in shown and "1000.0" in shown


def test_program(converted):
    program = api.load(converted)
    facts = report.summary(program)
    assert facts["files"]["student.safetensors"] == (converted / "student.safetensors").stat().st_size
    assert facts["input_size"] == [1, 16, 16] and facts["totals"]["swapped"] == 7
    shown = text(report.program(facts))
    assert "digits_net:DigitsNet" in shown and "7 of 8 convolutions" in shown and "calibrate digits" in shown
