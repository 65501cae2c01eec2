"""The walk computes what the networks compute, remembers only what it may, and changes nothing behind one's back."""

import copy

import pytest
import torch
from networks import Residual
from torch import nn

from anncvt.passes.trace import trace
from anncvt.passes.walk import Walk, reader

PLENTY = 1 << 30


def _pair(network=None):
    torch.manual_seed(0)
    teacher = (network or Residual()).eval()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.9)
    return teacher, student


def _walk(teacher, student, memory=PLENTY, sizes=(3, 2)):
    graph = trace(teacher).parts[0].graph
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(size, 3, 8, 8, generator=generator) for size in sizes]
    return Walk(graph, teacher, student, [lambda image=image: image for image in images], memory), graph, images


def _node(graph, name):
    return next(node for node in graph.nodes if node.target == name)


@pytest.mark.parametrize("memory", [0, PLENTY])
def test_values_are_those_of_the_networks_at_every_stop(memory):
    teacher, student = _pair()
    walk, graph, images = _walk(teacher, student, memory)
    before = [image.clone() for image in images]
    for name in ("conv1", "conv2", "head"):
        node = _node(graph, name)
        (source,) = node.all_input_nodes
        for network, which in ((teacher, 0), (student, 1)):
            inputs = []
            handle = network.get_submodule(name).register_forward_pre_hook(lambda m, x, into=inputs: into.append(x[0]))
            for image in images:
                network(image)
            handle.remove()
            walked = [known[which][source] for known in walk.before(node)]
            for got, wanted in zip(walked, inputs, strict=True):
                torch.testing.assert_close(got, wanted)
    for image, same in zip(images, before, strict=True):
        torch.testing.assert_close(image, same, rtol=0, atol=0)


def test_nothing_is_remembered_that_nobody_reads():
    teacher, student = _pair()
    walk, graph, _ = _walk(teacher, student)
    for name, live in (("conv1", 1), ("conv2", 2), ("head", 1)):
        for known in walk.before(_node(graph, name)):
            assert [len(values) for values in known] == [live, live]


def test_changes_made_at_a_stop_take_effect_and_a_rewound_walk_sees_later_ones():
    teacher, student = _pair()
    walk, graph, images = _walk(teacher, student, sizes=(2,))
    conv2, head = _node(graph, "conv2"), _node(graph, "head")
    list(walk.before(conv2))
    mark = walk.mark()
    for factor in (0.0, 2.0):
        with torch.no_grad():
            student.conv2.weight.fill_(factor)
        ((_, values),) = walk.before(head)
        (source,) = head.all_input_nodes
        torch.testing.assert_close(student.head(values[source]), student(images[0]))
        walk.rewind(mark)


class InPlace(nn.Module):
    """Changes what the walk may have remembered."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.first(x)
        y = self.second(x)
        x += y
        return self.relu(x).mul_(2)


@pytest.mark.parametrize("memory", [0, PLENTY])
def test_in_place_operations_do_not_reach_what_is_remembered(memory):
    teacher, student = _pair(InPlace())
    walk, graph, images = _walk(teacher, student, memory, sizes=(2,))
    list(walk.before(_node(graph, "second")))
    mark = walk.mark()
    relu = _node(graph, "relu")
    for _ in range(2):
        ((values, _),) = walk.after(relu)
        torch.testing.assert_close(2 * values[relu], teacher(images[0]))
        walk.rewind(mark)
        ((values, _),) = walk.before(_node(graph, "second"))
        torch.testing.assert_close(values[_node(graph, "first")], teacher.first(images[0]))


def test_reader_is_the_only_user():
    graph = trace(Residual()).parts[0].graph
    stem = next(node for node in graph.nodes if node.target == "stem")
    assert reader(stem).target == "bn"
    forked = next(node for node in graph.nodes if len(node.users) == 2)
    assert reader(forked) is None


class Lists(Residual):
    """Its end changes the list that it is given, as detection heads do."""

    class End(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(3, 2, 1), nn.Conv2d(4, 2, 1)])

        def forward(self, maps):
            for at, conv in enumerate(self.convs):
                maps[at] = conv(maps[at]) if maps[at].sum() < 1e9 else maps[at]  # not traceable: a leaf
            return maps

    def __init__(self):
        super().__init__()
        self.end = self.End()

    def forward(self, x):
        return self.end([x, self.stem(x)])


def test_modules_may_change_the_lists_that_they_are_given():
    teacher, student = _pair(Lists())
    walk, graph, images = _walk(teacher, student)
    found = [values[_node(graph, "end")] for _, values in walk.after(_node(graph, "end"))]
    for got, image in zip(found, images, strict=True):
        assert all(map(torch.equal, got, student(image)))
