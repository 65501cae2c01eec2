"""The demo's network: its bundled weights are what its script makes, and it has what the demo needs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anncvt.data import open_images
from anncvt.evaluation import evaluate
from anncvt.program import Preprocess

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def one_thread():
    """The network is too small for more, and waiting for other processes' threads would dominate."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def digits_net(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import digits_net

    return digits_net


def accuracy(digits_net, weights: Path) -> float:
    network = digits_net.DigitsNet()
    network.load_state_dict(load_file(weights))
    preprocess = Preprocess(digits_net.INPUT_SIZE, digits_net.MEAN, digits_net.STD)
    return evaluate(network, open_images("digits", "test", preprocess), preprocess)["top1"]


def test_bundled_weights_recognise_held_out_digits(digits_net):
    weights = EXAMPLES / "digits_net.safetensors"
    assert weights.stat().st_size <= 300_000
    assert accuracy(digits_net, weights) >= 98.5


def test_it_has_what_a_larger_resnet_has(digits_net):
    network = digits_net.DigitsNet().eval()
    convolutions = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
    assert {(c.kernel_size, c.stride) for c in convolutions} == {((3, 3), (1, 1)), ((3, 3), (2, 2)), ((1, 1), (2, 2))}
    assert sum(p.numel() for p in network.parameters()) == 38_266
    x = torch.randn(2, 1, 16, 16)
    assert torch.fx.symbolic_trace(network)(x).equal(network(x))


def test_the_training_script_learns_and_writes_weights(digits_net, tmp_path, monkeypatch):
    import train_digits_net

    weights = tmp_path / "net.safetensors"
    monkeypatch.setattr(sys, "argv", ["train_digits_net.py", "-o", str(weights), "--epochs", "2"])
    train_digits_net.main()
    assert accuracy(digits_net, weights) > 80
