"""Kept layers answer the student's input as well as a linear layer can, and stay as they are where that is no gain."""

import pytest
import torch
from torch import fx, nn

from anncvt.passes.fit_kept import fit_kept, kept_layers
from anncvt.passes.walk import Walk


class Network(nn.Module):
    """What stands for an adder errs in the student; then every kind of kept layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.adder = nn.Conv2d(8, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.dense = nn.Conv2d(8, 8, 1)
        self.bare = nn.Conv2d(8, 8, 1, bias=False)
        self.twice = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.depthwise(self.adder(self.first(x)).relu())).relu()
        x = self.twice(self.twice(self.bare(self.dense(x)).relu()))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def walked():
    torch.manual_seed(0)
    teacher = Network().eval()
    student = Network().eval()
    student.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        student.adder.weight.add_(0.2 * torch.randn_like(student.adder.weight))
    graph = fx.symbolic_trace(teacher).graph
    images = torch.randn(64, 3, 8, 8)
    walk = Walk(graph, teacher, student, [lambda: images[:32], lambda: images[32:]], 1 << 26)
    return walk, graph, student, images


def test_what_can_be_fitted(walked):
    _, graph, student, _ = walked
    # Not what comes before the adder, has neither bias nor norm, or is called twice.
    assert list(kept_layers(graph, student, {"adder"})) == ["depthwise", "dense", "head"]
    student.dense.weight = student.bare.weight
    assert list(kept_layers(graph, student, {"adder"})) == ["depthwise", "head"]


@pytest.mark.parametrize("name", ["depthwise", "dense", "head"])
def test_the_output_comes_closer_to_the_teachers(walked, name):
    walk, graph, student, images = walked

    def distance():
        outputs = []
        for network in walk.networks:
            found = []
            reader = network.norm if name == "depthwise" else network.get_submodule(name)
            handle = reader.register_forward_hook(lambda m, i, o, found=found: found.append(o))
            with torch.no_grad():
                network(images)
            handle.remove()
            outputs.append(found[0])
        return float((outputs[0] - outputs[1]).square().mean())

    before, mean = distance(), student.norm.running_mean.clone()
    node = kept_layers(graph, student, {"adder"})[name]
    done = fit_kept(walk, node, 2, 64, torch.Generator().manual_seed(0))
    assert done.r2 > done.before_r2 and distance() < 0.9 * before
    # A layer without a bias has what it would be in the norm.
    assert torch.equal(mean, student.norm.running_mean) == (name != "depthwise")


def test_what_is_right_already_stays(walked):
    walk, graph, student, _ = walked
    student.load_state_dict(walk.networks[0].state_dict())
    before = {name: value.clone() for name, value in student.state_dict().items()}
    done = fit_kept(walk, kept_layers(graph, student, {"adder"})["dense"], 2, 64, torch.Generator().manual_seed(0))
    assert done.r2 == done.before_r2 == pytest.approx(1)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
