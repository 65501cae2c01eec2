"""Kernels compiled before training begins."""

from __future__ import annotations

import pytest
import torch
from recorder import Recorder
from torch import nn

from anncvt.nn import AdderConv2d
from anncvt.runtime.warmup import compile_kernels

cache = pytest.importorskip("anncvt.runtime.kernels.cache")
pytest.importorskip("tvm")


def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), AdderConv2d(8, 8, 3), AdderConv2d(8, 16, 1, 2))


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ANNCVT_CACHE", str(tmp_path))
    cache.clear()
    cache.counts.clear()
    yield
    cache.clear()


@pytest.mark.parametrize("gradient", ["full", "exact"])
def test_training_finds_all_kernels_ready(gradient):
    net, progress = network().train(), Recorder()
    for layer in net[2:]:
        layer.gradient = gradient
    compile_kernels(net, (3, 12, 12), progress)
    assert progress.totals == [2]
    assert progress.done == 2
    compiled = cache.counts["compiled"]
    assert compiled == 2 * (2 if gradient == "full" else 3)
    net(torch.randn(5, 3, 12, 12)).sum().backward()
    assert cache.counts["compiled"] == compiled


def test_the_network_stays_as_it_was():
    net = network().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    compile_kernels(net, (3, 12, 12))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert net.training
    assert not any(module._forward_hooks for module in net.modules())


def test_nothing_to_compile(monkeypatch):
    progress = Recorder()
    compile_kernels(nn.Conv2d(3, 8, 3), (3, 12, 12), progress)
    monkeypatch.setenv("ANNCVT_KERNELS", "torch")
    compile_kernels(network(), (3, 12, 12), progress)
    assert not progress.totals
