"""Blocks cover the swapped layers in order, and running one after the other is running the network."""

import torch
import torch.nn.functional as F
from networks import Mobile, Residual
from torch import nn

from anncvt.loading import load
from anncvt.passes.blocks import find_blocks, shapes_of
from anncvt.passes.pairing import pairs
from anncvt.passes.plan import plan
from anncvt.passes.rewrite import rewrite
from anncvt.passes.trace import trace


class Deep(nn.Module):
    """Residual blocks one behind the other."""

    def __init__(self, depth=4):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        for at in range(depth):
            self.add_module(f"a{at}", nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)))
        self.depth = depth
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x)
        for at in range(self.depth):
            x = F.relu(x + self.get_submodule(f"a{at}")(x))
        return self.head(x.mean((2, 3)))


def _found(network, layers, size=8):
    torch.manual_seed(0)
    program = rewrite(plan(load(network.eval(), input_size=(3, size, size))))
    graph = trace(program.teacher).parts[0].graph
    image = torch.randn(1, 3, size, size)
    shapes = shapes_of(graph, program.teacher, image)
    return program, graph, shapes, find_blocks(graph, pairs(program), shapes, layers)


def test_blocks_have_the_layers_asked_for_and_follow_on_each_other():
    _, _, shapes, blocks = _found(Deep(), 2)
    assert [[pair.name for pair in block.paired] for block in blocks] == [["a0.0", "a1.0"], ["a2.0", "a3.0"]]
    assert blocks[0].start.op == "placeholder"
    assert blocks[0].end is blocks[1].start
    assert shapes[blocks[1].end] == (1, 4, 8, 8)  # ends before the pooling
    assert set(blocks[0].nodes).isdisjoint(blocks[1].nodes)


def test_running_the_blocks_is_running_the_network():
    program, _, _, blocks = _found(Deep(), 2)
    x = torch.randn(2, 3, 8, 8)
    before, wanted = x.clone(), program.student(x)
    for block in blocks:
        x = block.run(program.student, x)
    torch.testing.assert_close(program.student.head(x.mean((2, 3))), wanted)
    again = blocks[0].run(program.student, before)
    torch.testing.assert_close(blocks[0].run(program.student, before), again)


def test_a_branch_is_not_cut():
    _, _, _, blocks = _found(Residual(), 1)
    assert [{pair.name for pair in block.paired} for block in blocks] == [{"conv1", "conv2", "down.0"}]


def test_kept_layers_belong_to_the_block_they_are_in():
    program, graph, _, blocks = _found(Mobile(), 1, size=16)
    first = blocks[0].parameters(program.student, graph)
    assert any(parameter is program.student.stem.weight for parameter in first)
    everywhere = [parameter for block in blocks for parameter in block.parameters(program.student, graph)]
    assert len(everywhere) == len({id(parameter) for parameter in everywhere})


def test_a_module_called_twice_belongs_to_none():
    class Twice(Deep):
        def forward(self, x):
            return self.head(self.a1(self.a0(self.a0(self.stem(x)))).mean((2, 3)))

    program, graph, _, blocks = _found(Twice(), 1)
    owned = [parameter for block in blocks for parameter in block.parameters(program.student, graph)]
    assert not any(parameter is program.student.a0[1].weight for parameter in owned)
    assert any(parameter is program.student.a1[1].weight for parameter in owned)
