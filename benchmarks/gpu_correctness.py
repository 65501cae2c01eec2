"""Whether the kernels for GPUs are right: a section of gpu.py.

Random layers against float64, their memory poisoned before, repeated to find races; CUDA graphs; torch.compile.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import anncvt.runtime.op  # noqa: F401  (registers the ops)
from anncvt.errors import first_line
from anncvt.nn import AdderConv2d
from anncvt.runtime import reference
from anncvt.runtime.geometry import output_size

#: Geometries: batch, channels, outputs (of each group), groups, size, kernel, stride, padding, dilation.
LOW = (1, 1, 1, 1, 1, 1, 1, 0, 1)
HIGH = (4, 70, 140, 3, 19, 4, 3, 3, 2)
#: Of the largest result. The full weight gradient is cuDNN's, which may take an algorithm that rounds more.
PRECISION, PRECISION_OF_CUDNN = 4e-6, 5e-5


def correctness(device: torch.device, quick: bool, until: float = float("inf")) -> Iterator[dict[str, Any]]:
    """As many cases of each type as asked for, fewer where the clock (``perf_counter``) is at ``until`` before."""
    generator = torch.Generator().manual_seed(0)
    for left, dtype in zip((3, 2, 1), (torch.float32, torch.float16, torch.bfloat16), strict=True):
        name = str(dtype).removeprefix("torch.")
        obstacle = obstacle_to(device, name)
        if obstacle:  # what would be checked instead is another type's kernels, or plain torch
            yield {"dtype": name, "failed": obstacle}
            continue
        worst: dict[str, float] = {}
        wrong, cases, wanted = [], 0, 1 if quick else 60 if dtype == torch.float32 else 20
        share = time.perf_counter() + (until - time.perf_counter()) / left
        while cases < wanted and (not cases or time.perf_counter() < share):
            cases += 1
            case, tensors, config = drawn(generator, device, dtype)
            for result, error, limit in compared(*tensors, config, repeats=2 if quick else 10):
                worst[result] = max(worst.get(result, 0.0), error)
                if not error <= limit:
                    wrong.append({"case": case, "result": result, "error": error})
        yield {"dtype": name, "cases": cases, "worst": worst, "wrong": wrong}
    if device.type == "cuda":
        found = {"cuda graph": tried(graph_agrees, device), "torch.compile": tried(compiled_agrees, device)}
        yield {**found, "wrong": [name for name, answer in found.items() if answer is not True]}


def obstacle_to(device: torch.device, dtype: str) -> str | None:
    """Why the kernels of a type would not be what runs."""
    if device.type != "cuda":
        return None
    from anncvt.runtime.kernels import cuda

    return cuda.obstacle(device, dtype)


def drawn(
    generator: torch.Generator, device: torch.device, dtype: torch.dtype
) -> tuple[list[int], tuple[Tensor, Tensor, Tensor], tuple[list[int], list[int], list[int], int]]:
    """A random layer: its numbers, ``(x, weight, grad)``, and its geometry."""
    numbers = [int(torch.randint(a, b + 1, (), generator=generator)) for a, b in zip(LOW, HIGH, strict=True)]
    batch, channels, outputs, groups, extra, kernel, stride, padding, dilation = numbers
    if channels % 3 == 0:  # vectors of four, and depthwise layers, are rare otherwise
        channels, outputs = channels + -channels % 4, outputs + -outputs % 4
    if channels % 7 == 0:
        channels, outputs, groups = 1, 1, channels
    size = dilation * (kernel - 1) + extra
    config = ([stride] * 2, [padding] * 2, [dilation] * 2, groups)
    shape = output_size((size, size + 1), (kernel, kernel), *config[:3])
    x = torch.randn(batch, channels * groups, size, size + 1, generator=generator).to(device, dtype)
    weight = torch.randn(outputs * groups, channels, kernel, kernel, generator=generator).to(device)
    grad = torch.randn(batch, outputs * groups, *shape, generator=generator).to(device, dtype)
    return numbers, (x, weight, grad), config


def compared(x: Tensor, weight: Tensor, grad: Tensor, config: Any, repeats: int) -> Iterator[tuple[str, float, float]]:
    """``(result, error, limit)``: against float64, relative to the largest; the same bits each time (no race)."""
    results: dict[str, Tensor] = {}
    for gradient in ("full", "exact"):
        for turn in range(repeats):
            now = computed(x, weight, grad, config, gradient)
            for name, result in now.items():
                # The full weight gradient is cuDNN's, which may add in any order.
                if turn and name != "full dw" and not torch.equal(result, results[name]):
                    yield f"{name}, repeated", float("inf"), 0.0
            results.update(now)
        expected_dx, expected_dw = reference.backward(grad, x, weight, *config, gradient)
        wanted = {f"{gradient} dx": expected_dx, f"{gradient} dw": expected_dw}
        wanted["forward"] = reference.forward(x, weight, *config)
        wanted["fused"] = ((wanted["forward"] + 2) / weight[0].numel() + grad.double()).clamp(min=-1)
        for name, expected in wanted.items():
            largest = max(1.0, float(expected.abs().max()))
            precision = PRECISION_OF_CUDNN if name == "full dw" else PRECISION
            limit = max(precision, torch.finfo(results[name].dtype).eps)
            yield name, float((results[name].double() - expected).abs().max()) / largest, limit
    if x.device.type == "cuda" and x.dtype == torch.float32:
        from anncvt.runtime.kernels.cuda import launch

        yield from compared_integers(launch.integer_forward, x, weight, config, repeats)


def computed(x: Tensor, weight: Tensor, grad: Tensor, config: Any, gradient: str) -> dict[str, Tensor]:
    """All results of the op, by name, in memory that held NaNs."""
    a, w = x.detach().requires_grad_(), weight.detach().requires_grad_()
    poison(x.device)
    y = op(a, w, config, gradient)
    dx, dw = torch.autograd.grad(y, (a, w), grad)
    fused = fused_op(x, weight, config, grad, -1.0)
    return {"forward": y.detach(), f"{gradient} dx": dx, f"{gradient} dw": dw, "fused": fused}


def compared_integers(
    forward: Callable[..., Tensor], x: Tensor, weight: Tensor, config: Any, repeats: int
) -> Iterator[tuple[str, float, float]]:
    """Exactly, with a padding that is not zero."""
    stride, (top, left), dilation, groups = config
    zero = 37
    a, w = (t.mul(40).add(128).clamp(0, 255).byte() for t in (x, weight))
    padded = torch.nn.functional.pad(a, (left, left, top, top), value=zero)
    expected = reference.forward(padded, w, stride, [0, 0], dilation, groups)
    for _ in range(repeats):
        poison(x.device)
        yield "uint8", float((forward(a, w, *config, zero=zero).double() - expected).abs().max()), 0.0


def op(x: Tensor, weight: Tensor, layer: Any, gradient: str = "full") -> Tensor:
    stride, padding, dilation, groups = layer
    return torch.ops.anncvt.adder2d(x, weight, stride, padding, dilation, groups, gradient)


def fused_op(x: Tensor, weight: Tensor, layer: Any, residual: Tensor | None, low: float | None) -> Tensor:
    """With a line that takes the results to about the size of what is added: ``2/taps + y/taps``."""
    scale = torch.full((len(weight),), 1 / weight[0].numel(), device=x.device)
    return torch.ops.anncvt.adder2d_fused(x, weight, scale, 2 * scale, residual, *layer, low, None)


def poison(device: torch.device) -> None:
    """Leave NaNs in the memory that the next tensors get."""
    for exponent in range(8, 23, 2):
        torch.full((1 << exponent,), float("nan"), device=device)


def tried(check: Callable[[torch.device], bool], device: torch.device) -> bool | str:
    """What a check finds, or the error it ends with: the others are still wanted."""
    try:
        return check(device)
    except Exception as error:  # compilers raise what they like
        return f"{type(error).__name__}: {first_line(error)}"


def graph_agrees(device: torch.device) -> bool:
    """A captured forward and backward pass, replayed on other values."""
    x = torch.randn(8, 64, 14, 14, device=device, requires_grad=True)
    weight = torch.randn(64, 64, 3, 3, device=device, requires_grad=True)
    grad = torch.randn(8, 64, 14, 14, device=device)

    def step() -> tuple[Tensor, ...]:
        y = op(x, weight, ([1, 1], [1, 1], [1, 1], 1), "exact")
        return (y.detach(), *torch.autograd.grad(y, (x, weight), grad))

    other = torch.cuda.Stream(device)
    other.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(other):  # as torch asks for: where it is captured
        step()  # loads the kernels
    torch.cuda.current_stream(device).wait_stream(other)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.normal_()
        grad.normal_()
    graph.replay()
    return all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def compiled_agrees(device: torch.device) -> bool:
    """Forward and backward; by Inductor where there is the C compiler that it needs."""
    layer = AdderConv2d(16, 32, 3, padding=1, gradient="exact").to(device)
    backend = "inductor" if shutil.which("cc") or shutil.which("gcc") else "aot_eager"
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(4, 16, 9, 9, device=device)
    pairs = []
    for network in (layer, compiled):
        y = network(x)
        pairs.append((y.detach(), *torch.autograd.grad(y.square().sum(), list(layer.parameters()))))
    return all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
