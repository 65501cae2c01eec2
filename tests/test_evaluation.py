"""Accuracy: counted right, on a network that is left as it was, with errors that name the mismatch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from anncvt.data import Images
from anncvt.errors import AnncvtError
from anncvt.evaluation import evaluate
from anncvt.program import Preprocess

PREPROCESS = Preprocess((1, 1, 12), (0.0,), (1 / 255,))


class Echo(nn.Module):
    """The pixels themselves are the class scores."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.norm = nn.BatchNorm1d(classes, affine=False)

    def forward(self, x):
        assert not self.training
        return self.norm(x.flatten(1)[:, : self.classes])


def images(labels: list[int] | None, count: int = 7) -> Images:
    """Scores fall from class 0 to class 11 in every picture."""
    pixels = torch.arange(240, 0, -20, dtype=torch.uint8).expand(count, 1, 1, 12).contiguous()
    return Images(pixels, None if labels is None else torch.tensor(labels), None, "made up")


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_top1_and_top5(batch_size):
    result = evaluate(Echo(12), images([0, 0, 1, 4, 5, 11, 2]), PREPROCESS, batch_size=batch_size)
    assert result == {"top1": pytest.approx(200 / 7), "top5": pytest.approx(500 / 7)}


def test_top5_of_three_classes_counts_three():
    assert evaluate(Echo(3), images([2] * 7), PREPROCESS) == {"top1": 0.0, "top5": 100.0}


def test_modes_are_restored_even_after_an_error():
    network = nn.Sequential(Echo(12), nn.Identity())
    network.train()
    network[0].norm.eval()
    evaluate(network, images([0] * 7), PREPROCESS)
    with pytest.raises(AnncvtError):
        evaluate(network, images([12] * 7), PREPROCESS)
    assert (network.training, network[0].training, network[0].norm.training) == (True, True, False)


def test_nothing_learns():
    network = Echo(12).train()
    before = network.norm.running_mean.clone()
    evaluate(network, images([0] * 7), PREPROCESS)
    assert network.norm.running_mean.equal(before)


@pytest.mark.parametrize("label", [12, 999, -1])
def test_labels_outside_the_outputs_name_both_numbers(label):
    with pytest.raises(AnncvtError, match=rf"12 outputs.*label {label}$"):
        evaluate(Echo(12), images([0] * 6 + [label]), PREPROCESS)


def test_unlabelled_images_and_empty_batches_are_refused():
    with pytest.raises(AnncvtError, match="no labels"):
        evaluate(Echo(12), images(None), PREPROCESS)
    with pytest.raises(AnncvtError, match="batch of 0"):
        evaluate(Echo(12), images([0] * 7), PREPROCESS, batch_size=0)


class Picky(nn.Module):
    def forward(self, x):
        raise AssertionError


@pytest.mark.parametrize(
    "network", [Picky(), nn.Sequential(nn.Flatten(), nn.Linear(5, 3)), nn.Conv2d(1, 3, 1), nn.Conv2d(2, 3, 1)]
)
def test_a_network_of_another_input_says_how_to_set_it(network):
    with pytest.raises(AnncvtError, match="1x1x12") as caught:
        evaluate(network, images([0] * 7), PREPROCESS)
    assert "--input-size" in caught.value.fix


def test_where_it_pays_the_network_is_fused(monkeypatch):
    from networks import Residual

    from anncvt import evaluation
    from anncvt.fused import FusedAdder2d
    from anncvt.nn import AdderConv2d
    from anncvt.passes import fuse

    network = Residual(classes=3)
    network.conv1 = AdderConv2d.from_conv(network.conv1)
    pixels = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    some = Images(pixels, torch.tensor([0, 1, 2, 0, 1, 2]), None, "noise")
    preprocess = Preprocess((3, 8, 8), (0.0,), (1.0,))
    expected = evaluate(network, some, preprocess)
    ran = []
    monkeypatch.setattr(FusedAdder2d, "forward", lambda *a, f=FusedAdder2d.forward: ran.append(1) or f(*a))
    assert evaluate(network, some, preprocess) == expected and not ran
    for module in (evaluation, fuse):
        monkeypatch.setattr(module, "pays", lambda device: True)
    assert evaluate(network, some, preprocess, batch_size=3) == expected
    assert len(ran) == 3, "a look at the first images, then two batches"
    assert type(network.conv1) is AdderConv2d and network.training
