"""The networks that training is measured with, of convolutions or adders; no collection of models is needed."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from anncvt.nn import AdderConv2d

#: What makes the layers of a network: ``layer(channels, outputs, kernel, stride, padding, bias=...)``.
Layers = Callable[..., nn.Module]

#: The layers between stem and classifier.
NETWORKS: dict[str, Layers] = {
    "conv": nn.Conv2d,
    "full": AdderConv2d,
    "exact": lambda *a, **k: AdderConv2d(*a, **k, gradient="exact"),
}


class Block(nn.Module):
    """Two 3x3 layers with BatchNorm and a shortcut."""

    def __init__(self, channels: int, outputs: int, layer: Layers) -> None:
        super().__init__()
        self.stride = 1 if channels == outputs else 2
        self.extra = outputs - channels
        self.first, self.norm1 = layer(channels, outputs, 3, self.stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.second, self.norm2 = layer(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
        return F.relu(y + shortcut)


def resnet20(layer: Layers) -> nn.Module:
    """ResNet-20 for 32x32 images; ``layer`` makes the 3x3 layers after the stem."""
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [Block(a, b, layer) for a, b in itertools.pairwise(widths)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 to four times the width, each with BatchNorm; a 1x1 in the first shortcut."""

    def __init__(self, channels: int, width: int, stride: int, layer: Layers) -> None:
        super().__init__()
        outputs = 4 * width
        self.first, self.norm1 = layer(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.second, self.norm2 = layer(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.third, self.norm3 = layer(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if channels != outputs:
            self.shortcut = nn.Sequential(layer(channels, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm2(self.second(F.relu(self.norm1(self.first(x))))))
        return F.relu(self.norm3(self.third(y)) + self.shortcut(x))


def resnet50(layer: Layers) -> nn.Module:
    """ResNet-50 for 224x224 images, torchvision's form; ``layer`` makes every convolution but the first."""
    stages = [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)]
    blocks, channels = [], 64
    for width, count, stride in stages:
        for at in range(count):
            blocks.append(Bottleneck(channels, width, stride if at == 0 else 1, layer))
            channels = 4 * width
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))
