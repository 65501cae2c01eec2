"""Do all executions of an integer network give the same bits, at every layer?"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from anncvt.errors import AnncvtError, GateError
from anncvt.progress import SILENT, Progress
from anncvt.runtime import hardware, integer_network
from anncvt.runtime.integer import Array, Step
from anncvt.runtime.integer_network import INPUT, IntegerNetwork
from anncvt.runtime.memory_files import file_name

#: Runs the network over pixels and returns, for each step by name, whether it differs from the reference.
Comparison = Callable[[IntegerNetwork, Array, "dict[str, tuple[Array, Array | None]]"], dict[str, bool]]


class Unavailable(Exception):
    """An execution that this machine lacks something for."""


def check(
    network: IntegerNetwork,
    pixels: Array,
    *,
    onnx_path: str | Path | None = None,
    so_path: str | Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Compare every accumulator and every output of every execution with the numpy reference.

    Of the network compiled as a whole only the logits can be seen.

    Args:
        pixels: ``[N, C, H, W]`` uint8, a few: the reference is slow.
        onnx_path: the exported network; None: it is left out.
        so_path: what :func:`anncvt.runtime.tvm.compile_network` wrote; None: it is left out.

    Returns:
        ``{"ok", "images", "reference", "layers": [names], "backends": {name: {"ok", "compared": [names],
        "different": [names]}}, "missing": {name: why}}``.

    Raises:
        AnncvtError: no images, or not the network's; or the file cannot be opened or holds another network.
    """
    if len(pixels) == 0:
        raise AnncvtError("no images to check with", fix="name data with at least one image")
    expected: dict[str, tuple[Array, Array | None]] = {}

    def keep(step: Step, output: Array, accumulators: Array | None) -> None:
        expected[step.name] = (output, accumulators)

    backends: dict[str, dict[str, Any]] = {}
    missing = {}
    comparisons: dict[str, Comparison] = {
        **COMPARISONS,
        LIBRARY: functools.partial(_library, so_path),
        "onnxruntime": functools.partial(_onnxruntime, onnx_path),
    }
    with progress.task("comparing integers", 1 + len(comparisons)) as task:
        integer_network.run(network, pixels, keep)
        task.advance()
        for name, compare in comparisons.items():
            try:
                found = compare(network, pixels, expected)
                different = [layer for layer, differs in found.items() if differs]
                backends[name] = {"ok": not different, "compared": list(found), "different": different}
            except Unavailable as error:
                missing[name] = str(error)
            task.advance()
    return {
        "ok": all(row["ok"] for row in backends.values()),
        "images": len(pixels),
        "reference": "numpy",
        "layers": [step.name for step in network.steps],
        "backends": backends,
        "missing": missing,
    }


def require_equal(result: dict[str, Any]) -> None:
    """Fail if :func:`check` found a difference.

    Raises:
        GateError: one execution differs from the reference.
    """
    if not result["ok"]:
        first = {name: row["different"][0] for name, row in result["backends"].items() if not row["ok"]}
        where = ", ".join(f"{name} from {layer} on" for name, layer in first.items())
        raise GateError(f"integers differ from the reference: {where}", fix="this is a bug: report the network")


def _torch(network: IntegerNetwork, pixels: Array, expected: dict[str, tuple[Array, Array | None]]) -> dict[str, bool]:
    import torch

    from anncvt.runtime import integer_torch

    found: dict[str, bool] = {}

    def compare(step: Step, output: torch.Tensor, accumulators: torch.Tensor | None) -> None:
        wanted, sums = expected[step.name]
        same = np.array_equal(wanted, output.numpy())
        if accumulators is not None and sums is not None:
            same = same and np.array_equal(sums, accumulators.numpy())
        found[step.name] = not same

    integer_torch.run(network, torch.from_numpy(pixels), compare)
    return found


