"""Adder layers against convolutions of the same shape, forward and training, on this machine.

    python benchmarks/kernels.py --threads 2 --batch 64
    python benchmarks/kernels.py --threads 1 --clock cpu --json kernels.json     # on a machine with other work to do

Every figure is a minimum over interleaved repeats: adder and convolution take turns, so that a disturbance hits both.
Both run channels_last, the better layout of torch's convolution too. Gop/s counts one ``|x - w|`` (or multiply-add) as
one op.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from typing import NamedTuple

import anncvt  # noqa: F401  (before torch: it sets the environment of the thread pools)

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anncvt.nn import AdderConv2d

LAST = torch.channels_last


class Layer(NamedTuple):
    """One convolution shape and how often the network has it."""

    size: int
    channels: int
    outputs: int
    kernel: int
    stride: int
    groups: int = 1
    count: int = 1

    def __str__(self) -> str:
        kind = "depthwise " if self.groups == self.channels else ""
        window = f"{self.kernel}x{self.kernel}/{self.stride}"
        return f"{kind}{self.size}x{self.size}x{self.channels} -> {self.outputs}, {window}"


RESNET20 = [
    Layer(32, 16, 16, 3, 1, count=6),
    Layer(32, 16, 32, 3, 2),
    Layer(16, 32, 32, 3, 1, count=5),
    Layer(16, 32, 64, 3, 2),
    Layer(8, 64, 64, 3, 1, count=5),
]
OTHERS = [
    Layer(56, 64, 64, 3, 1),
    Layer(56, 64, 256, 1, 1),
    Layer(28, 128, 128, 3, 2),
    Layer(7, 512, 512, 3, 1),
    Layer(56, 96, 96, 3, 1, groups=96),
]


def interleaved(calls: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """The least seconds of each call; they take turns."""
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = clock()
            call()
            best[name] = min(best[name], clock() - start)
    return best


def layer_times(layer: Layer, batch: int, repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of forward, and of forward + backward, for the convolution and the adder with either gradient."""
    padding = layer.kernel // 2
    x = torch.randn(batch, layer.channels, layer.size, layer.size).to(memory_format=LAST)
    weight = torch.randn(layer.outputs, layer.channels // layer.groups, layer.kernel, layer.kernel)
    leaf_x, leaf_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()

    def convolution(a: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(a, b, None, layer.stride, padding, 1, layer.groups)

    def adder(a: Tensor, b: Tensor, gradient: str = "full") -> Tensor:
        sides, step = [padding, padding], [layer.stride, layer.stride]
        return torch.ops.anncvt.adder2d(a, b, step, sides, [1, 1], layer.groups, gradient)

    grad = torch.randn_like(convolution(x, weight)).to(memory_format=LAST)

    def train(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, (leaf_x, leaf_weight), grad)

    calls: dict[str, Callable[[], object]] = {
        "conv_forward": lambda: convolution(x, weight),
        "adder_forward": lambda: adder(x, weight),
        "conv_train": lambda: train(convolution(leaf_x, leaf_weight)),
        "full_train": lambda: train(adder(leaf_x, leaf_weight)),
        "exact_train": lambda: train(adder(leaf_x, leaf_weight, "exact")),
    }
    return interleaved(calls, repeats, clock)


class Block(nn.Module):
    """Two 3x3 layers with BatchNorm and a shortcut."""

    def __init__(self, channels: int, outputs: int, layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.stride = 1 if channels == outputs else 2
        self.extra = outputs - channels
        self.first, self.norm1 = layer(channels, outputs, 3, self.stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.second, self.norm2 = layer(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
        return F.relu(y + shortcut)


def resnet20(layer: Callable[..., nn.Module]) -> nn.Module:
    """ResNet-20 for 32x32 images; ``layer`` makes the 3x3 layers after the stem."""
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [Block(a, b, layer) for a, b in itertools.pairwise(widths)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def step_times(batch: int, repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of one SGD step of ResNet-20: the CNN, the adder network with either gradient."""
    x, labels = torch.randn(batch, 3, 32, 32).to(memory_format=LAST), torch.randint(0, 10, (batch,))

    def step_of(layer: Callable[..., nn.Module]) -> Callable[[], object]:
        network = resnet20(layer).to(memory_format=LAST)
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(network(x), labels).backward()
            optimizer.step()

        return step

    calls: dict[str, Callable[[], object]] = {
        "conv": step_of(nn.Conv2d),
        "full": step_of(AdderConv2d),
        "exact": step_of(lambda *a, **k: AdderConv2d(*a, **k, gradient="exact")),
    }
    return interleaved(calls, repeats, clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=64, help="batch of the ResNet-20 layers (default 64)")
    parser.add_argument("--step-batch", type=int, default=128, help="batch of the training step (default 128)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: time of all threads together")
    parser.add_argument("--json", metavar="PATH", help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clock = time.perf_counter if options.clock == "wall" else time.process_time

    rows, totals = [], dict.fromkeys(["conv_forward", "adder_forward", "conv_train", "full_train", "exact_train"], 0.0)
    print(f"{options.threads} thread(s), batch {options.batch}, {options.clock} time")
    print(f"{'layer':38} {'conv':>9} {'adder':>9} {'ratio':>6}   {'conv f+b':>9} {'full':>6} {'exact':>6}")
    for layer in RESNET20 + OTHERS:
        batch = options.batch if layer in RESNET20 else max(1, options.batch // 16)
        times = layer_times(layer, batch, options.repeats, clock)
        pixels = (-(-layer.size // layer.stride)) ** 2
        ops = batch * pixels * layer.outputs * layer.channels // layer.groups * layer.kernel**2
        if layer in RESNET20:
            totals = {name: totals[name] + layer.count * times[name] for name in totals}
        rows.append({"layer": str(layer), "batch": batch, "gops": ops / times["adder_forward"] / 1e9, **times})
        print_row(str(layer), times, ops)
    print_row("ResNet-20, all layers", totals)
    step = step_times(options.step_batch, max(3, options.repeats // 2), clock)
    print(
        f"ResNet-20 training step, batch {options.step_batch}: CNN {step['conv'] * 1e3:.0f} ms, "
        f"adder full {step['full'] / step['conv']:.2f}x, exact {step['exact'] / step['conv']:.2f}x"
    )
    if options.json:
        settings = {"threads": options.threads, "clock": options.clock}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({**settings, "layers": rows, "resnet20": totals, "step": step}, file, indent=1)


def print_row(name: str, times: dict[str, float], ops: int = 0) -> None:
    """Forward in Gop/s where the op count is given, else in ms; ratios of the adder to the convolution."""
    forward = [ops / times[k] / 1e9 if ops else times[k] * 1e3 for k in ("conv_forward", "adder_forward")]
    unit = "Gop/s" if ops else "ms"
    ratio = times["adder_forward"] / times["conv_forward"]
    full, exact = (times[k] / times["conv_train"] for k in ("full_train", "exact_train"))
    print(
        f"{name:38} {forward[0]:5.1f}{unit:>4} {forward[1]:5.1f}{unit:>4} {ratio:6.2f}   "
        f"{times['conv_train'] * 1e3:7.2f}ms {full:6.2f} {exact:6.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
