"""Whole networks on this machine: adders against the CNN in onnxruntime, in floats and in integers.

    python benchmarks/network.py torchvision:resnet50 torchvision:mobilenet_v2 --threads 1
    python benchmarks/network.py torchvision:resnet18 --batch 16 --keep out/networks
    python benchmarks/network.py torchvision:resnet50 --rows native "native, int8" CNN "CNN, int8"
    python benchmarks/network.py torchvision:mobilenet_v2 --rows "adders, int8" "adders x2, int8" "CNN, int8"

"adders" are compiled by TVM as a whole; "native" are ONNX files in onnxruntime with the native library, with fused
adders unless it says "unfused"; "fixed": in 16-bit fixed point; "x2": every adder has two weights per input.

Random weights, BatchNorm statistics of noise, the default plan (in a MobileNetV2 pointwise convolutions become adders,
depthwise ones stay). Medians of interleaved calls, and the least of them, which other work disturbs less; by the
processor time of all threads together or by the wall clock.
Prints how long compiling took, too. --keep leaves the files in a folder and takes those that are there.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import anncvt  # noqa: F401  (before torch: it sets the environment of the thread pools)

# isort: split
import numpy as np
import torch
from statistics_of_noise import settle
from timing import CLOCKS

from anncvt import zoo
from anncvt.images import Images
from anncvt.loading import load
from anncvt.passes.choice import Choice
from anncvt.passes.plan import plan
from anncvt.passes.quantize import QuantizeConfig, quantize
from anncvt.passes.rewrite import rewrite
from anncvt.program import Program
from anncvt.runtime import integer_network, onnx, onnx_native, processor, tvm
from anncvt.runtime.contestants import quantised, reduced_range

#: Images that choose the ranges of the integers; they are noise.
IMAGES = 4
ROWS = {
    "adders": "model.so",
    "adders, fixed": "model.fixed.so",
    "adders, int8": "model.int8.so",
    "adders x2, int8": "x2/model.int8.so",
    "native": "model.onnx",
    "native, int8": "model.int8.onnx",
    "native x2, int8": "x2/model.int8.onnx",
    "native, fixed": "model.onnx",
    "native unfused": "unfused.onnx",
    "native unfused, fixed": "unfused.onnx",
    "native unfused, int8": "unfused.int8.onnx",
    "CNN": "cnn.onnx",
    "CNN, int8": "cnn.int8.onnx",
}
DEFAULT = ("adders", "adders, fixed", "adders, int8", "CNN", "CNN, int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="COLLECTION:NAME")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(DEFAULT))
    parser.add_argument("--keep", type=Path, metavar="DIR")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = processor.features() or frozenset()
    level = next((name for name in ("avx512vnni", "avx512f", "avx2", "neon") if name in found), "generic")
    print(f"{level}, {options.threads} thread(s), batch {options.batch}, {options.clock} time, ms of a call")
    print(f"onnxruntime's integers: reduce_range={reduced_range()}")
    for name in options.models:
        with contextlib.ExitStack() as stack:
            place = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder = place / f"{name.replace(':', '-')}-{options.size}-{options.batch}"
            folder.mkdir(parents=True, exist_ok=True)
            build(name, options.size, options.batch, folder, options.rows)
            times = measure(folder, options)
            report(f"{name}, median", {row: float(np.median(found)) for row, found in times.items()}, options.batch)
            report(f"{name}, least", {row: min(found) for row, found in times.items()}, options.batch)


def build(name: str, size: int, batch: int, folder: Path, rows: list[str]) -> None:
    """Write what is missing of the files of :data:`ROWS`, and say how long compiling took."""
    wanted = [row for row in rows if not (folder / ROWS[row]).exists()]
    for copies in (1, 2):
        here = [row for row in wanted if ("x2" in row) == (copies == 2)]
        if not here:
            continue
        program, place = converted(name, size, copies), folder if copies == 1 else folder / "x2"
        place.mkdir(exist_ok=True)
        program.folder = str(place)
        if any(row.endswith("int8") and not row.startswith("CNN") for row in here):
            integer_network.save(quantize(program, noise(program), QuantizeConfig(fit=False)), place)
        for row in {ROWS[row]: row for row in here}.values():  # two libraries serve the same file
            begin = time.monotonic()
            make(program, row, folder / ROWS[row], batch)
            print(f"{name}: {row} made in {time.monotonic() - begin:.1f} s", flush=True)
    for fixed in (False, True):
        native = [row for row in rows if row.startswith("native") and row.endswith("fixed") == fixed]
        library = folder / library_of(fixed)
        if native and (not library.exists() or set(native) & set(wanted)):
            begin = time.monotonic()
            models = sorted({folder / ROWS[row] for row in native})
            onnx_native.build(models, library, target="cpu", fixed=fixed)
            print(f"{name}: {library.name} built in {time.monotonic() - begin:.1f} s", flush=True)


def library_of(fixed: bool) -> str:
    """Whether it computes adders of floats in fixed point or not, a native library serves the same files."""
    return "libanncvt_ort.fixed.so" if fixed else onnx_native.LIBRARY


def make(program: Program, row: str, path: Path, batch: int) -> None:
    """Write the file of a row; the program's folder holds its integers where the row is of integers."""
    size = program.preprocess.input_size
    if row in ("adders", "adders, fixed"):
        tvm.compile(program, path, batch=batch, fixed=row == "adders, fixed")
    elif row in ("adders, int8", "adders x2, int8"):
        tvm.compile_network(integer_network.load(path.parent), program.preprocess, path, batch=batch)
    elif row.startswith("native"):
        export = onnx.export_integers if row.endswith("int8") else onnx.export
        export(program, path, fuse="unfused" not in row)
    else:
        floats = onnx.export_network(program.teacher, size, path.parent / ROWS["CNN"])
        if row == "CNN, int8":
            quantised(floats, path, size)


