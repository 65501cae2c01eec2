"""A small program that needs nothing of the passes: a teacher, and a student whose second convolution is an adder."""

from __future__ import annotations

import copy

import torch
from torch import nn

from anncvt.images import Images
from anncvt.nn import AdderConv2d
from anncvt.program import Preprocess, Program, Source

SIZE = (3, 8, 8)
CLASSES = 4


def tiny_program(folder=None, *, copies=1):
    torch.manual_seed(0)
    teacher = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )
    student = copy.deepcopy(teacher)
    student[2] = AdderConv2d.from_conv(student[2], copies=copies)
    for network in (teacher, student):
        network[3].momentum = None
        network.train()
        with torch.no_grad():
            for _ in range(4):
                network(torch.randn(16, *SIZE))
    return Program(
        Source("tiny"),
        Preprocess(SIZE, (0.5,), (0.25,)),
        teacher.eval(),
        student.eval(),
        folder=None if folder is None else str(folder),
    )


def tiny_images(count=9):
    pixels = torch.randint(0, 256, (count, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Images(pixels, None, None, "noise")
