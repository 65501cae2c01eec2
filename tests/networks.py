"""Tiny networks, one for each thing that a pretrained CNN can do to a converter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Stem, one residual block with a strided shortcut, linear classifier: ``[N, 3, 8, 8] -> [N, 5]``."""

    def __init__(self, width: int = 4, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * width)
        self.conv2 = nn.Conv2d(2 * width, 2 * width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.down = nn.Sequential(nn.Conv2d(width, 2 * width, 1, 2, bias=False), nn.BatchNorm2d(2 * width))
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        y = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(y)) + self.down(x))
        return self.head(x.mean((2, 3)))


class Mobile(nn.Module):
    """Pointwise, depthwise, grouped, a squeeze-and-excitation gate and a convolutional classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.expand = nn.Conv2d(8, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.squeeze = nn.Conv2d(16, 4, 1)
        self.excite = nn.Conv2d(4, 16, 1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(16)
        self.classifier = nn.Conv2d(16, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.expand(F.relu(self.stem(x))))
        x = self.depthwise(x)
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        x = F.relu(self.norm(self.grouped(x)))
        return self.classifier(F.adaptive_avg_pool2d(x, 1)).flatten(1)


class Awkward(nn.Module):
    """Control flow on values; functional, shared, idle, transposed and subclassed convolutions."""

    class Standardised(nn.Conv2d):
        """Weight standardisation."""

        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    class Branch(nn.Module):
        """Symbolic tracing cannot follow this ``if``."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 1e6:
                x = x - 1
            return self.bn(self.conv(x))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.branch = self.Branch()
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.alias = self.shared
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.standardised = self.Standardised(4, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 2, 2)
        self.idle = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.branch(F.relu(self.stem(x)))
        x = F.relu(self.alias(F.relu(self.shared(x))))
        x = self.standardised(F.conv2d(x, self.weight, padding=1))
        x = self.up(x)
        if self.training:
            x = x + self.idle(x)
        return self.head(x.mean((2, 3)))


class Same(nn.Conv2d):
    """TensorFlow's padding, by the size of the input."""

    def forward(self, x: Tensor) -> Tensor:
        sides: list[int] = []
        for size, k, s, d in zip(x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True):
            total = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
            sides = [total // 2, total - total // 2, *sides]
        return F.conv2d(F.pad(x, sides), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Auxiliary(nn.Module):
    """A second head that runs in training only and reads the main path's convolution, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.aux = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        y = self.conv(x)
        return (self.bn(y), self.aux(y)) if self.training else self.bn(y)


class DeformConv2d(nn.Module):
    """Stands in for torchvision's, whose op needs its compiled library."""

    stride = (1, 1)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1].expand(-1, 4, -1, -1) * self.weight.sum()


class ZeroPadded(nn.Module):
    """A residual block whose shortcut takes every second pixel and pads channels with zeros (CIFAR ResNets)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(4, 8, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = F.relu(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) + y)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Inverted(nn.Module):
    """An inverted residual: pointwise, depthwise with padding on two sides, ReLU6, a signed sum, pools, a wide head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU6(inplace=True))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.expand = nn.Sequential(nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(
            nn.Conv2d(12, 12, 3, 1, 0, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU6(inplace=True)
        )
        self.project = nn.Sequential(nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.average = nn.AvgPool2d(2)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(24, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        x = x + self.project(self.depthwise(F.pad(self.expand(x), (1, 1, 0, 2))))
        return self.classifier(self.average(x).view(x.size(0), -1))


class Joined(nn.Module):
    """Concatenations: of branches and a pool that rounds up, of features that grow (a DenseNet's), with the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.left = nn.Sequential(nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(4, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU6())
        self.first = nn.Sequential(nn.BatchNorm2d(15), nn.ReLU(), nn.Conv2d(15, 4, 1), nn.BatchNorm2d(4))
        self.second = nn.Sequential(nn.BatchNorm2d(19), nn.ReLU(), nn.Conv2d(19, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.last = nn.Sequential(nn.Conv2d(26, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.pool(self.stem(image))
        features = [torch.cat([self.left(x), self.right(x), F.max_pool2d(x, 3, 1, 1)], 1)]
        for grow in (self.first, self.second):
            features.append(grow(torch.cat(features, dim=-3)))
        x = self.last(torch.cat([*features, image[:, :, ::2, ::2]], 1))
        return self.head(x.mean((2, 3)))


class Shuffled(nn.Module):
    """A ShuffleNet's units: channels are split, one part is worked on, both are joined and shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.first = nn.Sequential(nn.Conv2d(3, 9, 1, bias=False), nn.BatchNorm2d(9), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(5, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU())
        self.shuffle = nn.ChannelShuffle(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, dim=1)
        x = torch.cat((left, self.first(right)), 1)
        n, c, h, w = x.shape
        x = torch.transpose(x.view(n, 3, c // 3, h, w), 1, 2).contiguous().view(n, c, h, w)
        _, middle, last = torch.split(x, [2, 5, 5], 1)
        x = self.shuffle(torch.cat((x[:, : c // 2], self.second(middle), last), 1))
        return self.head(x[:, 8:12].mean((2, 3)))


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's: the activation is part of the norm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "4-d")
        mean, variance = self.running_mean, self.running_var
        x = F.batch_norm(x, mean, variance, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(self.drop(x))


class NormAct(Residual):
    """:class:`Residual` whose first norms have the activation in them."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.bn1 = BatchNormAct2d(4), BatchNormAct2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x))
        x = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))) + self.down(x))
        return self.head(x.mean((2, 3)))
