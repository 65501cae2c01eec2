import dataclasses
import pkgutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from networks import Residual
from PIL import Image
from torch import nn

import anncvt
from anncvt import api
from anncvt.data import read_image

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_import_is_light():
    code = "import sys, anncvt; assert not {'torch', 'numpy', 'click', 'rich', 'tvm', 'onnx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_there_and_stay_functions():
    assert set(anncvt.__all__) < set(dir(anncvt))
    for module in pkgutil.iter_modules(anncvt.__path__):  # whose import must not replace a function of the same name
        assert module.name not in anncvt.__all__
    for name in ("load", "plan", "convert", "distill", "evaluate", "export", "compile", "check", "bench", "run"):
        assert isinstance(getattr(anncvt, name), types.FunctionType)
    assert issubclass(anncvt.AnncvtError, Exception) and isinstance(anncvt.__version__, str)
    with pytest.raises(AttributeError, match="nothing"):
        anncvt.nothing  # noqa: B018


@pytest.fixture
def photos(tmp_path):
    """A data set of two classes of noise, 12x12 pixels, and its DATA."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("test", 3)):
        for label in ("cat", "dog"):
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 256, (12, 12, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return f"folder:{tmp_path / 'photos'}"


def test_a_module_from_end_to_end(tmp_path, photos, picture, monkeypatch):
    torch.manual_seed(0)
    network = Residual(classes=2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    monkeypatch.chdir(tmp_path)
    program = anncvt.convert(
        network, calibrate="folder:photos", distill=photos, batch_size=4, budget=0.1, output="x.ann"
    )
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert program.stage == "distilled" and program.classes == ["cat", "dog"]
    assert isinstance(program.student, nn.Module)
    assert program.preprocess.input_size == (3, 12, 12), "the size that all images have"

    monkeypatch.chdir("/")  # data are remembered by absolute path
    measured = anncvt.evaluate(program)
    assert measured["images"] == 6 and measured["data"] == f"{photos} test"
    with pytest.raises(anncvt.AnncvtError, match="where should"):
        anncvt.export(_without_folder(program))
    with pytest.raises(anncvt.AnncvtError, match="nothing to compare"):
        anncvt.check(_without_folder(program))
    (seen,) = anncvt.run(program, picture, top=1)
    with torch.inference_mode():
        scores = program.student(read_image(picture, program.preprocess))[0]
    assert [row["class"] for row in seen["top"]] == [("cat", "dog")[int(scores.argmax())]]


def _without_folder(program):
    return dataclasses.replace(program, folder=None)


def test_a_resumed_module_is_passed_again(tmp_path, photos):
    torch.manual_seed(0)
    network = Residual(classes=2)
    output = tmp_path / "x.ann"
    anncvt.convert(network, calibrate=photos, budget=0.1, output=output)
    again = anncvt.convert(network, calibrate=photos, distill=photos, batch_size=4, output=output, resume=True)
    assert [r.stage for r in again.history if r.stage in ("calibrated", "distilled")] == ["calibrated", "distilled"]


def test_unlabelled_images_calibrate_without_accuracy(tmp_path, photos):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(Path(photos.partition(":")[2]).rglob("*.png"))):
        path.rename(flat / f"{number}.png")
    torch.manual_seed(0)
    program = anncvt.convert(Residual(classes=2), calibrate=f"folder:{flat}", budget=0.1, output=tmp_path / "x.ann")
    assert program.stage == "calibrated" and api.accuracy(program) is None
    with pytest.raises(anncvt.AnncvtError, match="nothing was measured"):
        api.gate(None, 5)


def test_options_of_a_folder_are_its_own(converted):
    with pytest.raises(anncvt.AnncvtError, match="input_size"):
        anncvt.load(converted, input_size=32)


def test_converting_a_folder_starts_from_its_cnn(converted, tmp_path):
    program = anncvt.convert(
        converted, keep=["layer3.*"], calibrate="digits", limit=32, budget=0.1, output=tmp_path / "other.ann"
    )
    assert program.plan is not None and len(program.plan.swapped) == 5
    assert [record.stage for record in program.history].count("calibrated") == 1


def test_distill_needs_an_adder_network():
    program = anncvt.load(EXAMPLES / "digits_net.safetensors", arch="digits_net:DigitsNet", input_size=16)
    with pytest.raises(anncvt.AnncvtError, match="no adder network"):
        anncvt.distill(program, "digits")


def test_no_such_split(converted):
    with pytest.raises(anncvt.AnncvtError, match="no such split"):
        anncvt.evaluate(converted, split="validation")
