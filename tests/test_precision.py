"""16-bit fixed point unasked: kept where logits stay those of torch, float32 elsewhere, nothing half-written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from anncvt import precision
from anncvt.errors import AnncvtError
from anncvt.loading import load
from anncvt.passes.plan import plan
from anncvt.passes.rewrite import rewrite
from anncvt.progress import SILENT
from anncvt.runtime.contestants import Opened
from anncvt.runtime.inference import inference_copy


class Notes:
    """A progress that remembers its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.task = SILENT.task

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture
def program():
    torch.manual_seed(0)
    stem, norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
    body = (nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    network = nn.Sequential(stem, norm, *body).eval()
    return rewrite(plan(load(network, input_size=(3, 12, 12), mean=(0.5,) * 3, std=(0.5,) * 3)))


def written(program, folder, change, notes):
    """What :func:`precision.write` leaves for a library whose logits are those of torch times ``1 + change``."""
    student = inference_copy(program.student)

    def make(path, fixed):
        Path(path).write_text("fixed" if fixed is None else "float32", encoding="ascii")

    def opened(path):
        assert path.read_text(encoding="ascii") == "fixed"
        if change is None:
            return Opened(lambda images: pytest.fail("there is nothing to compare"))
        return Opened(lambda x: student(torch.from_numpy(x)).detach().numpy() * np.float32(1 + change), fixed=True)

    library = precision.write(program, folder / "model.so", make, opened, notes)
    assert [path.name for path in folder.iterdir()] == [library.name]
    return library.read_text(encoding="ascii")


@pytest.mark.parametrize(
    ("change", "left"), [(None, "fixed"), (1e-4, "fixed"), (2e-3, "float32"), (float("nan"), "float32")]
)
def test_kept_where_logits_stay_the_same(program, tmp_path, change, left):
    notes = Notes()
    assert written(program, tmp_path, change, notes) == left
    assert [note.startswith("compiled in float32") for note in notes.notes] == [True] * (left == "float32")


def test_nothing_is_written_where_making_it_fails(program, tmp_path):
    (tmp_path / "model.so").write_text("before", encoding="ascii")

    def make(path, fixed):
        raise AnncvtError("no compiler")

    with pytest.raises(AnncvtError, match="no compiler"):
        precision.write(program, tmp_path / "model.so", make, lambda path: None)
    assert [path.read_text(encoding="ascii") for path in tmp_path.iterdir()] == ["before"]


def test_worth_trying_needs_avx512_of_target_and_machine(monkeypatch):
    pytest.importorskip("tvm")
    monkeypatch.setattr(precision.processor, "architecture", lambda: "x86_64")
    for lacking, expected in (([], True), (["avx512bw"], False)):
        monkeypatch.setattr(precision.processor, "missing", lambda features, lacking=lacking: lacking)
        assert precision.worth_trying("avx512") is expected
    monkeypatch.setattr(precision.processor, "missing", lambda features: [])
    assert not precision.worth_trying("avx2")
    monkeypatch.setattr(precision.processor, "architecture", lambda: "aarch64")
    assert not precision.worth_trying("avx512")
