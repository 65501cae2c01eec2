"""Fused adders: the same network as torch's, in stock onnxruntime, in onnx's evaluator and in the native library."""

import copy
import functools
import shutil

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from networks import Inverted, ZeroPadded
from onnx.reference import ReferenceEvaluator
from torch import nn

from anncvt.nn import AdderConv2d
from anncvt.runtime import onnx_native
from anncvt.runtime.onnx import export_network, run, session

SIZE = (3, 12, 10)


class Block(nn.Module):
    """Two adders around a shortcut that is an adder itself, then a bias, a grouped layer and a ReLU6 that is reused."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn1 = AdderConv2d(3, 20, 3, 2, 1), nn.BatchNorm2d(20)
        self.second, self.bn2 = AdderConv2d(20, 18, 3, 1, 1), nn.BatchNorm2d(18)
        self.short, self.bn3 = AdderConv2d(3, 18, 1, 2), nn.BatchNorm2d(18)
        self.biased, self.bn4 = AdderConv2d(18, 18, 1, bias=True), nn.BatchNorm2d(18)
        self.grouped, self.bn5 = AdderConv2d(18, 6, 3, padding=(1, 0), groups=2), nn.BatchNorm2d(6)
        self.bare = AdderConv2d(6, 4, 1)

    def forward(self, x):
        y = self.bn2(self.second(F.relu(self.bn1(self.first(x)))))
        y = F.relu(y + self.bn3(self.short(x)))
        y = F.relu6(self.bn4(self.biased(y)) + y)
        z = self.bn5(self.grouped(y))
        return torch.cat([self.bare(z).mean((2, 3)), z.mean((2, 3)), y.amax((2, 3))], 1)


def settled(network, size=SIZE):
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        network.train()(torch.randn(16, *size))
    return network.eval()


def with_adders(network):
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d) and name != "stem" and child.groups == 1 and child.in_channels > 3:
                setattr(module, name, AdderConv2d.from_conv(child))
    return network


NETWORKS = {
    "block": (Block, SIZE),
    "zero padded": (ZeroPadded, (3, 8, 8)),
    "inverted": (Inverted, (3, 8, 8)),
}


@pytest.fixture(scope="module")
def export_of(tmp_path_factory):
    """Networks of :data:`NETWORKS` by name, their input sizes and files; each is exported once."""
    folder = tmp_path_factory.mktemp("fused")

    @functools.cache
    def made(name):
        make, size = NETWORKS[name]
        torch.manual_seed(0)
        network = settled(with_adders(make()), size)
        return network, size, export_network(network, size, folder / name / "model.onnx", fuse=True)

    return made


@pytest.fixture(params=NETWORKS)
def exported(request, export_of):
    return export_of(request.param)


def images_of(size, count=3):
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(2)).numpy()


def expected_of(network, x):
    with torch.no_grad():
        return copy.deepcopy(network)(torch.from_numpy(x)).numpy()


def assert_near(actual, expected):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


def adders(path):
    return [node for node in onnx.load(path).graph.node if node.domain]


def test_stock_onnxruntime(exported):
    network, size, path = exported
    opened = session(path, library="none")
    for count in (1, 3):
        x = images_of(size, count)
        assert_near(run(opened, x), expected_of(network, x))


def test_reference_evaluator(exported):
    network, size, path = exported
    x = images_of(size)
    assert_near(ReferenceEvaluator(str(path)).run(None, {"image": x})[0], expected_of(network, x))


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_native_library(exported):
    network, size, path = exported
    """In float32, as the others are; in fixed point it is a test of the library."""
    library = onnx_native.build([path], path.parent / onnx_native.LIBRARY, target="cpu", fixed=False)
    opened = session(path)
    assert opened.anncvt.native and opened.anncvt.library == library
    for count in (1, 3):
        x = images_of(size, count)
        assert_near(run(opened, x), expected_of(network, x))
    library.unlink()


def test_what_is_fused(export_of):
    path = export_of("block")[2]
    ops = [(node.op_type, node.name) for node in adders(path)]
    assert sorted(op for op in ops if op[0].startswith("Fused")) == [
        ("FusedAdder2d", "bare"),
        ("FusedAdder2d", "first"),
        ("FusedAdder2d", "grouped"),
        ("FusedAdder2d", "short"),
        ("FusedAdder2dResidual", "biased"),
        ("FusedAdder2dResidual", "second"),
    ]
    # The image once, for two layers; what means, the maximum and nobody else read.
    assert sorted(op for op, _ in ops if "Fused" not in op) == ["Block", "Unblock", "Unblock", "Unblock"]
    model = onnx.load(path)
    assert not {"BatchNormalization", "Relu", "Clip", "Add"} & {node.op_type for node in model.graph.node}
    used = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= used


def test_blocked_tensors_between_layers(tmp_path):
    """A chain of layers changes layout at its two ends only."""
    torch.manual_seed(0)
    layers = [(AdderConv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(3)]
    network = settled(nn.Sequential(nn.Conv2d(3, 8, 1), *(part for layer in layers for part in layer), nn.Flatten()))
    path = export_network(network, SIZE, tmp_path / "model.onnx", fuse=True)
    assert [node.op_type for node in adders(path)] == ["Block", *["FusedAdder2d"] * 3, "Unblock"]
    again = export_network(network, SIZE, tmp_path / "again.onnx", fuse=True)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("opset", [15, *(pytest.param(opset, marks=pytest.mark.slow) for opset in (17, 20)), 23])
def test_opsets(tmp_path, opset):
    torch.manual_seed(0)
    network = nn.Sequential(AdderConv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(400, 4))
    network = settled(network)
    path = export_network(network, SIZE, tmp_path / "model.onnx", opset=opset, fuse=True)
    assert "FusedAdder2d" in {node.op_type for node in adders(path)}
    x = images_of(SIZE)
    assert_near(run(session(path), x), expected_of(network, x))


def test_a_body_without_control_flow(tmp_path):
    """Fused adders are defined by the adder, whichever way that is."""
    torch.manual_seed(0)
    network = settled(nn.Sequential(AdderConv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten()))
    path = export_network(network, SIZE, tmp_path / "model.onnx", body="one", fuse=True)
    functions = onnx.load(path).functions
    assert "FusedAdder2d" in {function.name for function in functions}
    assert not {node.op_type for function in functions for node in function.node} & {"Loop", "Scan", "If"}
    x = images_of(SIZE)
    assert_near(run(session(path), x), expected_of(network, x))


def test_a_network_without_adders_is_left_alone(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()).eval()
    path = export_network(network, SIZE, tmp_path / "model.onnx", fuse=True)
    assert not onnx.load(path).functions


def test_weights_in_half_precision(tmp_path):
    from onnxruntime.transformers.float16 import convert_float_to_float16

    torch.manual_seed(0)
    network = settled(nn.Sequential(AdderConv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU6(), nn.Flatten()))
    path = export_network(network, SIZE, tmp_path / "model.onnx", fuse=True)
    onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), path)
    x = images_of(SIZE)
    np.testing.assert_allclose(run(session(path), x), expected_of(network, x), atol=0.1)
