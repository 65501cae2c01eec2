"""A distillation that takes a second: five classes of colours, a residual block, and its weights at the end."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from networks import Residual

from anncvt.images import Images
from anncvt.loading import load
from anncvt.passes.plan import plan
from anncvt.passes.rewrite import rewrite
from anncvt.pkkd import DistillConfig, distill

QUICK = DistillConfig(epochs=2, batch_size=16, lr=0.02, checkpoint_seconds=0.0)


def images(count=96):
    """Five classes told apart by colour and brightness."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 5
    base = torch.tensor([[200, 30, 30], [30, 200, 30], [30, 30, 200], [220, 220, 220], [20, 20, 20]])
    noise = torch.randint(-20, 20, (count, 3, 8, 8), generator=generator)
    pixels = (base[labels][:, :, None, None] + noise).clamp(0, 255).to(torch.uint8)
    return Images(pixels, labels, [str(n) for n in range(5)], "colours")


@functools.cache
def teacher():
    torch.manual_seed(0)
    # 16 channels: oneDNN 3.12 damages memory in the strided 1x1 convolutions of a learning teacher with fewer.
    network = Residual(16)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    data = images()
    x = (data.pixels.float() / 255 - 0.45) / 0.22
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x), data.labels).backward()
        optimizer.step()
    return network.eval()


def program():
    return rewrite(plan(load(teacher(), input_size=(3, 8, 8), mean=(0.45,), std=(0.22,))))


@functools.cache
def undisturbed(config):
    """Weights after a run that nothing stopped."""
    with tempfile.TemporaryDirectory() as folder:
        return weights(distill(program(), images(), None, config, folder=Path(folder)))


def weights(trained):
    return {name: value.clone() for name, value in trained.student.state_dict().items()}
