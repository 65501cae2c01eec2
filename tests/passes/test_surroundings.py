"""What follows a layer is found by graph order, in modules, functions and methods."""

import pytest
import torch
import torch.nn.functional as F
from networks import NormAct
from torch import nn

from anncvt.passes.surroundings import sequel
from anncvt.passes.trace import trace


class Net(nn.Module):
    def __init__(self, after):
        super().__init__()
        self.stem, self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.act = nn.ReLU6(inplace=True)
        self.after = after

    def forward(self, x):
        x = self.stem(x)
        return self.after(self, x, self.bn(self.conv(x)))


def _sequel(after, known=("x", "stem")):
    network = Net(after).eval()
    graph = trace(network).parts[0].graph
    node = next(node for node in graph.nodes if node.target == "conv")
    return sequel(node, network.bn, lambda other: other.name in known, network)


ACTIVATIONS = {
    "module": (lambda net, x, y: net.act(y), F.relu6),
    "function": (lambda net, x, y: F.relu(y), F.relu),
    "in place": (lambda net, x, y: F.relu_(y), F.relu),
    "method": (lambda net, x, y: y.relu(), F.relu),
    "with an argument": (lambda net, x, y: F.leaky_relu(y, 0.3), lambda y: F.leaky_relu(y, 0.3)),
}


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_activations_are_found_and_leave_their_input_alone(case):
    after, same = ACTIVATIONS[case]
    found = _sequel(after)
    y = torch.linspace(-8, 8, 9)
    before = y.clone()
    torch.testing.assert_close(found.activation(y), same(before))
    torch.testing.assert_close(y, before)
    assert found.added is None


def test_a_shortcut_is_followed_to_the_activation_behind_it():
    found = _sequel(lambda net, x, y: F.relu(y + x))
    assert found.added.name == "stem"
    assert found.activation is not None


def test_what_is_not_known_yet_and_what_has_two_readers_is_not_followed():
    assert _sequel(lambda net, x, y: F.relu(y + x), known=()).added is None
    assert _sequel(lambda net, x, y: F.relu(y) + y).activation is None
    assert _sequel(lambda net, x, y: torch.sigmoid(y)).activation is None


def test_an_activation_in_the_norm_is_what_follows():
    network = NormAct().eval()
    graph = trace(network).parts[0].graph
    node = next(node for node in graph.nodes if node.target == "conv1")
    found = sequel(node, network.bn1, lambda other: True, network)
    y = torch.linspace(-8, 8, 9)
    torch.testing.assert_close(found.activation(y), F.relu(y))
    assert found.added is None and y.min() == -8
