import dataclasses

import pytest
from networks import Residual
from torch import nn

from anncvt.errors import AnncvtError
from anncvt.loading import load
from anncvt.nn import AdderConv2d
from anncvt.passes.plan import plan
from anncvt.swap import swap


@pytest.fixture(scope="module")
def decided():
    return plan(load(Residual(), input_size=8)).plan


def test_parameters_are_the_same_objects(decided):
    network = Residual()
    weight = network.conv1.weight
    assert swap(network, decided) == 3
    assert isinstance(network.conv1, AdderConv2d) and network.conv1.weight is weight


def test_swapping_again_changes_nothing(decided):
    network = Residual()
    swap(network, decided)
    adder = network.conv1
    assert swap(network, decided) == 0 and network.conv1 is adder


def test_containers_and_nested_names(decided):
    network = nn.Sequential(Residual(), Residual())
    layers = tuple(dataclasses.replace(layer, name=f"1.{layer.name}") for layer in decided.layers)
    swap(network, dataclasses.replace(decided, layers=layers))
    assert type(network[0].down[0]) is nn.Conv2d and isinstance(network[1].down[0], AdderConv2d)


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("conv2", nn.Conv2d(8, 8, 5), "had kernel"),
        ("conv2", nn.Conv2d(8, 8, 3, 2), "stride"),
        ("conv2", nn.Linear(8, 8), "now there is a Linear"),
        ("conv2", None, "now there is nothing"),
    ],
)
def test_another_architecture_is_refused_and_left_alone(decided, name, other, message):
    network = Residual()
    setattr(network, name, other)
    with pytest.raises(AnncvtError, match=message):
        swap(network, decided)
    assert type(network.conv1) is nn.Conv2d


def test_adders_and_their_norms_learn_also_in_a_frozen_network(decided):
    network = Residual().requires_grad_(False)
    swap(network, decided)
    assert network.conv1.weight.requires_grad and network.bn1.weight.requires_grad
    assert not network.stem.weight.requires_grad and not network.bn.weight.requires_grad
