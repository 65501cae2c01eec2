from importlib.util import find_spec

import pytest
import torch

from anncvt.distillation.transform import load_transform, transformed
from anncvt.errors import AnncvtError

SOURCE = """
import torch

def noise():
    return lambda image: image ^ torch.randint(0, 256, image.shape, dtype=torch.uint8)

def larger():
    return lambda image: torch.cat([image, image])

def fails():
    return lambda image: image.nonsense

def number():
    return 3
"""


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_transforms.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)


def test_an_image_changes_by_its_own_seed_and_nothing_else_does():
    pixels, noise = torch.zeros(3, 1, 4, 4, dtype=torch.uint8), load_transform("my_transforms:noise")
    before = torch.get_rng_state()
    whole = transformed(pixels, noise, [7, 8, 7])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(whole[0], whole[2]) and not torch.equal(whole[0], whole[1])
    assert torch.equal(transformed(pixels[1:2], noise, [8]), whole[1:2])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_transforms:absent", "has no 'absent'"),
        ("no_such_module:x", "no module 'no_such_module'"),
        ("my_transforms", "is not the name of a Python object"),
        ("my_transforms:number", "makes no transform but: int"),
    ],
)
def test_a_transform_that_is_none_is_named(name, message):
    with pytest.raises(AnncvtError, match=message):
        load_transform(name)


@pytest.mark.parametrize(("name", "message"), [("larger", r"makes \[2, 4, 4\]"), ("fails", "failed: AttributeError")])
def test_a_transform_that_does_not_fit_is_named(name, message):
    with pytest.raises(AnncvtError, match=message):
        transformed(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), load_transform(f"my_transforms:{name}"), [0])


@pytest.mark.skipif(find_spec("torchvision") is None, reason="needs torchvision")
def test_one_of_torchvision():
    flip = load_transform("torchvision.transforms.v2:RandomHorizontalFlip")
    pixels = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4).repeat(8, 1, 1, 1)
    changed = transformed(pixels, flip, range(8))
    kinds = {torch.equal(image, pixels[0]) for image in changed}
    assert kinds == {True, False}
    assert all(torch.equal(image, pixels[0]) or torch.equal(image, pixels[0].flip(2)) for image in changed)
