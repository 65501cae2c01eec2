"""Fusing adders with what follows them: which patterns, and that the network computes the same."""

import pytest
import torch
import torch.nn.functional as F
from networks import Awkward, Inverted, Mobile, Residual, ZeroPadded
from torch import nn

from anncvt.fused import FusedAdder2d
from anncvt.nn import AdderConv2d
from anncvt.passes import fuse
from anncvt.passes.fuse import for_inference, fused


def adders(network: nn.Module) -> nn.Module:
    """``network`` with adders for its 2-d convolutions, and statistics in its norms that are not the initial ones."""
    torch.manual_seed(0)
    for name, module in list(network.named_modules()):
        if type(module) is nn.Conv2d and module.padding_mode == "zeros":
            owner, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(owner), leaf, AdderConv2d.from_conv(module))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(-30, 5)
            module.running_var.uniform_(50, 200)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return network.eval()


def layers(network: nn.Module) -> list[FusedAdder2d]:
    found = [module for module in network.modules() if isinstance(module, FusedAdder2d)]
    return list(dict.fromkeys(found))


@torch.no_grad()
def assert_same(network: nn.Module, x: torch.Tensor | None = None) -> nn.Module:
    """The fused network, which computes what ``network`` does and has left it alone."""
    x = torch.randn(2, 3, 8, 8) if x is None else x
    modules, state = dict(network.named_modules()), {k: v.clone() for k, v in network.state_dict().items()}
    expected = network(x.clone())
    result = fused(network)
    torch.testing.assert_close(result(x.clone()), expected, rtol=1e-4, atol=1e-4)
    assert dict(network.named_modules()) == modules
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    torch.testing.assert_close(network(x), expected)
    return result


@pytest.mark.parametrize("kind", [Residual, Mobile, Awkward, Inverted, ZeroPadded])
def test_networks_compute_the_same(kind):
    assert layers(assert_same(adders(kind())))


def test_norms_residuals_and_activations_are_taken():
    result = assert_same(adders(Residual()))
    assert [(layer.low, layer.high) for layer in layers(result)] == [
        (0.0, None),
        (0.0, None),
        (0.0, None),
        (None, None),
    ]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in result.modules())
    left = [node.target for node in result.graph.nodes if node.op in ("call_function", "call_module")]
    assert F.relu not in left and len(left) == 5


class Block(nn.Module):
    """One adder and norm; ``after`` is what follows."""

    def __init__(self, after, **options):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, **{"padding": 1, **options}), nn.BatchNorm2d(3)
        self.relu, self.relu6, self.after = nn.ReLU(inplace=True), nn.ReLU6(), after

    def forward(self, x):
        return self.after(self, x, self.bn(self.conv(x)))


@pytest.mark.parametrize(
    ("after", "limits", "inputs"),
    [
        (lambda m, x, y: m.relu(y), (0.0, None), 1),
        (lambda m, x, y: m.relu6(y + x), (0.0, 6.0), 2),
        (lambda m, x, y: F.hardtanh(torch.add(x, y), -2.0, 2.0), (-2.0, 2.0), 2),
        (lambda m, x, y: F.dropout(y, 0.5, m.training).clamp(min=-1), (-1.0, None), 1),
        (lambda m, x, y: F.silu(y + x), (None, None), 2),
        (lambda m, x, y: m.relu(y) + x, (0.0, None), 1),  # added behind the activation
        (lambda m, x, y: F.relu(y) + y, (None, None), 1),  # read twice
        (lambda m, x, y: F.relu(y + y), (None, None), 1),
        (lambda m, x, y: F.relu(torch.add(y, x, alpha=2)), (None, None), 1),
        (lambda m, x, y: F.relu(y + 1.5), (None, None), 1),
        (lambda m, x, y: F.relu(y.mean((2, 3), keepdim=True)) + x, (None, None), 1),
        (lambda m, x, y: F.relu6(F.relu(y)), (0.0, None), 1),
        (lambda m, x, y: F.relu(y + x[:, :, :1, :1]), (0.0, None), 2),  # another shape
        (lambda m, x, y: F.relu(y.mean((0, 2, 3), keepdim=True) + y), (None, None), 1),
    ],
)
def test_what_is_taken_after_a_norm(after, limits, inputs):
    result = assert_same(adders(Block(after)))
    (layer,) = layers(result)
    assert (layer.low, layer.high) == limits
    (node,) = (n for n in result.graph.nodes if n.op == "call_module" and n.target.startswith("fused"))
    assert len(node.args) == inputs


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, channels, act=None, drop=None, **options):
        super().__init__(channels, **options)
        self.drop, self.act = drop or nn.Identity(), act or nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Twice(NormAct):
    """Has the same modules and does more."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("norm", "limits"),
    [
        (NormAct(3), (0.0, None)),
        (NormAct(3, nn.ReLU6(), nn.Dropout(0.5)), (0.0, 6.0)),
        (NormAct(3, nn.SiLU(inplace=True)), (None, None)),
        (NormAct(3, affine=False), (0.0, None)),
        (Twice(3), (None, None)),
    ],
)
def test_a_norm_that_ends_with_an_activation_is_both(norm, limits):
    block = adders(Block(lambda m, x, y: y + x))
    block.bn = norm
    norm.running_mean.fill_(-25)
    norm.running_var.fill_(90)
    result = assert_same(block.eval())
    (layer,) = layers(result)
    assert (layer.low, layer.high) == limits
    assert any(type(module) is Twice for module in result.modules()) == isinstance(norm, Twice)
    assert not any(tensor.is_meta for tensor in result.state_dict().values())


def test_a_norm_without_statistics_is_left():
    block = adders(Block(lambda m, x, y: y))
    block.bn = NormAct(3, track_running_stats=False)
    (layer,) = layers(assert_same(block.eval()))
    assert (layer.low, layer.high) == (None, None)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_byobnet"])
def test_networks_of_timm(name):
    from anncvt import zoo

    if not zoo.names("timm"):
        pytest.skip("timm is not installed")
    network = adders(zoo.build("timm", name, {}).eval())
    kinds = {type(module).__name__ for module in network.modules()}
    assert "BatchNormAct2d" in kinds
    fused_layers = layers(assert_same(network, torch.randn(2, 3, 64, 64)))
    assert len(fused_layers) == sum(isinstance(module, AdderConv2d) for module in network.modules())
    assert sum(layer.shift.abs().sum() > 0 for layer in fused_layers) > len(fused_layers) / 2  # with their norms


class InPlace(nn.Module):
    """The adder's input is overwritten between the adder and its norm."""

    def __init__(self, other=False):
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), other

    def forward(self, x):
        x = x * 2
        y = self.conv(x)
        x = x.relu_() if not self.other else x.add_(self.bn(y))
        return (y if self.other else self.bn(y)) + x


