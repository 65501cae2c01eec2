"""Training kernels against those of a CNN: layers forward and backward, whole steps, memory."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from resnets import NETWORKS, resnet20
from shapes import OTHERS, RESNET20, Layer
from timing import interleaved
from torch import Tensor

LAST = torch.channels_last
_CALLS = ("conv_forward", "adder_forward", "conv_train", "full_train", "exact_train")


def measure(options: argparse.Namespace, clock: Callable[[], float], peaks: dict[str, float]) -> dict[str, Any]:
    """Print rows of layers, their sum over ResNet-20, and a training step with its memory; returns them."""
    base, rows = options.batch or 64, []
    totals = {stride: dict.fromkeys(_CALLS, 0.0) for stride in (1, 2)}
    print(f"{'layer':38} {'conv':>9} {'adder':>9} {'ratio':>6}   {'conv f+b':>9} {'full':>6} {'exact':>6}")
    for layer in RESNET20 + OTHERS:
        batch = base if layer in RESNET20 else max(1, base // 4)
        times = layer_times(layer, batch, options.repeats, clock)
        if layer in RESNET20:
            total = totals[layer.stride]
            totals[layer.stride] = {name: total[name] + layer.count * times[name] for name in total}
        rows.append({"layer": str(layer), "batch": batch, **times})
        print_row(str(layer), times, layer.ops(batch))
    for stride, total in totals.items():
        print_row(f"ResNet-20, layers of stride {stride}", total)
    step = step_times(options.step_batch, max(3, options.repeats // 2), clock)
    peak = {name: step_memory(name, options.step_batch) for name in NETWORKS}
    for figure, name, unit in ((step, "time", 1e3), (peak, "memory", 1 / 1024)):
        print(
            f"ResNet-20 training step, batch {options.step_batch}, {name}: CNN {figure['conv'] * unit:.0f} "
            f"{'ms' if name == 'time' else 'MiB'}, adder full {figure['full'] / figure['conv']:.2f}x, "
            f"exact {figure['exact'] / figure['conv']:.2f}x"
        )
    return {"layers": rows, "resnet20": totals, "step": step, "step_kib": peak}


def layer_times(layer: Layer, batch: int, repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of forward, and of forward + backward, for the convolution and the adder with either gradient."""
    x = torch.randn(batch, layer.channels, layer.size, layer.size).to(memory_format=LAST)
    weight = torch.randn(layer.outputs, layer.channels // layer.groups, layer.kernel, layer.kernel)
    leaf_x, leaf_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()

    def convolution(a: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(a, b, None, layer.stride, layer.padding, 1, layer.groups)

    def adder(a: Tensor, b: Tensor, gradient: str = "full") -> Tensor:
        sides, step = [layer.padding] * 2, [layer.stride] * 2
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


def step_of(name: str, batch: int) -> Callable[[], None]:
    """One SGD step of ResNet-20 as a call."""
    x, labels = torch.randn(batch, 3, 32, 32).to(memory_format=LAST), torch.randint(0, 10, (batch,))
    network = resnet20(NETWORKS[name]).to(memory_format=LAST)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(x), labels).backward()
        optimizer.step()

    return step


def step_times(batch: int, repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of a step of the CNN and of the adder network with either gradient."""
    return interleaved({name: step_of(name, batch) for name in NETWORKS}, repeats, clock)


def step_memory(name: str, batch: int) -> int:
    """KiB that a step holds at its most, on top of what a fresh process with the network has before it."""
    return peak_growth(step_of, (name, 2), (name, batch))


def peak_growth(make: Callable[..., Callable[[], None]], first: tuple[object, ...], then: tuple[object, ...]) -> int:
    """KiB by which memory grows at its most in three calls of ``make(*then)``, in a process of its own.

    One call of ``make(*first)``, before, loads libraries and kernels.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_growth, (make, first, then))


def _growth(make: Callable[..., Callable[[], None]], first: tuple[object, ...], then: tuple[object, ...]) -> int:
    make(*first)()
    step = make(*then)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    before = _status("VmRSS")
    for _ in range(3):
        step()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    """A figure of /proc/self/status in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


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
