"""Latency, throughput and memory of the adder network against the CNN it came from, in every runtime at hand."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anncvt.errors import AnncvtError
from anncvt.program import Program, versions
from anncvt.progress import SILENT, Progress
from anncvt.runtime.contestants import FIXED, Call, Contestant, Contestants, reduced_range
from anncvt.runtime.resident import peak_of

if TYPE_CHECKING:
    import torch

#: Timed calls of one network in a row, after an untimed one that brings its weights back into the cache.
BURST = 3
#: What times are compared with, at either precision, and on GPUs.
BASE = {dtype: ("teacher", "onnxruntime", dtype) for dtype in ("float32", "int8")}
BASE_ON_GPU = {"float32": ("teacher", "torch", "float32")}


def bench(
    program: Program,
    *,
    batch: int = 1,
    threads: int | None = None,
    repeats: int = 50,
    seconds: float = 60,
    onnx_path: str | Path | None = None,
    so_path: str | Path | None = None,
    integer_path: str | Path | None = None,
    device: torch.device | str = "cpu",
    teacher_in_tvm: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Time student and teacher on random images.

    The contestants take turns in short bursts, so that whatever else the machine does meets all of them alike.

    Args:
        program: with a student.
        batch: images of one call.
        threads: of one call, in every runtime. None: torch's own setting.
        repeats: timed calls of each contestant.
        seconds: stop after this much time even with fewer repeats; every contestant gets at least one burst.
        onnx_path, so_path, integer_path: the student's files. None: those of the program's folder; without a
            ``model.onnx`` one is exported for the occasion, what was not compiled is left out. Exported integers and
            the native library for onnxruntime take part where the folder has them.
        device: of torch. On another than the CPU torch alone takes part; copies to and fro are timed, too.
        teacher_in_tvm: compile the CNN for the occasion and time it in TVM, too.

    Returns:
        ``{"rows": [...], "missing": {backend: reason}, "settings": {...}}``, a row being ``{"network": "student" |
        "teacher", "backend": "torch" | "onnxruntime" | "onnxruntime native" | "tvm", "dtype": "float32" | "fixed16"
        | "int8", "batch", "threads", "runs", "p50_ms", "p90_ms", "p99_ms", "images_per_second", "memory_mb", "ratio",
        "ratio_int8"}``: percentiles of one call, images per second at the median, by how much loading it and a first
        call raised the process's memory at the peak (None where the system does not tell), and the median over that of
        the teacher in onnxruntime (on a GPU in torch), in floats and in integers (None where that is missing).
        "fixed16" is float32 but for its adders, which are in 16-bit fixed point.
        "settings" says how it was measured.

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
    where = torch.device(device)
    with _torch_threads(threads), tempfile.TemporaryDirectory(prefix="anncvt-") as scratch:
        contestants = Contestants(
            program,
            threads,
            Path(scratch),
            onnx_path=onnx_path,
            so_path=so_path,
            integer_path=integer_path,
            device=where,
            teacher_in_tvm=teacher_in_tvm,
            progress=progress,
        )
        base = BASE if where.type == "cpu" else BASE_ON_GPU
        race = _Race((batch, *program.preprocess.input_size), list(contestants), base)
        race.run(repeats, seconds, progress)
    settings = {
        "batch": batch,
        "threads": threads,
        "device": str(where),
        "calls": f"{BURST} in a row after one that is not timed, the networks by turns",
        "clock": "wall",
        "int8_teacher": f"quantize_static, per_channel=True, reduce_range={reduced_range()}, ranges of noise",
        "versions": versions(),
    }
    return {"rows": race.rows(batch, threads), "missing": contestants.missing, "settings": settings}


class _Race:
    """Contestants that take turns.

    Args:
        shape: of the images, ``[N, C, H, W]``.
        contestants: all of them.
        base: what times are compared with, by precision.
    """

    def __init__(
        self, shape: tuple[int, ...], contestants: list[Contestant], base: dict[str, tuple[str, str, str]]
    ) -> None:
        random = np.random.default_rng(0)
        self._images = random.standard_normal(shape).astype(np.float32)
        self._pixels = random.integers(0, 256, shape).astype(np.uint8)
        self._contestants, self._base = contestants, base

    def run(self, repeats: int, seconds: float, progress: Progress) -> None:
        """Open everybody, then fill ``times`` in rounds in which each contestant gets one burst."""
        calls = [self._opened(contestant) for contestant in self._contestants]
        deadline = time.monotonic() + seconds
        rounds = -(-repeats // BURST)
        with progress.task("timing", rounds * len(calls)) as task:
            for _ in range(rounds):
                for contestant, call in zip(self._contestants, calls, strict=True):
                    images = self._given(contestant)
                    call(images)
                    for _ in range(min(BURST, repeats - len(contestant.times))):
                        begin = time.perf_counter()
                        call(images)
                        contestant.times.append(time.perf_counter() - begin)
                    task.advance()
                if time.monotonic() > deadline:
                    done = len(self._contestants[0].times)
                    progress.note(f"stopped after {seconds:g} s with {done} of {repeats} repeats")
                    break

    def rows(self, batch: int, threads: int) -> list[dict[str, Any]]:
        """One of each contestant."""
        medians = {contestant.name: float(np.median(contestant.times)) for contestant in self._contestants}
        rows = []
        for contestant in self._contestants:
            median = medians[contestant.name]
            p90, p99 = (1e3 * float(np.percentile(contestant.times, share)) for share in (90, 99))
            ratios = {dtype: round(median / medians[name], 3) for dtype, name in self._base.items() if name in medians}
            rows.append(
                {
                    "network": contestant.network,
                    "backend": contestant.backend,
                    "dtype": contestant.dtype,
                    "batch": batch,
                    "threads": threads,
                    "runs": len(contestant.times),
                    "p50_ms": round(1e3 * median, 4),
                    "p90_ms": round(p90, 4),
                    "p99_ms": round(p99, 4),
                    "images_per_second": round(batch / median, 2),
                    "memory_mb": None if contestant.memory is None else round(contestant.memory / 1e6, 1),
                    "ratio": ratios["float32"],
                    "ratio_int8": ratios.get("int8"),
                }
            )
        return rows

    def _opened(self, contestant: Contestant) -> Call:
        """Loaded, its kernels compiled, its memory allocated and measured."""

        def first() -> Call:
            opened = contestant.open()
            opened.call(self._given(contestant))
            if opened.fixed:
                contestant.dtype = FIXED
            return opened.call

        call, contestant.memory = peak_of(first)
        return call

    def _given(self, contestant: Contestant) -> np.ndarray:
        return self._pixels if contestant.pixels else self._images


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
