"""The latency table: who is in it, that figures are figures, and that nothing stays changed."""

from __future__ import annotations

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from tiny import SIZE, tiny_images, tiny_program

from anncvt.errors import AnncvtError
from anncvt.passes.quantize import quantize
from anncvt.runtime import contestants, integer_network, onnx, onnx_native
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
    contestants = [(row["network"], row["backend"], row["dtype"]) for row in measured["rows"]]
    floats = [(n, b, "float32") for n in ("student", "teacher") for b in ("torch", "onnxruntime")]
    assert contestants == [*floats, ("teacher", "onnxruntime", "int8")]
    for row in measured["rows"]:
        assert (row["batch"], row["threads"], row["runs"]) == (2, 1, 7)
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] < 10_000
        assert row["images_per_second"] == pytest.approx(2000 / row["p50_ms"], rel=0.01)
        assert row["memory_mb"] >= 0
    assert {name: reason[:12] for name, reason in measured["missing"].items()} == {
        "tvm": "not compiled",
        "tvm int8": "not compiled",
    }
    json.dumps(measured, allow_nan=False)


def test_ratio_is_against_the_teacher_in_onnxruntime(measured):
    for at, ratio in ((3, "ratio"), (4, "ratio_int8")):
        base = measured["rows"][at]
        assert base[ratio] == 1
        for row in measured["rows"]:
            assert row[ratio] == pytest.approx(row["p50_ms"] / base["p50_ms"], rel=0.01, abs=0.002)


@needs_tvm
def test_files_of_the_folder_are_timed_and_the_time_limit_keeps_one_burst(tmp_path, monkeypatch):
    from anncvt.runtime import tvm

    program = tiny_program(tmp_path)
    onnx.export(program, tmp_path / "model.onnx")
    tvm.compile(program, tmp_path / "model.so", fixed=False)
    network = quantize(program, tiny_images())
    tvm.compile_network(network, program.preprocess, tmp_path / "model.int8.so")
    monkeypatch.setattr(onnx, "export", None)  # the student must not be exported again
    result = bench(program, threads=1, repeats=1000, seconds=1e-6, teacher_in_tvm=True)
    names = [(row["network"], row["backend"], row["dtype"]) for row in result["rows"]]
    assert names[2:5] == [("student", "tvm", "float32"), ("student", "tvm", "int8"), ("teacher", "tvm", "float32")]
    assert {row["runs"] for row in result["rows"]} == {3}
    assert not result["missing"]


@needs_tvm
def test_fixed_point_is_told_from_floats(tmp_path):
    from anncvt.runtime import tvm

    program = tiny_program(tmp_path)
    try:
        path = tvm.compile(program, tmp_path / "model.so", fixed=True)
    except AnncvtError as error:
        pytest.skip(str(error))
    rows = bench(program, threads=1, repeats=1, seconds=1e-6)["rows"]
    fixed = tvm.load(path).manifest["target"]["fixed"]
    assert [row["dtype"] for row in rows if row["backend"] == "tvm"] == ["fixed16" if fixed else "float32"]


@needs_tvm
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_exported_files_are_timed_on_the_definitions_and_in_the_native_library(tmp_path):
    program = tiny_program(tmp_path)
    integer_network.save(quantize(program, tiny_images()), tmp_path)
    onnx.export(program, tmp_path / "model.onnx")
    onnx.export_integers(program, tmp_path / "model.int8.onnx", fuse=True)
    onnx_native.build([], tmp_path / onnx_native.LIBRARY, target="cpu")
    result = bench(program, threads=1, repeats=1, seconds=1e-6)
    exported = [(row["backend"], row["dtype"]) for row in result["rows"] if row["network"] == "student"][1:]
    fixed = onnx.session(tmp_path / "model.onnx", library=tmp_path / onnx_native.LIBRARY).anncvt.fixed
    natives = {"float32": "fixed16" if fixed else "float32", "int8": "int8"}
    assert exported == [pair for d, n in natives.items() for pair in (("onnxruntime", d), ("onnxruntime native", n))]
    assert set(result["missing"]) == {"tvm", "tvm int8"}
    (tmp_path / onnx_native.LIBRARY).unlink()  # this process has it mapped
    (tmp_path / onnx_native.LIBRARY).write_bytes(b"no library")
    missing = bench(program, threads=1, repeats=1, seconds=1e-6)["missing"]
    assert all(onnx_native.LIBRARY in missing[f"onnxruntime native{kind}"] for kind in ("", " int8"))


def test_the_quantised_teacher_computes_in_integers_what_it_did_in_floats(tmp_path):
    program = tiny_program()
    source = onnx.export_network(program.teacher, SIZE, tmp_path / "teacher.onnx")
    integers = onnx.session(contestants.quantised(source, tmp_path / "int8.onnx", SIZE))
    images = np.random.default_rng(0).standard_normal((8, *SIZE)).astype(np.float32)
    expected = onnx.run(onnx.session(source), images)
    found = onnx.run(integers, images)
    assert 0 < np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_what_onnxruntime_cannot_quantize_is_left_out(tmp_path):
    with pytest.raises(AnncvtError, match="onnxruntime cannot quantize"):
        contestants.quantised(tmp_path / "none.onnx", tmp_path / "int8.onnx", SIZE)


@pytest.mark.parametrize("argument", ["batch", "threads", "repeats", "seconds"])
def test_numbers_must_be_positive(argument):
    with pytest.raises(AnncvtError, match=f"{argument} is 0"):
        bench(tiny_program(), **{argument: 0})


def test_no_student():
    program = tiny_program()
    program.student = None
    with pytest.raises(AnncvtError, match="no adder network"):
        bench(program)


def test_on_another_device_torch_alone_takes_part(monkeypatch, tmp_path):
    """The base is then the CNN in torch."""
    ran_on = []

    def runner(network, device, progress):
        ran_on.append(str(device))
        return lambda images: np.zeros((len(images), 2), np.float32)

    monkeypatch.setattr("anncvt.runtime.torch_runner.runner", runner)
    result = bench(tiny_program(tmp_path), repeats=3, device="cuda:1")
    assert [(row["network"], row["backend"]) for row in result["rows"]] == [("student", "torch"), ("teacher", "torch")]
    assert ran_on == ["cuda:1"] * 2 and result["rows"][1]["ratio"] == 1
    assert set(result["missing"]) == {"onnxruntime", "tvm"} and result["settings"]["device"] == "cuda:1"
