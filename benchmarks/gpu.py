"""Checks and measures the kernels for NVIDIA GPUs, in one call of less than ten minutes.

    $ python benchmarks/gpu.py --json gpu.json

Needs torch for CUDA alone. On a machine without TVM the kernels have to be there already (docs/gpu.md); with it they
are compiled first. Every row is printed when it is measured, so that a call that is cut short loses only the rest; what
does not fit ``--minutes`` is left out, and said to be. With ``--device cpu --quick`` it shows that it works anywhere.
Exits with 3 if a result is wrong or a section fails.

Sections: correctness (gpu_correctness.py), the limit of additions on this card, ResNet-50's layers, training steps of
ResNet-20 and ResNet-50 with their memory, and both networks in inference, their adders fused with what follows them or
not. A last row has the figures that there are aims for. cuDNN computes in float32 (tf32 off) unless a row says tf32.
"""

from __future__ import annotations

import argparse
import contextlib
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
from gpu_correctness import correctness, fused_op, op
from resnets import NETWORKS, Layers, resnet20, resnet50
from shapes import RESNET50, Layer
from torch import Tensor, nn

from anncvt.passes.fuse import fused
from anncvt.runtime import fallback, kernels

#: And what part of the time that is left when it begins a section may take.
SECTIONS = {"correctness": 0.3, "limit": 1.0, "layers": 0.6, "steps": 0.7, "inference": 1.0}
#: Seconds of work that are enqueued before a device is waited for, so that it does not wait for the host in between.
ENOUGH = 0.01
LIMIT = """
extern "C" __global__ void limit(float *out, float step, int turns) {
  float sums[16], others[16], x = threadIdx.x;
#pragma unroll
  for (int i = 0; i < 16; i++) sums[i] = 0.f, others[i] = out[i];
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


def seconds(call: Callable[[], object], device: torch.device, most: float = 0.5) -> float:
    """The median time of a call, of as many as fit ``most`` seconds (one at least) after two that are not counted."""
    call()
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    many = max(1, min(50, int(ENOUGH / (time.perf_counter() - begin)))) if device.type == "cuda" else 1
    times: list[float] = []
    begin = time.perf_counter()
    while not times or (time.perf_counter() - begin < most and len(times) < 50):
        times.append(elapsed(call, many, device) / many)
    return statistics.median(times)


def elapsed(call: Callable[[], object], many: int, device: torch.device) -> float:
    """Seconds of so many calls in a row."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(many):
            call()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(many):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether cuDNN may round what it multiplies to ten bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def limit(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Taps a second if nothing but the two additions of each took time: no memory, no addresses."""
    if device.type != "cuda":
        return
    from anncvt.runtime.kernels.cuda import build, driver

    threads, turns = 256, 1 << (10 if quick else 14)
    blocks = driver.multiprocessors(device) * 8
    out = torch.zeros(blocks * threads, device=device)
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


def by_product(grad: Tensor, x: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    """The full weight gradient of a 1x1 layer as one matrix product (cuBLAS), in place of a convolution's (cuDNN)."""
    met = x[:, :, :: layer.stride, :: layer.stride].permute(0, 2, 3, 1).flatten(0, 2)
    rows = grad.permute(0, 2, 3, 1).flatten(0, 2)
    return (rows.T @ met).addcmul_(weight.flatten(1), rows.sum(0)[:, None], value=-1).view_as(weight)


def layers(device: torch.device, quick: bool, batch: int) -> Iterator[dict[str, Any]]:
    measured: dict[str, list[float]] = {}
    chosen = RESNET50[:1] if quick else RESNET50
    for layer in chosen:
        row: dict[str, Any] = {}
        for name, call in layer_calls(layer, device, batch):
            try:
                row[name] = seconds(call, device, 0.05 if quick else 0.15) * 1e3
                measured.setdefault(name, []).append(row[name] * layer.count)
            except torch.OutOfMemoryError:
                row[name] = None
                torch.cuda.empty_cache()
        yield {"layer": str(layer), "count": layer.count, "Gtaps": layer.ops(batch) / 1e9, "ms": row}
    # Sums only of what every layer has: others could not be compared.
    total = {name: sum(times) for name, times in measured.items() if len(times) == len(chosen)}
    yield {"layer": "all", "Gtaps": sum(layer.ops(batch) * layer.count for layer in chosen) / 1e9, "ms": total}


def layer_calls(layer: Layer, device: torch.device, batch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is measured of a layer, by name."""
    last = torch.channels_last
    config = ([layer.stride] * 2, [layer.padding] * 2, [1, 1], layer.groups)
    x = torch.randn(batch, layer.channels, layer.size, layer.size, device=device).to(memory_format=last)
    weight = torch.randn(layer.outputs, layer.channels // layer.groups, layer.kernel, layer.kernel, device=device)
    a, w = x.detach().requires_grad_(), weight.detach().requires_grad_()
    grad = torch.randn_like(op(x, weight, config))

    def both(forward: Callable[[], Tensor], g: Tensor = grad) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), (a, w), g)

    def convolution(*operands: Tensor) -> Tensor:
        return F.conv2d(*operands, None, *config[:3], layer.groups)

    def in_tf32(call: Callable[[], object]) -> Callable[[], object]:
        def inside() -> object:
            with tf32(True):
                return call()

        return inside

    def backward(gradient: str, *needed: bool) -> Callable[[], object]:
        return lambda: torch.ops.anncvt.adder2d_backward(grad, x, weight, *config, gradient, *needed)

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
    yield "convolution", lambda: convolution(x, weight)
    yield "convolution tf32", in_tf32(lambda: convolution(x, weight))
    yield "adder full, both ways", both(lambda: op(a, w, config, "full"))
    yield "adder exact, both ways", both(lambda: op(a, w, config, "exact"))
    yield "convolution, both ways", both(lambda: convolution(a, w))
    yield "convolution tf32, both ways", in_tf32(both(lambda: convolution(a, w)))
    yield "input gradient", backward("full", True, False)
    yield "exact weight gradient", backward("exact", False, True)
    yield "full weight gradient", lambda: fallback.full_weight_gradient(grad, x, weight, *config)
    if layer.kernel == 1:
        yield "full weight gradient by cuBLAS", lambda: by_product(grad, x, weight, layer)
    yield "cdist", lambda: by_cdist(x, weight, layer)
    yield "cdist, both ways", both(lambda: by_cdist(a, w, layer), grad.flatten(2).mT)
    differences = layer.ops(batch) * 4
    if device.type == "cuda" and differences < torch.cuda.mem_get_info(device)[0] / 5:
        yield "broadcast", lambda: by_broadcast(x, weight, layer)
        yield "broadcast, both ways", both(lambda: by_broadcast(a, w, layer), grad.flatten(2))


def steps(device: torch.device, quick: bool, batch: int) -> Iterator[dict[str, Any]]:
    for name, images, size, make in networks(quick, batch):
        for kind, layer in NETWORKS.items():
            step = training_step(make, layer, device, images, size)
            yield {"network": name, "layers": kind, "batch": images, **step_figures(step, device, images)}
    # At the end, since a capture that fails may leave the device unusable.
    for name, images, size, make in networks(quick, batch) if device.type == "cuda" else ():
        for kind in ("conv", "full"):
            step = captured(training_step(make, NETWORKS[kind], device, images, size), device)
            took = seconds(step, device, 2.0)
            yield {"network": name, "layers": kind, "batch": images, "as a CUDA graph, ms": took * 1e3}


def networks(quick: bool, batch: int) -> Iterator[tuple[str, int, int, Callable[[Layers], nn.Module]]]:
    """Name, batch, image size, and what makes it of a kind of layers."""
    yield "ResNet-20", 8 if quick else 256, 32, resnet20
    if not quick:
        yield "ResNet-50", batch, 224, resnet50


def inference(device: torch.device, quick: bool, batch: int) -> Iterator[dict[str, Any]]:
    """Forward passes in eval mode: the CNN, the adder network as it is, and fused as ``evaluate`` and ``run`` do it."""
    for name, images, size, make in networks(quick, batch):
        x = torch.randn(images, 3, size, size, device=device).to(memory_format=torch.channels_last)
        for kind in ("conv", "adder", "adder, fused"):
            network = make(NETWORKS["conv" if kind == "conv" else "full"]).to(device).eval()
            with torch.inference_mode():
                running = fused(network) if kind == "adder, fused" else network
                took = seconds(functools.partial(running, x), device, 0.05 if quick else 1.0)
            yield {"network": name, "layers": kind, "batch": images, "ms": took * 1e3, "images/s": images / took}


def training_step(
    make: Callable[[Layers], nn.Module], layer: Layers, device: torch.device, batch: int, size: int
) -> Callable[[], None]:
    """A step of SGD on the same random images each time."""
    last = torch.channels_last
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=last)
    labels = torch.randint(0, 10, (batch,), device=device)
    network = make(layer).to(device, memory_format=last)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(x), labels).backward()
        optimizer.step()

    return step


def step_figures(step: Callable[[], None], device: torch.device, batch: int) -> dict[str, Any]:
    """Its time, and the most memory that it holds."""
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    took = seconds(step, device, 2.0)
    memory = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return {"ms": took * 1e3, "images/s": batch / took, "MiB": memory}


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The step without the host's work for it: what a small network's time may be."""
    graph = torch.cuda.CUDAGraph()
    other = torch.cuda.Stream(device)
    other.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(other):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(other)
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph):
        step()

    def replay(_: object = step) -> None:  # whose tensors the graph works on: they live as long
        graph.replay()

    return replay


def aims(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What there are aims for on an H200, as far as these rows tell; the aim stands behind the name."""
    layers = [row for row in rows if "count" in row and row["ms"].get("adder float32")]
    most = next((row["Gtaps/s"] for row in rows if "Gtaps/s" in row), None)
    steps = {(row["network"], row["layers"]): row for row in rows if "MiB" in row}
    found: dict[str, float] = {}

    def ratio(name: str, above: float | None, below: float | None) -> None:
        if above and below:
            found[name] = above / below

    def times(name: str, slow: str, fast: str) -> None:
        """Over the layers that have both: the clock, or the memory, may have cut some off."""
        both = [(row["count"], row["ms"]) for row in layers if row["ms"].get(slow) and row["ms"].get(fast)]
        ratio(name, *(sum(count * ms[which] for count, ms in both) for which in (slow, fast)))

    taps = sum(row["count"] * row["Gtaps"] for row in layers)
    forward = sum(row["count"] * row["ms"]["adder float32"] for row in layers) / 1e3
    ratio("float32 forward, of the limit of additions (0.8)", taps / forward if forward else None, most)
    times("uint8 forward, times as fast as float32 (3)", "adder float32", "adder uint8")
    times("both ways, times a convolution's (at most 3)", "adder full, both ways", "convolution, both ways")
    times("both ways, times as fast as cdist (20)", "cdist, both ways", "adder full, both ways")
    for name in ("ResNet-20", "ResNet-50"):
        adder, cnn = (steps.get((name, kind), {}) for kind in ("full", "conv"))
        ratio(f"{name}, memory, times a CNN's (at most 1.3)", adder.get("MiB"), cnn.get("MiB"))
    ratio("ResNet-20 training, images/s (20000)", steps.get(("ResNet-20", "full"), {}).get("images/s"), 1)
    return found


def compile_all(device: torch.device) -> dict[str, Any]:
    """All kernels that are not there yet, where they can be compiled: several at a time, which in use they are not."""
    from anncvt.runtime.kernels.cuda import build, driver
    from anncvt.runtime.kernels.cuda.variant import variants

    if build.lacking():
        return {}
    begin, arch = time.perf_counter(), driver.architecture(device)
    missing = [variant for variant in variants() if not build.present(variant, arch)]
    build.build(missing, [arch])
    return {"kernels compiled": len(missing), "seconds": round(time.perf_counter() - begin, 1)}


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
    about: dict[str, Any] = {"torch": torch.__version__, "device": str(device)}
    if device.type == "cuda":
        from anncvt.runtime.kernels import cuda

        about |= {"gpu": torch.cuda.get_device_name(device), **compile_all(device)}
        obstacle = cuda.obstacle(device)
        if obstacle:  # what would be checked and measured instead is plain torch
            yield {"section": "about", **about, "failed": obstacle}
            return
    yield {"section": "about", **about, "compiled": kernels.usable(torch.empty(1, device=device))}
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
    rows: list[dict[str, Any]] = []

    def tell(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row, default=str), flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1, default=str))

    with tf32(False):
        for row in run(torch.device(options.device), sections, options.quick, options.batch, options.minutes):
            tell(row)
    tell({"section": "aims", **aims(rows)})
    return 3 if any(row.get("wrong") or row.get("failed") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
