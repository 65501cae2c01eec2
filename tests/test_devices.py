"""Where networks run: names of devices, and networks that come back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from anncvt.devices import choose, on
from anncvt.errors import AnncvtError


def test_names(monkeypatch):
    assert choose("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose("auto") == torch.device("cuda")
    assert choose("cuda:1") == torch.device("cuda", 1)


def test_devices_that_are_not_there(monkeypatch):
    with pytest.raises(AnncvtError, match="no device 'gpu'"):
        choose("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(AnncvtError, match="made for CPUs"):
        choose("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(AnncvtError, match="no GPU is visible"):
        choose("cuda")


class Moving(nn.Module):
    def __init__(self):
        super().__init__()
        self.places = []

    def to(self, device):
        self.places.append(str(device))
        return self


def test_networks_come_back_after_errors_too():
    network = Moving()
    with pytest.raises(RuntimeError), on(torch.device("cuda", 1), network, None):
        assert network.places == ["cuda:1"]
        raise RuntimeError
    assert network.places == ["cuda:1", "cpu"]
