import sys
from pathlib import Path

import pytest
import torch

from anncvt import zoo
from anncvt.errors import AnncvtError
from anncvt.zoo import Candidate

needs_torchvision = pytest.mark.skipif(not zoo.names("torchvision"), reason="torchvision is not installed")
needs_timm = pytest.mark.skipif(not zoo.names("timm"), reason="timm is not installed")


def test_a_zoo_that_is_not_installed_is_empty(monkeypatch):
    for package in ("torchvision", "timm"):
        monkeypatch.setitem(sys.modules, package, None)
    assert zoo.names("torchvision") == [] and zoo.names("timm") == []
    assert zoo.candidates(Path("resnet18.pth")) == []
    with pytest.raises(AnncvtError, match="torchvision is not installed") as error:
        zoo.build("torchvision", "resnet18", {})
    assert "pip install" in error.value.fix


@needs_torchvision
def test_torchvision_imports_beside_this_torch():
    assert zoo.import_torchvision() is zoo.import_torchvision()
    assert zoo.build("torchvision", "squeezenet1_1", {"num_classes": 7}).classifier[1].out_channels == 7


@needs_torchvision
def test_its_file_names_are_known_exactly():
    assert zoo.candidates(Path("resnet18-f37072fd.pth")) == [Candidate("torchvision", "resnet18")]
    assert Candidate("torchvision", "resnet18") in zoo.candidates(Path("ResNet18.pth"))
    assert zoo.candidates(Path("resnet18.a1_in1k.pth")) in ([], [Candidate("timm", "resnet18")])
    assert zoo.candidates(Path("my-own-net.pth")) == []


@needs_torchvision
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", (3, 224, 224)),
        ("inception_v3", (3, 299, 299)),
        ("fcn_resnet50", (3, 520, 520)),
        ("r3d_18", (3, 16, 112, 112)),
        ("fasterrcnn_resnet50_fpn", None),
    ],
)
def test_preprocessing_as_torchvision_states_it(name, size):
    stated = zoo.torchvision_preprocess(name)
    assert (stated.input_size if stated else None) == size


@needs_torchvision
def test_no_backbone_is_downloaded_for_random_weights(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("downloads")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with torch.device("meta"):
        zoo.build("torchvision", "lraspp_mobilenet_v3_large", {})


@needs_timm
def test_timm():
    with torch.device("meta"):
        network = zoo.build("timm", "resnet10t", {"num_classes": 3})
    assert zoo.stated_preprocess(network).input_size[0] == 3
    with pytest.raises(AnncvtError, match="timm has no architecture 'resnett18'") as error:
        zoo.build("timm", "resnett18", {})
    assert "resnet18" in error.value.fix
