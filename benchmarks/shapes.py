"""Layer shapes that the speed benchmarks share."""

from __future__ import annotations

from typing import NamedTuple


class Layer(NamedTuple):
    """One convolution shape (square, padded to keep its size) and how often the network has it."""

    size: int
    channels: int
    outputs: int
    kernel: int
    stride: int = 1
    groups: int = 1
    count: int = 1

    def __str__(self) -> str:
        kind = "depthwise " if self.groups == self.channels else ""
        window = f"{self.kernel}x{self.kernel}/{self.stride}"
        return f"{kind}{self.size}x{self.size}x{self.channels} -> {self.outputs}, {window}"

    @property
    def padding(self) -> int:
        return self.kernel // 2

    def ops(self, batch: int) -> int:
        """One op is one ``|x - w|`` or one multiply-add."""
        pixels = (-(-self.size // self.stride)) ** 2
        return batch * pixels * self.outputs * self.channels // self.groups * self.kernel**2


RESNET20 = [
    Layer(32, 16, 16, 3, 1, count=6),
    Layer(32, 16, 32, 3, 2),
    Layer(16, 32, 32, 3, 1, count=5),
    Layer(16, 32, 64, 3, 2),
    Layer(8, 64, 64, 3, 1, count=5),
]

#: All that conversion swaps: the stem stays a convolution.
RESNET50 = [
    Layer(56, 64, 64, 1),
    Layer(56, 64, 64, 3, count=3),
    Layer(56, 64, 256, 1, count=4),
    Layer(56, 256, 64, 1, count=2),
    Layer(56, 256, 128, 1),
    Layer(56, 128, 128, 3, 2),
    Layer(28, 128, 512, 1, count=4),
    Layer(56, 256, 512, 1, 2),
    Layer(28, 512, 128, 1, count=3),
    Layer(28, 128, 128, 3, count=3),
    Layer(28, 512, 256, 1),
    Layer(28, 256, 256, 3, 2),
    Layer(14, 256, 1024, 1, count=6),
    Layer(28, 512, 1024, 1, 2),
    Layer(14, 1024, 256, 1, count=5),
    Layer(14, 256, 256, 3, count=5),
    Layer(14, 1024, 512, 1),
    Layer(14, 512, 512, 3, 2),
    Layer(7, 512, 2048, 1, count=3),
    Layer(14, 1024, 2048, 1, 2),
    Layer(7, 2048, 512, 1, count=2),
    Layer(7, 512, 512, 3, count=2),
]

#: Shapes of other networks that the training benchmark adds.
OTHERS = [
    Layer(56, 64, 64, 3),
    Layer(56, 64, 256, 1),
    Layer(28, 128, 128, 3, 2),
    Layer(7, 512, 512, 3),
    Layer(56, 96, 96, 3, groups=96),
    Layer(14, 384, 384, 3, groups=384),
]
