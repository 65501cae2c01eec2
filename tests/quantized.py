"""Small converted programs with activations worth quantising, and images for them."""

from __future__ import annotations

import torch
from torch import nn

from anncvt.images import Images
from anncvt.loading import load
from anncvt.passes.plan import plan
from anncvt.passes.rewrite import rewrite
from anncvt.program import Program


def noise(count: int, size: tuple[int, ...], seed: int = 0) -> Images:
    """Images of noise, without labels."""
    generator = torch.Generator().manual_seed(seed)
    return Images(torch.randint(0, 256, (count, *size), generator=generator, dtype=torch.uint8), None, None, "noise")


def adder_program(network: nn.Module, size: int, **options) -> Program:
    """``network`` with adders, its BatchNorm statistics and lines such that every layer's output is spread."""
    torch.manual_seed(0)
    program = rewrite(plan(load(network, input_size=size, mean=(0.5,), std=(0.25,)), **options))
    assert program.student is not None
    for module in program.student.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)
            module.momentum = None
            module.reset_running_stats()
    images = noise(64, program.preprocess.input_size)
    with torch.no_grad():
        program.student.train()(images.batch(torch.arange(64), program.preprocess))
    program.student.eval()
    return program