def converted(name: str, size: int, copies: int = 1) -> Program:
    """The adder network of an architecture, with random weights; ``copies``: weights per input of its adders."""
    collection, _, model = name.partition(":")
    torch.manual_seed(0)
    network = zoo.build(collection, model, {}).eval()
    loaded = load(network, input_size=size, mean=zoo.IMAGENET_MEAN, std=zoo.IMAGENET_STD)
    program = rewrite(plan(loaded, Choice.of(copies=copies)))
    for part in (program.teacher, program.student):
        assert part is not None
        settle(part, noise(program).batch(torch.arange(IMAGES), program.preprocess))
    return program


def noise(program: Program) -> Images:
    """Images that choose ranges and statistics."""
    shape = (IMAGES, *program.preprocess.input_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Images(pixels, None, None, "noise")


def measure(folder: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of each row's calls; they take turns."""
    random, calls = np.random.default_rng(0), {}
    clock = CLOCKS[options.clock]
    for row in options.rows:
        path = folder / ROWS[row]
        call: Callable[[np.ndarray], np.ndarray]
        if path.suffix == ".onnx":
            library = folder / library_of(row.endswith("fixed")) if row.startswith("native") else "none"
            session = onnx.session(path, threads=options.threads, library=library)
            assert session.anncvt.native == row.startswith("native"), session.anncvt.why
            print(f"{row}: {session.anncvt.why}")
            call = lambda images, session=session: onnx.run(session, images)  # noqa: E731
        else:
            call = tvm.load(path, threads=options.threads)
        shape = (options.batch, 3, options.size, options.size)
        images = random.standard_normal(shape).astype(np.float32)
        if path.suffix == ".so" and row.endswith("int8"):
            images = random.integers(0, 256, shape).astype(np.uint8)
        call(images)
        calls[row] = (call, images)
    times: dict[str, list[float]] = {row: [] for row in calls}
    for _ in range(options.repeats):
        for row, (call, images) in calls.items():
            call(images)  # its weights back into the cache
            begin = clock()
            call(images)
            times[row].append(1e3 * (clock() - begin))
    return times


def report(name: str, times: dict[str, float], batch: int) -> None:
    """Times and the ratios between them."""
    print(
        f"{name}: " + ", ".join(f"{row} {value:.2f} ms ({value / batch:.2f} an image)" for row, value in times.items())
    )
    pairs = [("", ""), (", fixed", ""), (", int8", ", int8"), (", int8", "")]
    named = [(f"{made}{a}", f"CNN{b}") for made in ("adders", "native", "native unfused") for a, b in pairs]
    named += [(f"{made} x2, int8", f"{other}, int8") for made in ("adders", "native") for other in (made, "CNN")]
    ratios = [f"{a} / {b} {times[a] / times[b]:.3f}" for a, b in named if a in times and b in times]
    print("  " + "; ".join(ratios), flush=True)


if __name__ == "__main__":
    main()
