import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from networks import Residual
from recorder import Recorder
from torch import nn

from anncvt import folder
from anncvt.errors import AnncvtError
from anncvt.loading import load
from anncvt.passes.choice import Choice
from anncvt.passes.plan import plan
from anncvt.passes.rewrite import rewrite


@pytest.fixture
def program(tmp_path):
    """Rewritten, from a checkpoint beside its architecture."""
    torch.manual_seed(0)
    (tmp_path / "anncvt_folder_arch.py").write_text(Path(sys.modules["networks"].__file__).read_text())
    torch.save(Residual().state_dict(), tmp_path / "net.pth")
    loaded = load(tmp_path / "net.pth", arch="anncvt_folder_arch:Residual", input_size=8)
    return rewrite(plan(loaded, Choice(keep=("down.*",))))


def test_everything_comes_back(program, tmp_path):
    with torch.no_grad():
        program.student.conv1.weight.add_(1)
    program.classes = ["a", "b", "c", "d", "e"]
    program.record("calibrated", 1.5, {"r2": {"conv1": 0.5}}, seed=3)
    folder.save(program, tmp_path / "x.ann")
    assert folder.is_folder(tmp_path / "x.ann") and program.folder == str(tmp_path / "x.ann")
    opened = folder.open_folder(tmp_path / "x.ann")
    for field in ("source", "preprocess", "plan", "history", "classes", "folder", "stage"):
        assert getattr(opened, field) == getattr(program, field), field
    for mine, other in ((program.teacher, opened.teacher), (program.student, opened.student)):
        assert list(mine.state_dict()) == list(other.state_dict()) and not other.training
        assert all(
            torch.equal(a, b) for a, b in zip(mine.state_dict().values(), other.state_dict().values(), strict=True)
        )
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(opened.student(x), program.student(x))


def test_no_pickles(program, tmp_path):
    folder.save(program, tmp_path / "x.ann")
    assert sorted(p.name for p in (tmp_path / "x.ann").iterdir()) == [
        "program.json",
        "student.safetensors",
        "teacher.safetensors",
    ]


def test_saving_over_a_program_keeps_what_else_is_there(program, tmp_path):
    target = tmp_path / "x.ann"
    folder.save(program, target)
    (target / "train").mkdir()
    (target / "train" / "last.pt").write_text("checkpoint")
    program.student = None
    folder.save(program, target)
    assert (target / "train" / "last.pt").exists() and not (target / "student.safetensors").exists()
    assert folder.open_folder(target).student is None


def test_a_folder_that_training_started(program, tmp_path):
    (tmp_path / "x.ann" / "train").mkdir(parents=True)
    folder.save(program, tmp_path / "x.ann")
    assert folder.is_folder(tmp_path / "x.ann")