@pytest.mark.parametrize("other", [False, True])
def test_what_is_overwritten_in_between_is_not_read_later(other):
    assert_same(adders(InPlace(other)))


@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"padding": "same", "kernel_size": 4}, {"padding_mode": "reflect"}, {"dilation": 2}, {"groups": 3}],
)
def test_geometries(options):
    block = Block(lambda m, x, y: F.relu(y))
    kernel = options.pop("kernel_size", 3)
    conv = nn.Conv2d(3, 3, kernel, **{"padding": 1, **options})
    block.conv = AdderConv2d.from_conv(conv, norm=True)
    assert len(layers(assert_same(adders(block)))) == 1


def test_a_layer_that_is_called_twice_is_fused_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.first, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.second(self.conv(self.first(self.conv(x))))

    assert len(layers(assert_same(adders(Twice())))) == 2


def test_blocks_of_a_network_that_cannot_be_traced():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Residual(), Residual()])

        def forward(self, x):
            assert self.blocks[0].stem is not None  # asks more of its blocks than to call them
            return self.blocks[0](x) if x.sum() > 0 else self.blocks[1](x)

    network = adders(Outer())
    result = assert_same(network, torch.ones(2, 3, 8, 8))
    assert_same(network, -torch.ones(2, 3, 8, 8))
    assert len(layers(result)) == 8


def test_networks_without_adders_and_on_cpus_stay(monkeypatch):
    network, x = adders(Residual()), torch.zeros(1, 3, 8, 8)
    assert for_inference(network, x) is network
    monkeypatch.setattr(fuse, "pays", lambda device: True)
    assert for_inference(network, x) is not network
    cnn = Residual().eval()
    assert for_inference(cnn, x) is cnn


def test_a_network_that_is_traced_wrongly_stays(monkeypatch):
    """Tracing sees a proxy, which is no tensor."""

    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(x if isinstance(x, torch.Tensor) else x + 1)

    notes = []

    class Notes:
        def note(self, message):
            notes.append(message)

    monkeypatch.setattr(fuse, "pays", lambda device: True)
    network = adders(Asks())
    assert for_inference(network, torch.randn(2, 3, 4, 4), Notes()) is network
    assert len(notes) == 1 and "not fused" in notes[0] and "differs by" in notes[0]


def test_training_modes_are_left(monkeypatch):
    monkeypatch.setattr(fuse, "pays", lambda device: True)
    network = adders(Residual()).train()
    network.bn.eval()
    for_inference(network, torch.randn(2, 3, 8, 8))
    assert network.training and not network.bn.training and network.bn1.training


def test_a_fused_network_compiles():
    network = fused(adders(Residual()))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = network(x)
        torch.testing.assert_close(torch.compile(network, fullgraph=True, backend="aot_eager")(x), expected)


def test_adders_of_several_copies_are_left_alone():
    network = adders(Residual())
    network.conv2 = AdderConv2d.from_conv(
        nn.Conv2d(*network.conv2.weight.shape[:2], 3, padding=1, bias=False), copies=2
    )
    result = assert_same(network)
    assert isinstance(result.get_submodule("conv2"), AdderConv2d)
