"""The latency table: who is in it, that figures are figures, and that nothing stays changed."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from tiny import tiny_program

from anncvt.errors import AnncvtError
from anncvt.runtime import onnx
from anncvt.runtime.bench import bench

needs_tvm = pytest.mark.skipif(importlib.util.find_spec("tvm") is None, reason="TVM is not installed")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder without files: the student is exported for the occasion."""
    program = tiny_program(tmp_path_factory.mktemp("empty"))
    program.student.train()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        result = bench(program, batch=2, threads=1, repeats=7)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert program.student.training
    return result


def test_rows(measured):
    contestants = [(row["network"], row["backend"]) for row in measured["rows"]]
    assert contestants == [(n, b) for n in ("student", "teacher") for b in ("torch", "onnxruntime")]
    for row in measured["rows"]:
        assert (row["dtype"], row["batch"], row["threads"], row["runs"]) == ("float32", 2, 1, 7)
        assert 0 < row["p50_ms"] <= row["p90_ms"] < 10_000
    assert "compile" in measured["missing"]["tvm"]
    json.dumps(measured, allow_nan=False)


def test_ratio_is_against_the_teacher_in_onnxruntime(measured):
    base = measured["rows"][3]
    assert base["ratio"] == 1
    for row in measured["rows"]:
        assert row["ratio"] == pytest.approx(row["p50_ms"] / base["p50_ms"], rel=0.01, abs=0.002)


@needs_tvm
def test_files_of_the_folder_are_timed_and_the_time_limit_keeps_one_burst(tmp_path, monkeypatch):
    from anncvt.runtime import tvm

    program = tiny_program(tmp_path)
    onnx.export(program, tmp_path / "model.onnx")
    tvm.compile(program, tmp_path / "model.so")
    monkeypatch.setattr(onnx, "export", None)  # the student must not be exported again
    result = bench(program, threads=1, repeats=1000, seconds=1e-6)
    assert ("student", "tvm") in [(row["network"], row["backend"]) for row in result["rows"]]
    assert {row["runs"] for row in result["rows"]} == {3}
    assert not result["missing"]


@pytest.mark.parametrize("argument", ["batch", "threads", "repeats", "seconds"])
def test_numbers_must_be_positive(argument):
    with pytest.raises(AnncvtError, match=f"{argument} is 0"):
        bench(tiny_program(), **{argument: 0})


def test_no_student():
    program = tiny_program()
    program.student = None
    with pytest.raises(AnncvtError, match="no adder network"):
        bench(program)
