import pytest
import torch
from networks import Residual
from torch import nn

from anncvt.copies import copied, outline, sharing


def old_weight_norm():
    network = nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 3)))
    network(torch.zeros(1, 3, 5, 5))  # leaves a computed tensor behind, which deepcopy refuses
    return network


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_computed_attributes_do_not_stop_a_copy():
    network = old_weight_norm()
    x = torch.randn(1, 3, 5, 5)
    for made in (copied(network), sharing(network)):
        assert torch.equal(made(x), network(x))
    assert outline(network)(x.to("meta")).shape == (1, 4, 3, 3)


def test_a_copy_has_tensors_of_its_own_and_a_sharing_one_the_same():
    network = Residual()
    assert copied(network).stem.weight is not network.stem.weight
    assert sharing(network).stem.weight is network.stem.weight and sharing(network).stem is not network.stem


def test_an_outline_has_no_data_and_keeps_ties():
    network = Residual()
    network.conv2.weight.requires_grad_(False)
    network.again = network.conv1
    made = outline(network)
    assert all(value.is_meta for value in made.state_dict().values())
    assert made.again is made.conv1 and not made.conv2.weight.requires_grad
    assert not network.stem.weight.is_meta
