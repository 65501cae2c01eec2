"""A small residual CNN for 16x16 grey digits: the network that the demo converts.

Eight convolutions in three residual blocks, one of them with stride 2 and a 1x1 shortcut, so that it has everything
that a larger ResNet has. From this folder it is ``--arch digits_net:DigitsNet``; ``digits_net.safetensors`` holds its
weights, made by ``train_digits_net.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: What the bundled weights expect: one channel of 16x16 pixels, (x / 255 - 0.5) / 0.5.
INPUT_SIZE = (1, 16, 16)
MEAN = (0.5,)
STD = (0.5,)


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut, ``[N, C, H, W] -> [N, O, H / stride, W / stride]``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = (
            nn.Identity()
            if stride == 1 and in_channels == out_channels
            else nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x))


class DigitsNet(nn.Module):
    """``[N, 1, H, W]`` float32 -> logits ``[N, classes]``; 38,266 parameters for ten classes."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = Block(16, 16)
        self.layer2 = Block(16, 32, stride=2)
        self.layer3 = Block(32, 32)
        self.fc = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
