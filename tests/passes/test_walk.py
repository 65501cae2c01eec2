"""The walk computes what the networks compute, and forgets what nobody needs."""

import copy

import torch
from networks import Residual

from anncvt.passes.trace import trace
from anncvt.passes.walk import Walk, reader


def _pair():
    torch.manual_seed(0)
    teacher = Residual().eval()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.conv1.weight.mul_(0.5)
    return teacher, student


def test_values_are_those_of_the_networks():
    teacher, student = _pair()
    graph = trace(teacher).parts[0].graph
    images = [torch.randn(3, 3, 8, 8), torch.randn(2, 3, 8, 8)]
    walk = Walk(graph, teacher, student, images)
    last = None
    for node in walk:
        last = node
    for values, network in ((walk.teacher, teacher), (walk.student, student)):
        for chunk, image in zip(values[last], images, strict=True):
            torch.testing.assert_close(chunk, network(image))


def test_spent_values_are_dropped_and_images_untouched():
    teacher, student = _pair()
    graph = trace(teacher).parts[0].graph
    images = [torch.randn(2, 3, 8, 8)]
    before = images[0].clone()
    walk = Walk(graph, teacher, student, images)
    widest = max(len(walk.student) for _ in walk)
    assert widest <= 4  # two branches, their join, one in the making
    torch.testing.assert_close(images[0], before, rtol=0, atol=0)


def test_changes_made_at_a_node_take_effect():
    teacher, student = _pair()
    graph = trace(teacher).parts[0].graph
    image = torch.randn(2, 3, 8, 8)
    walk = Walk(graph, teacher, student, [image])
    last = None
    for node in walk:
        if node.target == "conv2":
            with torch.no_grad():
                student.conv2.weight.zero_()
        last = node
    torch.testing.assert_close(walk.student[last][0], student(image))


def test_reader_is_the_only_user():
    graph = trace(Residual()).parts[0].graph
    stem = next(node for node in graph.nodes if node.target == "stem")
    assert reader(stem).target == "bn"
    forked = next(node for node in graph.nodes if len(node.users) == 2)
    assert reader(forked) is None
