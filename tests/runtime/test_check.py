"""Parity between backends: agreement is found, disagreement is found, and neither is confused with a broken file."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from tiny import SIZE, tiny_images, tiny_program

from anncvt.errors import AnncvtError
from anncvt.runtime import check as check_module
from anncvt.runtime import onnx
from anncvt.runtime.check import check

needs_tvm = pytest.mark.skipif(importlib.util.find_spec("tvm") is None, reason="TVM is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A program folder with its exported model."""
    folder = tmp_path_factory.mktemp("tiny")
    onnx.export(tiny_program(), folder / "model.onnx")
    return folder


def test_agreement(folder):
    result = check(tiny_program(folder), tiny_images())
    assert result["ok"] and result["images"] == 9
    row = result["backends"]["onnxruntime"]
    assert row["ok"] and row["top1_agreement"] == 100 and row["max_rel"] < 1e-5
    assert row["max_abs"] > 0 or row["max_rel"] == 0
    assert "compile" in result["missing"]["tvm"]
    json.dumps(result, allow_nan=False)


@needs_tvm
def test_both_backends(folder, tmp_path):
    from anncvt.runtime import tvm

    program = tiny_program(folder)
    library = tvm.compile(program, tmp_path / "model.so")
    result = check(program, tiny_images(), so_path=library)
    assert result["ok"] and set(result["backends"]) == {"onnxruntime", "tvm"} and not result["missing"]
    assert result["backends"]["tvm"]["max_rel"] < 5e-4


@needs_tvm
def test_several_weights_per_input_in_both_backends(tmp_path):
    from anncvt.runtime import tvm

    program = tiny_program(tmp_path, copies=3)
    onnx.export(program, tmp_path / "model.onnx")
    result = check(program, tiny_images(), so_path=tvm.compile(program, tmp_path / "model.so"))
    assert result["ok"] and set(result["backends"]) == {"onnxruntime", "tvm"}


def test_one_image(folder):
    result = check(tiny_program(folder), tiny_images(1))
    assert result["ok"] and result["backends"]["onnxruntime"]["top1_agreement"] == 100


def test_every_image_is_compared_once_and_the_first_alone(folder, monkeypatch):
    sizes = []
    run = onnx.run
    monkeypatch.setattr(onnx, "run", lambda session, images: (sizes.append(len(images)), run(session, images))[1])
    check(tiny_program(folder), tiny_images(2 * check_module.BATCH + 4))
    assert sizes == [1, check_module.BATCH, check_module.BATCH, 3]


def test_disagreement_is_a_result(folder):
    """Other weights than those exported: the result says no, and by how much."""
    program = tiny_program(folder)
    with torch.no_grad():
        program.student[7].bias += torch.tensor([0.0, 0.0, 0.0, 100.0])
    result = check(program, tiny_images())
    row = result["backends"]["onnxruntime"]
    assert not result["ok"] and not row["ok"]
    assert row["max_abs"] == pytest.approx(100, abs=1e-3) and row["top1_agreement"] < 100


@pytest.mark.parametrize("where", ["backend", "reference", "both"])
def test_not_a_number_is_a_failure(folder, monkeypatch, where):
    program = tiny_program(folder)
    if where != "backend":
        with torch.no_grad():
            program.student[7].bias[0] = np.nan
    if where != "reference":
        monkeypatch.setattr(onnx, "run", lambda session, images: np.full((len(images), 4), np.nan, np.float32))
    result = check(program, tiny_images())
    assert not result["ok"]
    assert result["backends"]["onnxruntime"]["max_abs"] == np.inf
    assert result["backends"]["onnxruntime"]["top1_agreement"] == 0


def test_a_difference_above_the_tolerance_fails_with_equal_classes(folder, monkeypatch):
    run = onnx.run
    monkeypatch.setattr(onnx, "run", lambda session, images: run(session, images) * np.float32(1.002))
    row = check(tiny_program(folder), tiny_images())["backends"]["onnxruntime"]
    assert row["top1_agreement"] == 100 and not row["ok"] and row["max_rel"] == pytest.approx(2e-3, rel=0.01)


#: Logits of an image whose second class is best; the first is below it by 2e-4 of the range, the fourth by 2e-2.
TIE = [9.998, 10.0, 0.0, 9.8]


@pytest.mark.parametrize(
    ("offset", "first", "agreement"),
    [
        ([0.003, -0.003, 0, 0], TIE, 100),  # the first class, which ties
        ([-0.5, -0.5, 0, 0], TIE, 0),  # the fourth, which does not
        ([0, 0, 20, 0], TIE, 0),  # the worst
        ([0.003, -0.003, 0, 0], [value - 1000 for value in TIE], 100),
        # Within 1e-3 of the largest logit, but not of the range.
        ([0.03, -0.03, 0, 0], [value - 1000 for value in [9.95, 10.0, 0.0, 9.8]], 0),
        ([-1, 0, 0, 0], [5.0, 5.0, 5.0, 5.0], 100),  # all tie
        ([np.nan, 0, 0, 0], TIE, 0),
        ([0, 0, np.nan, 0], TIE, 0),
        ([np.inf, 0, 0, 0], TIE, 0),
    ],
)
def test_classes_that_tie(folder, monkeypatch, offset, first, agreement):
    """Either will do; the agreement says nothing of the size of the difference, which has to be small all the same."""
    program = tiny_program(folder)
    with torch.no_grad():
        program.student[7].weight.zero_()
        program.student[7].bias.copy_(torch.tensor(first))
    logits = np.array(first, np.float32) + np.array(offset, np.float32)
    monkeypatch.setattr(onnx, "run", lambda session, images: np.tile(logits, (len(images), 1)))
    result = check(program, tiny_images())
    row = result["backends"]["onnxruntime"]
    assert row["top1_agreement"] == agreement
    assert result["ok"] == row["ok"] == (agreement == 100 and row["max_rel"] < check_module.TOLERANCE)


def test_student_in_training_mode_is_checked_in_eval_mode(folder):
    program = tiny_program(folder)
    program.student.train()
    assert check(program, tiny_images())["ok"]
    assert program.student.training


def refusal(*args, **kwargs):
    with pytest.raises(AnncvtError) as caught:
        check(*args, **kwargs)
    assert caught.value.fix
    return str(caught.value)


def test_nothing_to_compare(tmp_path):
    assert "nothing to compare" in refusal(tiny_program(tmp_path), tiny_images())
    assert "nothing to compare" in refusal(tiny_program(), tiny_images())


def test_no_student(folder):
    program = tiny_program(folder)
    program.student = None
    assert "no adder network" in refusal(program, tiny_images())


def test_no_images(folder):
    assert "no images" in refusal(tiny_program(folder), tiny_images(0))


def test_a_named_file_must_exist(folder, tmp_path):
    assert "no such file" in refusal(tiny_program(folder), tiny_images(), onnx_path=tmp_path / "other.onnx")


def test_file_of_another_network(tmp_path):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 7))
    path = onnx.export_network(network, SIZE, tmp_path / "model.onnx")
    assert "[1, 7]" in refusal(tiny_program(), tiny_images(), onnx_path=path)
