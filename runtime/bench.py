"""Latency of the adder network against the CNN it came from, in every runtime at hand."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anncvt.errors import AnncvtError
from anncvt.program import Program
from anncvt.progress import SILENT, Progress
from anncvt.runtime.check import exported_file

if TYPE_CHECKING:
    from torch import nn

#: Timed calls of one network in a row, after an untimed one that brings its weights back into the cache.
BURST = 3


def bench(
    program: Program,
    *,
    batch: int = 1,
    threads: int | None = None,
    repeats: int = 50,
    seconds: float = 60,
    onnx_path: str | Path | None = None,
    so_path: str | Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Time student and teacher on random images, float32 on the CPU.

    The contestants take turns in short bursts, so that whatever else the machine does meets all of them alike.

    Args:
        program: with a student.
        batch: images of one call.
        threads: of one call, in every runtime. None: torch's own setting.
        repeats: timed calls of each contestant.
        seconds: stop after this much time even with fewer repeats; every contestant gets at least one burst.
        onnx_path, so_path: the student's files. None: those of the program's folder; without a ``model.onnx`` one is
            exported for the occasion, without a ``model.so`` TVM is left out.

    Returns:
        ``{"rows": [...], "missing": {backend: reason}}``, a row being ``{"network": "student" | "teacher", "backend":
        "torch" | "onnxruntime" | "tvm", "dtype", "batch", "threads", "runs", "p50_ms", "p90_ms", "ratio"}``: median and
        90th percentile of one call in milliseconds, and the median over that of the teacher in onnxruntime.

    Raises:
        AnncvtError: there is no student, a number is not positive, or a file cannot be opened.
    """
    import torch

    if program.student is None:
        raise AnncvtError("there is no adder network to time yet", fix="convert first: `anncvt convert MODEL -o DIR`")
    threads = torch.get_num_threads() if threads is None else threads
    for name, value in (("batch", batch), ("threads", threads), ("repeats", repeats), ("seconds", seconds)):
        if not value > 0:
            raise AnncvtError(f"{name} is {value}", fix=f"give --{name} a positive number")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *program.preprocess.input_size, generator=generator).numpy()
    with _torch_threads(threads), tempfile.TemporaryDirectory(prefix="anncvt-") as scratch:
        contestants, missing = _contestants(program, threads, onnx_path, so_path, Path(scratch), progress)
        _race(contestants, images, repeats, seconds, progress)
    base = next(c for c in contestants if (c.network, c.backend) == ("teacher", "onnxruntime"))
    rows = [contestant.row(batch, threads, base.median()) for contestant in contestants]
    return {"rows": rows, "missing": missing}


@dataclass
class _Contestant:
    network: str
    backend: str
    call: Callable[[np.ndarray], np.ndarray]
    times: list[float] = field(default_factory=list)  # seconds

    def median(self) -> float:
        return float(np.median(self.times))

    def row(self, batch: int, threads: int, base: float) -> dict[str, Any]:
        return {
            "network": self.network,
            "backend": self.backend,
            "dtype": "float32",
            "batch": batch,
            "threads": threads,
            "runs": len(self.times),
            "p50_ms": round(1e3 * self.median(), 4),
            "p90_ms": round(1e3 * float(np.percentile(self.times, 90)), 4),
            "ratio": round(self.median() / base, 3),
        }


def _contestants(
    program: Program,
    threads: int,
    onnx_path: str | Path | None,
    so_path: str | Path | None,
    scratch: Path,
    progress: Progress,
) -> tuple[list[_Contestant], dict[str, str]]:
    from anncvt.runtime import onnx

    def in_onnxruntime(path: str | Path) -> Callable[[np.ndarray], np.ndarray]:
        session = onnx.session(path, threads=threads)
        return lambda images: onnx.run(session, images)

    size = program.preprocess.input_size
    assert program.student is not None
    exported = onnx_path or exported_file(program, "model.onnx")
    exported = exported or onnx.export(program, scratch / "student.onnx", progress=progress)
    teacher = onnx.export_network(program.teacher, size, scratch / "teacher.onnx", progress=progress)
    found = [
        _Contestant("student", "torch", _in_torch(program.student)),
        _Contestant("student", "onnxruntime", in_onnxruntime(exported)),
        _Contestant("teacher", "torch", _in_torch(program.teacher)),
        _Contestant("teacher", "onnxruntime", in_onnxruntime(teacher)),
    ]
    compiled = so_path or exported_file(program, "model.so")
    if compiled is None:
        return found, {"tvm": "not compiled: run `anncvt compile DIR`"}
    from anncvt.runtime import tvm

    return [_Contestant("student", "tvm", tvm.load(compiled, threads=threads)), *found], {}


def _in_torch(network: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    import torch

    from anncvt.runtime.inference import inference_copy

    module = inference_copy(network)

    def call(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(images)).numpy()

    return call


def _race(contestants: list[_Contestant], images: np.ndarray, repeats: int, seconds: float, progress: Progress) -> None:
    """Fill ``times``, in rounds in which each contestant gets one burst."""
    for contestant in contestants:
        contestant.call(images)  # compiles kernels, allocates
    deadline = time.monotonic() + seconds
    rounds = -(-repeats // BURST)
    with progress.task("timing", rounds * len(contestants)) as task:
        for _ in range(rounds):
            for contestant in contestants:
                contestant.call(images)
                for _ in range(min(BURST, repeats - len(contestant.times))):
                    begin = time.perf_counter()
                    contestant.call(images)
                    contestant.times.append(time.perf_counter() - begin)
                task.advance()
            if time.monotonic() > deadline:
                progress.note(f"stopped after {seconds:g} s with {len(contestants[0].times)} of {repeats} repeats")
                break


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
