import torch
from networks import Auxiliary, Awkward, Mobile, Residual
from torch import fx, nn

from anncvt.passes.observe import observe
from anncvt.passes.pieces import node_values
from anncvt.passes.trace import trace


def test_readers_of_a_plain_network():
    traced = trace(Residual())
    assert [part.path for part in traced.parts] == [""] and traced.untraceable == ()
    assert traced.readers["conv1"] == ("bn1",) and traced.readers["down.0"] == ("down.1",)


def test_an_untraceable_block_costs_only_itself():
    traced = trace(Awkward())
    assert [part.path for part in traced.untraceable] == ["branch"]
    assert "control flow" in traced.untraceable[0].reason
    assert traced.readers["stem"] == (".relu()",) and "branch.conv" not in traced.readers


def test_children_of_an_untraceable_block_are_traced():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Residual(), Residual()])

        def forward(self, x):
            return self.blocks[0](x) if x.sum() > 0 else self.blocks[1](x)

    traced = trace(Outer())
    assert [part.path for part in traced.parts] == ["", "blocks.0", "blocks.1"]
    assert traced.readers["blocks.1.conv2"] == ("blocks.1.bn2",)


def test_identity_is_looked_through():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity(), nn.Identity(), nn.BatchNorm2d(4))
    assert trace(network).readers["0"] == ("3",)


def test_subtrees_without_convolutions_are_not_inlined():
    class Odd(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    traced = trace(nn.Sequential(nn.Conv2d(3, 4, 1), Odd()))
    assert traced.untraceable == () and traced.readers["0"] == ("1",)


def test_tracing_leaves_the_network_alone():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.last = None

        def forward(self, x):
            self.last = self.conv(x)
            return self.last

    network = Remembers().train()
    trace(network)
    assert network.last is None and network.training and torch.is_tensor(network.conv.weight)


def test_graphs_agree_with_what_happens():
    for network, size in ((Residual(), (3, 8, 8)), (Mobile(), (3, 16, 16))):
        readers, calls = trace(network).readers, observe(network, size).calls
        modules = dict(network.named_modules())
        for name, call in calls.items():
            assert {r for r in readers[name] if r in modules} == {r for r in call.readers if r in modules}


def test_training_mode_shows_other_readers():
    network = Auxiliary()
    assert trace(network).readers == {"conv": ("bn",)}
    training = trace(network, training=True).readers
    assert set(training["conv"]) == {"bn", "aux"} and training["aux"] == (".output()",)
    assert network.training, "its own mode is left alone"


def test_linear_layers_are_found_on_request():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x).relu()

    network = nn.Sequential(nn.Flatten(), Block(), nn.Linear(4, 2))
    plain, linear = trace(network).parts[0].graph, trace(network, linear=True).parts[0].graph
    assert [node.target for node in plain.nodes if node.op == "call_module"] == ["0", "1", "2"]
    assert [node.target for node in linear.nodes if node.op == "call_module"] == ["0", "1.linear", "2"]


class Optional(Residual):
    """Arguments that have defaults, and a constant that the forward pass makes."""

    def forward(self, x, mask=None, *, sizes=(1, 2), features=False, **more):
        x = super().forward(x - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1))
        x = x if mask is None else x * mask
        return {"features": x} if features else {"logits": x}


def test_arguments_with_defaults_and_constants_leave_a_graph_of_one_input():
    network = Optional().eval()
    graph = trace(network).parts[0].graph
    assert [node.target for node in graph.find_nodes(op="placeholder")] == ["x"]
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(fx.GraphModule(network, graph)(x)["logits"], network(x)["logits"])
    values = node_values(graph, network, x)
    assert torch.equal(values[graph.output_node().args[0]["logits"]], network(x)["logits"])