def _tvm(network: IntegerNetwork, pixels: Array, expected: dict[str, tuple[Array, Array | None]]) -> dict[str, bool]:
    """Outputs of fused kernels, and accumulators of kernels that end there."""
    import torch

    from anncvt.runtime import integer_tvm

    if not integer_tvm.usable():
        raise Unavailable("TVM is not installed: pip install 'anncvt[tvm]'")
    compiled = integer_tvm.Compiled(network)
    values = {INPUT: torch.from_numpy(network.enter(pixels))}
    found: dict[str, bool] = {}

    def compare(step: Step, output: torch.Tensor, accumulators: torch.Tensor | None) -> None:
        wanted, sums = expected[step.name]
        same = np.array_equal(wanted, output.numpy())
        if sums is not None and step.weight is not None:
            same = same and np.array_equal(sums, compiled.accumulate(step, [values[n] for n in step.inputs]).numpy())
        found[step.name] = not same
        values[step.name] = output

    compiled.run(torch.from_numpy(pixels), compare)
    return found


def _library(
    path: str | Path | None,
    network: IntegerNetwork,
    pixels: Array,
    expected: dict[str, tuple[Array, Array | None]],
) -> dict[str, bool]:
    """The logits of the whole network in one call, and of each image in one of its own."""
    from anncvt.runtime import tvm

    if path is None:
        raise Unavailable("not compiled: run `anncvt compile DIR --int8`")
    model, last = tvm.load(path), network.steps[-1].name
    logits = expected[last][0].reshape(len(pixels), -1)
    alone = np.concatenate([model(pixels[at : at + 1]) for at in range(len(pixels))])
    return {last: not (np.array_equal(model(pixels), logits) and np.array_equal(alone, logits))}


def _c(network: IntegerNetwork, pixels: Array, expected: dict[str, tuple[Array, Array | None]]) -> dict[str, bool]:
    """The program of the hardware package, built here; it compares with golden vectors, which are the reference's."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise Unavailable("there is no C compiler (cc)")
    with tempfile.TemporaryDirectory(prefix="anncvt-") as scratch:
        package = hardware.export(network, Path(scratch) / "package", pixels)
        program = Path(scratch) / "reference"
        source = package / "reference.c"
        build = subprocess.run([compiler, "-std=c99", "-O2", "-o", program, source], capture_output=True, text=True)
        if build.returncode:
            raise Unavailable(f"cc does not build it: {build.stderr.strip()[:200]}")
        done = subprocess.run([program, package], capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise AnncvtError(f"the C program failed: {done.stderr.strip()}", fix="this is a bug: report the network")
    wrong = set(re.findall(r"^golden/\d+/(.+)\.(?:accumulator|output)\.hex: ", done.stdout, re.MULTILINE))
    return {step.name: file_name(at, step.name) in wrong for at, step in enumerate(network.steps)}


def _onnxruntime(
    path: str | Path | None,
    network: IntegerNetwork,
    pixels: Array,
    expected: dict[str, tuple[Array, Array | None]],
) -> dict[str, bool]:
    """Every value of the graph, and the logits of the file as it is, where runtimes may fuse what they like.

    A fused layer has no accumulators to compare.
    """
    if path is None:
        raise Unavailable("not exported: run `anncvt export DIR --int8`")
    from anncvt.runtime import onnx_trace

    trace = onnx_trace.run(path, network, pixels)
    found = {}
    for step in network.steps:
        wanted, sums = expected[step.name]
        same = np.array_equal(wanted, trace.integers[step.name])
        if sums is not None and step.name in trace.accumulators:
            same = same and np.array_equal(sums, trace.accumulators[step.name])
        found[step.name] = not same
    last = network.steps[-1]
    logits = expected[last.name][0].reshape(len(pixels), -1) * np.float32(last.grid.scale)
    found[last.name] |= not np.array_equal(logits, trace.logits)
    return found


COMPARISONS: dict[str, Comparison] = {"torch": _torch, "TVM": _tvm, "C": _c}
#: The name of the network compiled as a whole.
LIBRARY = "TVM library"
