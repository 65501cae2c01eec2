"""Checks and measures the kernels for NVIDIA GPUs, in one call of less than ten minutes.

    $ python benchmarks/gpu.py --json gpu.json

On a machine without TVM the kernels have to be there already (docs/gpu.md). Every row is printed when it is measured,
so that a call that is cut short loses only the rest; what does not fit ``--minutes`` is left out, and said to be. With
``--device cpu --quick`` it shows that it works anywhere. Exits with 3 if a result is wrong or a section fails.

Sections: correctness (float64, memory poisoned before, repeated for races; CUDA graphs; torch.compile), the limit of
additions on this card, ResNet-50's layers, training steps of ResNet-20 and ResNet-50 with their memory, and both
networks in inference, their adders fused with what follows them or not.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from shapes import RESNET50, Layer
from torch import Tensor, nn
from training import NETWORKS, resnet20

from anncvt.nn import AdderConv2d
from anncvt.passes.fuse import fused
from anncvt.runtime import kernels, reference
from anncvt.runtime.geometry import output_size

#: And what part of the time that is left when it begins a section may take.
SECTIONS = {"correctness": 0.3, "limit": 1.0, "layers": 0.6, "steps": 0.7, "inference": 1.0}
#: Geometries: batch, channels, outputs (of each group), groups, size, kernel, stride, padding, dilation.
LOW = (1, 1, 1, 1, 1, 1, 1, 0, 1)
HIGH = (4, 70, 140, 3, 19, 4, 3, 3, 2)
LIMIT = """
extern "C" __global__ void limit(float *out, float step, int turns) {
  float sums[16], others[16], x = threadIdx.x;
#pragma unroll
  for (int i = 0; i < 16; i++) sums[i] = 0.f, others[i] = step * i;
  for (int turn = 0; turn < turns; turn++) {
    x += step;
#pragma unroll
    for (int i = 0; i < 16; i++) sums[i] += fabsf(x - others[i]);
  }
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < 16; i++) total += sums[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}
"""


def op(x: Tensor, weight: Tensor, layer: Any, gradient: str = "full") -> Tensor:
    stride, padding, dilation, groups = layer
    return torch.ops.anncvt.adder2d(x, weight, stride, padding, dilation, groups, gradient)


def fused_op(x: Tensor, weight: Tensor, layer: Any, residual: Tensor | None, low: float | None) -> Tensor:
    """With a line that takes the results to about the size of what is added: ``2/taps + y/taps``."""
    scale = torch.full((len(weight),), 1 / weight[0].numel(), device=x.device)
    return torch.ops.anncvt.adder2d_fused(x, weight, scale, 2 * scale, residual, *layer, low, None)


def seconds(call: Callable[[], object], device: torch.device, most: float = 0.5) -> float:
    """The median time of a call, of as many as fit ``most`` seconds (one at least) after one that is not counted."""
    times: list[float] = []
    call()
    synchronize(device)
    begin = time.perf_counter()
    while not times or (time.perf_counter() - begin < most and len(times) < 50):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            start_s = time.perf_counter()
            call()
            times.append(time.perf_counter() - start_s)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def poison(device: torch.device) -> None:
    """Leave NaNs in the memory that the next tensors get."""
    for exponent in range(8, 23, 2):
        torch.full((1 << exponent,), float("nan"), device=device)


def correctness(device: torch.device, quick: bool, until: float = float("inf")) -> Iterator[dict[str, Any]]:
    """As many cases of each type as asked for, fewer where the clock (``perf_counter``) is at ``until`` before."""
    generator = torch.Generator().manual_seed(0)
    for left, dtype in zip((3, 2, 1), (torch.float32, torch.float16, torch.bfloat16), strict=True):
        worst: dict[str, float] = {}
        wrong, cases, wanted = [], 0, 1 if quick else 60 if dtype == torch.float32 else 20
        share = time.perf_counter() + (until - time.perf_counter()) / left
        while cases < wanted and (not cases or time.perf_counter() < share):
            cases += 1
            drawn = [int(torch.randint(a, b + 1, (), generator=generator)) for a, b in zip(LOW, HIGH, strict=True)]
            batch, channels, outputs, groups, extra, kernel, stride, padding, dilation = drawn
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
            for name, error, limit in compare(x, weight, grad, config, repeats=2 if quick else 10):
                worst[name] = max(worst.get(name, 0.0), error)
                if not error <= limit:
                    wrong.append({"case": drawn, "result": name, "error": error})
        yield {"dtype": str(dtype), "cases": cases, "worst": worst, "wrong": wrong}
    if device.type == "cuda":
        found = {"cuda graph": graph_agrees(device), "torch.compile": compiled_agrees(device)}
        yield {**found, "wrong": [name for name, agrees in found.items() if not agrees]}


def compare(x: Tensor, weight: Tensor, grad: Tensor, config: Any, repeats: int) -> Iterator[tuple[str, float, float]]:
    """Results against float64, relative to the largest; the same bits every time (deterministic, hence no race)."""
    results: dict[str, Tensor] = {}
    for gradient in ("full", "exact"):
        for turn in range(repeats):
            a, w = x.detach().requires_grad_(), weight.detach().requires_grad_()
            poison(x.device)
            y = op(a, w, config, gradient)
            dx, dw = torch.autograd.grad(y, (a, w), grad)
            now = {"forward": y.detach(), f"{gradient} dx": dx, f"{gradient} dw": dw}
            now["fused"] = fused_op(x, weight, config, grad, -1.0)
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
            precision = 4e-6 if results[name].dtype == torch.float32 else torch.finfo(x.dtype).eps
            yield name, float((results[name].double() - expected).abs().max()) / largest, precision


def graph_agrees(device: torch.device) -> bool:
    """A captured forward pass, replayed on other values."""
    x, weight = torch.randn(8, 64, 14, 14, device=device), torch.randn(64, 64, 3, 3, device=device)
    config = ([1, 1], [1, 1], [1, 1], 1)
    op(x, weight, config)  # loads the kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op(x, weight, config)
    x.normal_()
    graph.replay()
    return torch.equal(y, op(x, weight, config))


def compiled_agrees(device: torch.device) -> bool:
    layer = AdderConv2d(16, 32, 3, padding=1).to(device)
    x = torch.randn(4, 16, 9, 9, device=device)
    return torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


def limit(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Taps a second if nothing but the two additions of each took time: no memory, no addresses."""
    if device.type != "cuda":
        return
    from anncvt.runtime.kernels.cuda import build, driver

    threads, turns = 256, 1 << (10 if quick else 14)
    blocks = driver.multiprocessors(device) * 8
    out = torch.empty(blocks * threads, device=device)
    function = driver.function_of(build.compiled(LIMIT, driver.architecture(device)), "limit", device)
    arguments = [ctypes.c_void_p(out.data_ptr()), ctypes.c_float(1e-3), ctypes.c_int(turns)]
    took = seconds(lambda: driver.enqueue(function, (blocks, 1, 1), threads, arguments, device), device)
    # 33 additions for 16 taps: x moves on, too.
    yield {"Gtaps/s": blocks * threads * turns * 16 * (33 / 32) / took / 1e9}