def test_other_places_are_not_overwritten(program, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(AnncvtError, match="not a program folder"):
            folder.save(program, tmp_path / name)
    assert (tmp_path / "file").read_text() == "x" and len(list((tmp_path / "mine").iterdir())) == 1


def test_a_failed_first_save_leaves_nothing(program, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(AnncvtError, match="No space left"):
        folder.save(program, tmp_path / "x.ann")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_place(program, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(AnncvtError, match="cannot write"):
        folder.save(program, tmp_path / "x.ann")


def test_a_place_below_a_file(program, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(AnncvtError, match="cannot write"):
        folder.save(program, tmp_path / "file" / "x.ann")


def test_values_that_json_cannot_hold(program, tmp_path):
    program.source.arch_args["width"] = object()
    with pytest.raises(AnncvtError, match="JSON"):
        folder.save(program, tmp_path / "x.ann")
    assert not (tmp_path / "x.ann").exists()


def edit(path: Path, **changes) -> None:
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps(data))


def test_a_newer_format_is_named(program, tmp_path):
    folder.save(program, tmp_path / "x.ann")
    edit(tmp_path / "x.ann" / "program.json", format=99)
    with pytest.raises(AnncvtError, match="newer anncvt"):
        folder.open_folder(tmp_path / "x.ann")


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("program.json", lambda p: p.write_text("{"), "damaged"),
        ("program.json", lambda p: p.write_text("[]"), "damaged"),
        ("program.json", lambda p: p.write_bytes(b"\xff\xfe"), "damaged"),
        ("program.json", lambda p: edit(p, source={"nonsense": 1}), "damaged"),
        ("program.json", lambda p: edit(p, preprocess=None), "damaged"),
        ("program.json", lambda p: edit(p, history=[3]), "damaged"),
        ("program.json", lambda p: edit(p, plan={"layers": 3}), "not a plan"),
        ("program.json", lambda p: p.unlink(), "not a program folder"),
        ("teacher.safetensors", lambda p: p.unlink(), "missing"),
        ("teacher.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-100]), "damaged"),
        ("student.safetensors", lambda p: p.write_bytes(b""), "damaged"),
        ("student.safetensors", lambda p: shutil.copy(p.parent.parent / "other.safetensors", p), "does not fit"),
    ],
)
def test_damage_is_reported(program, tmp_path, file, damage, message):
    from safetensors.torch import save_file

    folder.save(program, tmp_path / "x.ann")
    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    damage(tmp_path / "x.ann" / file)
    with pytest.raises(AnncvtError, match=message) as error:
        folder.open_folder(tmp_path / "x.ann")
    assert error.value.fix


def test_a_changed_architecture_is_noticed(program, tmp_path):
    folder.save(program, tmp_path / "x.ann")
    edit(tmp_path / "x.ann" / "program.json", source={"model": "m", "arch": "networks:Mobile", "arch_args": {}})
    with pytest.raises(AnncvtError, match="not the one that was planned"):
        folder.open_folder(tmp_path / "x.ann")


def test_the_architecture_s_file_may_move_with_the_folder(program, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    folder.save(program, moved / "x.ann")
    (tmp_path / "anncvt_folder_arch.py").rename(moved / "anncvt_folder_arch.py")
    assert folder.open_folder(moved / "x.ann").student is not None


def test_a_program_of_a_python_object_wants_the_object_again(tmp_path):
    network = Residual()
    program = rewrite(plan(load(network, input_size=8)))
    folder.save(program, tmp_path / "x.ann")
    with pytest.raises(AnncvtError, match="Python object") as error:
        folder.open_folder(tmp_path / "x.ann")
    assert "model=" in error.value.fix
    x = torch.randn(1, 3, 8, 8)
    for model in (Residual(), nn.DataParallel(Residual())):
        opened = folder.open_folder(tmp_path / "x.ann", model=model)
        assert torch.equal(opened.student(x), program.student(x)) and torch.equal(opened.teacher(x), program.teacher(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_floats_become_float32(tmp_path, dtype):
    torch.manual_seed(0)
    network, notes = Residual().to(dtype), Recorder()
    program = rewrite(plan(load(network, input_size=8, progress=notes)))
    folder.save(program, tmp_path / "net.ann")
    opened = folder.open_folder(tmp_path / "net.ann", network)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(opened.student(x), program.student(x)) and opened.student(x).dtype == torch.float32
    assert network.stem.weight.dtype == dtype
    assert any(str(dtype).removeprefix("torch.") in note for note in notes.notes)


def test_tied_weights_stay_tied_until_they_are_adders(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.b.weight = self.a.weight
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.b(self.a(self.stem(x)).relu()).mean((2, 3)))

    program = rewrite(plan(load(Tied(), input_size=8)))
    folder.save(program, tmp_path / "x.ann")
    opened = folder.open_folder(tmp_path / "x.ann", model=Tied())
    assert opened.teacher.a.weight is opened.teacher.b.weight
    assert opened.student.a.weight is not opened.student.b.weight  # fitted each to its own inputs
