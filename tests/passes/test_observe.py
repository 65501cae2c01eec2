import pytest
import torch
import torch.nn.functional as F
from networks import Awkward, DeformConv2d, Mobile, Residual
from torch import nn

from anncvt.errors import AnncvtError
from anncvt.passes.observe import observe, observe_outline


def test_layers_come_in_execution_order_with_their_work():
    seen = observe(Residual(), (3, 8, 8))
    assert list(seen.calls) == ["stem", "conv1", "conv2", "down.0"]
    call = seen.calls["conv1"]
    assert (call.in_shape, call.out_shape) == ((1, 4, 8, 8), (1, 8, 4, 4))
    assert call.macs == 8 * 4 * 4 * 4 * 9 and call.readers == ["bn1"]
    assert seen.linear_macs == 8 * 5 and seen.output_shape == (1, 5)


def test_groups_count_only_their_own_channels():
    calls = observe(Mobile(), (3, 16, 16)).calls
    assert calls["depthwise"].groups == 16 and calls["depthwise"].macs == 16 * 8 * 8 * 9
    assert calls["grouped"].groups == 4 and calls["grouped"].macs == 16 * 8 * 8 * 4 * 9


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions(groups):
    layer = nn.ConvTranspose2d(4, 6, 3, 2, groups=groups, bias=False)
    call = observe(layer, (4, 5, 5)).calls[""]
    assert call.groups == groups and call.macs == 4 * 5 * 5 * (6 // groups) * 9


def test_functional_shared_and_idle_convolutions():
    calls = observe(Awkward(), (3, 6, 6)).calls
    assert not calls["conv2d"].is_module and calls["conv2d"].kind == "conv2d" and calls["conv2d"].stride == (1, 1)
    assert calls["shared"].calls == 2 and calls["shared"].macs == 2 * 4 * 36 * 36
    assert calls["standardised"].kind == "Standardised" and "idle" not in calls


def test_what_changed_in_place_no_longer_is_the_convolution():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.BatchNorm2d(4))
    assert observe(network, (3, 4, 4)).calls["0"].readers == ["1"]


def test_nothing_is_changed():
    network = Residual().train()
    network.bn1.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()

    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    observe(nn.Sequential(Noise(), network), (3, 8, 8))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training and not network.bn1.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_one_and_three_dimensions():
    assert observe(nn.Conv1d(2, 4, 3), (2, 9)).calls[""].out_shape == (1, 4, 7)
    assert observe(nn.Conv3d(2, 4, 3), (2, 5, 6, 7)).calls[""].macs == 4 * 3 * 4 * 5 * 2 * 27


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Residual(), r"forward pass on \[1, 1, 8, 8\] failed"),
        (nn.Bilinear(2, 2, 2), "takes 2 inputs"),
    ],
)
def test_networks_that_do_not_run(network, message):
    with pytest.raises(AnncvtError, match=message):
        observe(network, (1, 8, 8))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_part_is_named():
    with pytest.raises(AnncvtError, match="1 is TorchScript"):
        observe(nn.Sequential(nn.Conv2d(3, 4, 1), torch.jit.script(nn.Conv2d(4, 4, 1))), (3, 8, 8))


def test_a_network_without_tensor_output():
    class Words(nn.Module):
        def forward(self, x):
            F.relu(x)
            return "words"

    with pytest.raises(AnncvtError, match="returns no tensor"):
        observe(Words(), (3, 8, 8))


def test_linear_layers_and_functions():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.weight = nn.Linear(6, 3), nn.Parameter(torch.zeros(5, 3))

        def forward(self, x):
            return F.linear(self.inner(x.flatten(2).transpose(1, 2)), self.weight)

    seen = observe(nn.Sequential(nn.Conv2d(3, 6, 1), Attends()), (3, 2, 2))
    assert list(seen.linears) == ["1.inner"]
    call = seen.linears["1.inner"]
    assert (call.in_shape, call.out_shape, call.kernel, call.stride) == ((1, 4, 6), (1, 4, 3), (), ())
    assert call.macs == 4 * 6 * 3 and seen.linear_macs == 4 * 6 * 3 + 4 * 3 * 5


def test_deformable_convolutions():
    call = observe(nn.Sequential(DeformConv2d()), (3, 6, 6)).calls["0"]
    assert call.kind == "DeformConv2d" and call.kernel == (3, 3) and call.macs == 4 * 36 * 27


def test_an_outline_sees_the_same():
    for network, size in ((Residual(), (3, 8, 8)), (Mobile(), (3, 16, 16)), (Awkward(), (3, 6, 6))):
        real, outline = observe(network, size), observe_outline(network, size)
        assert real.calls == outline.calls and real.linears == outline.linears and real.order == outline.order
        assert real.output_shapes == outline.output_shapes and real.linear_macs == outline.linear_macs
