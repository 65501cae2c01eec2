import pytest

from anncvt.errors import AnncvtError, GateError
from anncvt.measure import DataChoice, accuracy, chosen, gate, remember, remembered, require_parity
from anncvt.program import Preprocess, Program, Source


@pytest.fixture
def program():
    from networks import Residual

    return Program(Source("x"), Preprocess((3, 8, 8), (0.0,), (1.0,)), Residual())


def test_data_are_remembered_by_absolute_path(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert remembered(program) is None
    remember(program, calibrate=DataChoice("folder:photos", limit=7), distill=None)
    assert remembered(program) == DataChoice(f"folder:{tmp_path / 'photos'}")
    remember(program, calibrate=DataChoice("digits"), distill=DataChoice("cifar10", "data"))
    assert remembered(program) == DataChoice("cifar10", str(tmp_path / "data"))


def test_what_is_asked_for_comes_before_what_is_remembered(program):
    assert chosen(program, DataChoice(limit=3), "synthetic") == DataChoice("synthetic", limit=3)
    with pytest.raises(AnncvtError, match="no data"):
        chosen(program, DataChoice(limit=3))
    remember(program, calibrate=DataChoice("cifar10", "/data"))
    assert chosen(program, DataChoice(limit=3)) == DataChoice("cifar10", "/data", limit=3)
    assert chosen(program, DataChoice("digits")) == DataChoice("digits")


def test_accuracy_of_a_stage(program):
    assert accuracy(program) is None
    for stage, top1 in (("calibrated", 80.0), ("distilled", 85.0)):
        program.record("evaluated", 0.0, {"of": stage, "student": {"top1": top1}, "images": 10, "data": "x"})
    assert accuracy(program) == {"student": {"top1": 85.0}, "images": 10, "data": "x"}
    calibrated = accuracy(program, "calibrated")
    assert calibrated is not None and calibrated["student"]["top1"] == 80.0


@pytest.mark.parametrize(("student", "allowed"), [(80.0, True), (79.9, False), (95.0, True)])
def test_gate(student, allowed):
    measured = {"student": {"top1": student}, "teacher": {"top1": 90.0}}
    if allowed:
        gate(measured, 10)
    else:
        with pytest.raises(GateError, match=r"10\.10 points below"):
            gate(measured, 10)


def test_gate_needs_a_student():
    with pytest.raises(GateError, match="could not be checked"):
        gate({"teacher": {"top1": 90.0}}, 10)


def test_parity():
    require_parity({"ok": True, "backends": {}})
    with pytest.raises(GateError, match="tvm differ"):
        require_parity({"ok": False, "backends": {"onnxruntime": {"ok": True}, "tvm": {"ok": False}}})
