"""Two processes with gloo on this machine do what one does."""

import copy
import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from colours import QUICK, images, program
from distil_colours import launched
from networks import Residual
from torch import nn

from anncvt.distillation.processes import Processes, running_statistics, synchronised
from anncvt.errors import AnncvtError
from anncvt.folder import open_folder
from anncvt.nn import LastNorm
from anncvt.pkkd import CHECKPOINT, LOG, distill

#: The order of sums is another one, and a ReLU or a sign of the exact gradient may fall the other way.
NOISE = {"rtol": 2e-3, "atol": 2e-3}


def losses(folder):
    rows = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return torch.tensor([[row[name] for name in ("loss", "ce", "kd", "mid")] for row in rows])


def alone(folder, **changes):
    net = program()
    distill(net, images(), None, dataclasses.replace(QUICK, sync_bn=True, **changes), folder=folder)
    return net.student.state_dict()


def test_two_processes_learn_what_one_does_and_one_goes_on_from_two(tmp_path):
    together, changes = tmp_path / "two", {"sync_bn": True}
    assert launched(together, changes=changes, processes=2, kill=("in a step", 8)) == [-9, -9]
    assert (together / CHECKPOINT).exists()
    net = program()
    distill(net, images(), None, dataclasses.replace(QUICK, **changes), folder=together, resume=True)
    expected = alone(tmp_path / "one")
    torch.testing.assert_close(losses(together), losses(tmp_path / "one"), **NOISE)
    for name, value in net.student.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0.05, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"teacher": "progressive", "feature_loss": "mse", "ema": 0.9}, {"mixup": 0.4}])
def test_the_same_curve_and_two_go_on_from_one(tmp_path, changes):
    changes = {**changes, "epochs": 4}
    expected = alone(tmp_path / "one", **changes)
    settings = {**changes, "sync_bn": True}
    assert launched(tmp_path / "two", changes=settings, kill=("in a step", 4)) == [-9]
    output = tmp_path / "weights.pt"
    assert launched(tmp_path / "two", changes=settings, processes=2, output=output) == [0, 0]
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), **NOISE)
    assert torch.load(output).keys() == expected.keys()


@pytest.mark.slow
def test_without_synchronised_norms_it_learns_all_the_same(tmp_path):
    assert launched(tmp_path, changes={"epochs": 6}, processes=2) == [0, 0]
    curve = losses(tmp_path)[:, 0]
    assert curve[-1] < 0.7 * curve[0]


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm2d(6), (4, 6, 5, 3)),
        (nn.BatchNorm1d(6, momentum=None), (8, 6)),
        (nn.BatchNorm3d(6, affine=False), (4, 6, 2, 3, 2)),
        (LastNorm(6), (4, 7, 6)),
        (nn.BatchNorm2d(6, track_running_stats=False), (4, 6, 5, 3)),
    ],
)
def test_the_synchronised_norm_is_the_norm(norm, shape):
    other, x = copy.deepcopy(norm), 3 * torch.randn(shape) - 40
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = torch.randn(shape)
    for _ in range(2):
        expected = norm(first)
        with synchronised(other, Processes()):
            got = other(second)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    ((got * weight).sum() + (expected * weight).sum()).backward()
    torch.testing.assert_close(second.grad, first.grad, rtol=1e-3, atol=1e-5)
    for a, b in zip(other.parameters(), norm.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    for a, b in zip(running_statistics(other), running_statistics(norm), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with synchronised(other.eval(), Processes()):
        torch.testing.assert_close(other(x), norm.eval()(x))
    assert "forward" not in vars(other)


def test_a_norm_that_may_do_more_is_not_replaced():
    class Activated(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    network = Residual()
    network.bn1 = Activated(8)
    with pytest.raises(AnncvtError, match="bn1: Activated cannot be synchronised"), synchronised(network, Processes()):
        pass
    assert "forward" not in vars(network.bn)


@pytest.mark.slow
def test_the_command_under_torchrun(converted):
    """One answer, one folder written; a verb that cannot be shared says so."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "anncvt"]
    run = functools.partial(subprocess.run, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=500)
    options = ["--limit", "128", "--batch-size", "32", "--sync-bn", "--json"]
    done = run([*launcher, "distill", str(converted), *options])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stage"] == "distilled"
    assert open_folder(converted).stage == "distilled"
    refused = run([*launcher, "evaluate", str(converted)])
    assert refused.returncode != 0 and "runs in one process, 2 were launched" in refused.stderr