def by_cdist(x: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    patches = F.unfold(x, layer.kernel, 1, layer.padding, layer.stride).transpose(1, 2)
    return -torch.cdist(patches, weight.flatten(1).expand(len(x), -1, -1), p=1)


def by_broadcast(x: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    patches = F.unfold(x, layer.kernel, 1, layer.padding, layer.stride)
    return -(patches[:, None] - weight.flatten(1)[None, :, :, None]).abs().sum(2)


def layers(device: torch.device, quick: bool, batch: int) -> Iterator[dict[str, Any]]:
    total: dict[str, float] = {}
    for layer in RESNET50[:1] if quick else RESNET50:
        row: dict[str, Any] = {}
        for name, call in layer_calls(layer, device, batch):
            try:
                row[name] = seconds(call, device, 0.05 if quick else 0.15) * 1e3
            except torch.OutOfMemoryError:
                row[name] = None
                torch.cuda.empty_cache()
            total[name] = total.get(name, 0.0) + (row[name] or float("nan")) * layer.count
        yield {"layer": str(layer), "Gtaps": layer.ops(batch) / 1e9, "ms": row}
    yield {"layer": "all", "Gtaps": sum(layer.ops(batch) * layer.count for layer in RESNET50) / 1e9, "ms": total}


def layer_calls(layer: Layer, device: torch.device, batch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is measured of a layer, by name."""
    last = torch.channels_last
    config = ([layer.stride] * 2, [layer.padding] * 2, [1, 1], layer.groups)
    x = torch.randn(batch, layer.channels, layer.size, layer.size, device=device).to(memory_format=last)
    weight = torch.randn(layer.outputs, layer.channels // layer.groups, layer.kernel, layer.kernel, device=device)
    a, w = x.detach().requires_grad_(), weight.detach().requires_grad_()

    def both(forward: Callable[[], Tensor]) -> Callable[[], object]:
        def step() -> object:
            y = forward()
            return torch.autograd.grad(y, (a, w), torch.ones_like(y))

        return step

    def convolution(tf32: bool, *operands: Tensor) -> Tensor:
        torch.backends.cudnn.allow_tf32 = tf32
        return F.conv2d(*operands, None, *config[:3], layer.groups)

    line = torch.ones(layer.outputs, device=device)
    yield "adder float32", lambda: op(x, weight, config)
    yield "adder float32, fused with norm and ReLU", lambda: fused_op(x, weight, config, None, 0.0)
    yield "adder float32, norm, ReLU", lambda: F.relu(F.batch_norm(op(x, weight, config), line, line, line, line))
    half = x.bfloat16()
    yield "adder bfloat16", lambda: op(half, weight, config)
    if device.type == "cuda":
        from anncvt.runtime.kernels.cuda import launch

        u8, w8 = x.mul(32).add(128).clamp(0, 255).byte(), weight.mul(32).add(128).clamp(0, 255).byte()
        yield "adder uint8", lambda: launch.integer_forward(u8, w8, *config, zero=128)
    yield "convolution", lambda: convolution(False, x, weight)
    yield "convolution tf32", lambda: convolution(True, x, weight)
    yield "adder full, both ways", both(lambda: op(a, w, config, "full"))
    yield "adder exact, both ways", both(lambda: op(a, w, config, "exact"))
    yield "convolution, both ways", both(lambda: convolution(False, a, w))
    yield "convolution tf32, both ways", both(lambda: convolution(True, a, w))
    yield "cdist", lambda: by_cdist(x, weight, layer)
    yield "cdist, both ways", both(lambda: by_cdist(a, w, layer))
    differences = layer.ops(batch) * 4
    if device.type == "cuda" and differences < torch.cuda.mem_get_info(device)[0] / 5:
        yield "broadcast", lambda: by_broadcast(x, weight, layer)
        yield "broadcast, both ways", both(lambda: by_broadcast(a, w, layer))


def steps(device: torch.device, quick: bool, batch: int) -> Iterator[dict[str, Any]]:
    for name, images, size, make in networks(quick, batch):
        for kind, layer in NETWORKS.items():
            yield {"network": name, "layers": kind, "batch": images, **one_step(make, layer, device, images, size)}


def networks(
    quick: bool, batch: int
) -> Iterator[tuple[str, int, int, Callable[[Callable[..., nn.Module]], nn.Module]]]:
    """Name, batch, image size, and what makes it of a kind of layers; convolutions in float32."""
    torch.backends.cudnn.allow_tf32 = False
    yield "ResNet-20", 8 if quick else 256, 32, resnet20
    if not quick:
        yield "ResNet-50", batch, 224, resnet50


def inference(device: torch.device, quick: bool, batch: int) -> Iterator[dict[str, Any]]:
    """Forward passes in eval mode: the CNN, the adder network as it is, and fused as ``evaluate`` and ``run`` do it."""
    for name, images, size, make in networks(quick, batch):
        x = torch.randn(images, 3, size, size, device=device).to(memory_format=torch.channels_last)
        for kind in ("conv", "adder", "adder, fused"):
            try:
                network = make(NETWORKS["conv" if kind == "conv" else "full"]).to(device).eval()
            except ImportError as error:
                yield {"network": name, "layers": kind, "not measured": str(error)}
                continue
            with torch.inference_mode():
                running = fused(network) if kind == "adder, fused" else network
                took = seconds(functools.partial(running, x), device, 0.05 if quick else 1.0)
            yield {"network": name, "layers": kind, "batch": images, "ms": took * 1e3, "images/s": images / took}


def one_step(
    make: Callable[[Callable[..., nn.Module]], nn.Module],
    layer: Callable[..., nn.Module],
    device: torch.device,
    batch: int,
    size: int,
) -> dict[str, Any]:
    last = torch.channels_last
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=last)
    labels = torch.randint(0, 10, (batch,), device=device)
    try:
        network = make(layer).to(device, memory_format=last)
    except ImportError as error:
        return {"not measured": str(error)}
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(x), labels).backward()
        optimizer.step()

    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    took = seconds(step, device, 2.0)
    memory = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return {"ms": took * 1e3, "images/s": batch / took, "MiB": memory}


def resnet50(layer: Callable[..., nn.Module]) -> nn.Module:
    """torchvision's, with ``layer`` in the place of every convolution but the first."""
    from torchvision.models import resnet50 as original

    network = original()
    for name, old in list(network.named_modules()):
        if isinstance(old, nn.Conv2d) and name != "conv1":
            owner, _, leaf = name.rpartition(".")
            geometry = {"stride": old.stride, "padding": old.padding, "bias": False}
            new = layer(old.in_channels, old.out_channels, old.kernel_size, **geometry)
            setattr(network.get_submodule(owner), leaf, new)
    return network


def run(
    device: torch.device, sections: list[str], quick: bool, batch: int, minutes: float = 9.0
) -> Iterator[dict[str, Any]]:
    """Rows, each with the name of its section. A section that is out of time leaves out its other rows."""
    end = until = time.perf_counter() + 60 * minutes
    kinds: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "correctness": lambda: correctness(device, quick, until),
        "limit": lambda: limit(device, quick),
        "layers": lambda: layers(device, quick, batch),
        "steps": lambda: steps(device, quick, batch),
        "inference": lambda: inference(device, quick, batch),
    }
    about = {
        "torch": torch.__version__,
        "device": str(device),
        "compiled": kernels.usable(torch.empty(1, device=device)),
    }
    if device.type == "cuda":
        from anncvt.runtime.kernels import cuda

        about["gpu"] = torch.cuda.get_device_name(device)
        obstacle = cuda.obstacle(device)
        if obstacle:  # what would be checked and measured instead is plain torch
            yield {"section": "about", **about, "failed": obstacle}
            return
    yield {"section": "about", **about}
    for section in sections:
        begin = time.perf_counter()
        until = begin + (end - begin) * SECTIONS[section]
        try:
            for row in kinds[section]():
                yield {"section": section, **row}
                if time.perf_counter() > until:
                    yield {"section": section, "out of time": True}
                    break
        except Exception as error:  # the other sections are still wanted from a machine that is lent for minutes
            yield {"section": section, "failed": f"{type(error).__name__}: {error}"}
        yield {"section": section, "seconds": round(time.perf_counter() - begin, 1)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--batch", type=int, default=64, help="images of ResNet-50's layers and steps")
    parser.add_argument("--quick", action="store_true", help="a few small cases of each section")
    parser.add_argument("--minutes", type=float, default=9.0, help="how long it may take, about")
    parser.add_argument("--json", type=Path, help="where the rows go, besides standard output")
    options = parser.parse_args(arguments)
    sections = options.sections.split(",")
    if not set(sections) <= set(SECTIONS):
        parser.error(f"--sections takes {', '.join(SECTIONS)}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no GPU is visible to this torch")
    rows, failed = [], False
    for row in run(torch.device(options.device), sections, options.quick, options.batch, options.minutes):
        rows.append(row)
        failed |= bool(row.get("wrong") or row.get("failed"))
        print(json.dumps(row, default=str), flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1, default=str))
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
