"""Parity: does the network compute the same in torch, in onnxruntime and in TVM?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anncvt.errors import AnncvtError
from anncvt.program import Program
from anncvt.progress import SILENT, Progress

if TYPE_CHECKING:
    from anncvt.images import Images

#: Largest accepted difference of logits, relative to the largest logit; of a tie, relative to the range of logits.
TOLERANCE = 1e-3
#: Images of one call, after a first call with a single image.
BATCH = 32

#: Normalised images ``[N, C, H, W]`` float32 -> logits ``[N, classes]``.
Backend = Callable[[np.ndarray], np.ndarray]


def check(
    program: Program,
    images: Images,
    *,
    onnx_path: str | Path | None = None,
    so_path: str | Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Compare the exported and the compiled network with the student in torch, float32 on the CPU.

    The first image runs alone, the others in batches, so both batch sizes of every backend are seen.

    Args:
        program: with a student.
        images: at least one; labels are not used.
        onnx_path, so_path: the files to check. None: those of the program's folder, one that is not there is left out.

    Returns:
        ``{"ok", "images", "reference", "backends": {name: row}, "missing": {name: reason}}``, a row being
        ``{"ok", "max_abs", "max_rel", "top1_agreement"}``.
        ``max_abs`` is the largest difference of logits (infinite where one is not a number), ``max_rel`` the same over
        the largest logit of the reference, ``top1_agreement`` the share of images with the same class, in percent. Of
        classes that tie any will do: those whose logit, in the reference, is below the best one by at most
        :data:`TOLERANCE` of the range of the image's logits (best minus worst). A backend is ok if ``max_rel`` is below
        :data:`TOLERANCE` and ``top1_agreement`` is 100. ``missing`` says, for a backend that was left out, how to get
        it. Disagreement is a result, not an exception.

    Raises:
        AnncvtError: there is no student, no image, nothing to compare, or a file that cannot be opened or belongs to
            another network.
    """
    if program.student is None:
        raise AnncvtError("there is no adder network to check yet", fix="convert first: `anncvt convert MODEL -o DIR`")
    if len(images) == 0:
        raise AnncvtError("no images to check with", where=images.name, fix="name data with at least one image")
    backends, missing = _open(program, onnx_path, so_path)
    results = {name: row.summary() for name, row in _compare(program, images, backends, progress).items()}
    return {
        "ok": all(row["ok"] for row in results.values()),
        "images": len(images),
        "reference": "torch float32",
        "backends": results,
        "missing": missing,
    }


def difference(program: Program, images: Images, backend: Backend) -> float:
    """The largest difference of logits from the student in torch, relative to the largest logit; see :func:`check`."""
    found: float = _compare(program, images, {"": backend}, SILENT)[""].summary()["max_rel"]
    return found


def exported_file(program: Program, name: str) -> Path | None:
    """The file ``name`` of the program's folder, if both exist."""
    path = Path(program.folder, name) if program.folder else None
    return path if path is not None and path.is_file() else None


@dataclass
class _Difference:
    """Running comparison of one backend with the reference."""

    max_abs: float = 0.0
    scale: float = 0.0
    same: list[bool] = field(default_factory=list)

    def add(self, actual: np.ndarray, reference: np.ndarray, name: str) -> None:
        if actual.shape != reference.shape:
            raise AnncvtError(
                f"{name} returns {list(actual.shape)} for the student's {list(reference.shape)}",
                fix="the file belongs to another network: run `anncvt export` and `anncvt compile` again",
            )
        difference = np.abs(actual.astype(np.float64) - reference)
        self.max_abs = max(self.max_abs, float(np.nan_to_num(difference, nan=np.inf).max(initial=0)))
        self.scale = max(self.scale, float(np.nan_to_num(np.abs(reference), nan=0).max(initial=0)))
        rows = (len(reference), -1)
        logits, chosen = reference.reshape(rows), actual.reshape(rows).argmax(1)
        best = logits.max(1)
        # Of the range, not of the largest logit: logits with a large offset in common are no ties.
        tied = best - logits[np.arange(len(logits)), chosen] <= TOLERANCE * (best - logits.min(1))
        self.same.extend((tied & np.isfinite(difference.reshape(rows)).all(1)).tolist())

    def summary(self) -> dict[str, Any]:
        max_rel = self.max_abs / self.scale if self.scale else (np.inf if self.max_abs else 0.0)
        agreement = 100 * sum(self.same) / len(self.same)
        return {
            "ok": bool(max_rel < TOLERANCE and agreement == 100),
            "max_abs": self.max_abs,
            "max_rel": max_rel,
            "top1_agreement": agreement,
        }


def _open(
    program: Program, onnx_path: str | Path | None, so_path: str | Path | None
) -> tuple[dict[str, Backend], dict[str, str]]:
    onnx_file = onnx_path or exported_file(program, "model.onnx")
    so_file = so_path or exported_file(program, "model.so")
    backends: dict[str, Backend] = {}
    missing = {}
    if onnx_file:
        backends["onnxruntime"] = _onnxruntime(onnx_file)
    else:
        missing["onnxruntime"] = "not exported: run `anncvt export DIR`"
    if so_file:
        from anncvt.runtime import tvm

        backends["tvm"] = tvm.load(so_file)
    else:
        missing["tvm"] = "not compiled: run `anncvt compile DIR`"
    if not backends:
        raise AnncvtError(
            "nothing to compare the student with",
            where=program.folder,
            fix="run `anncvt export DIR` or `anncvt compile DIR` first",
        )
    return backends, missing


def _onnxruntime(path: str | Path) -> Backend:
    from anncvt.runtime import onnx

    session = onnx.session(path)
    return lambda images: onnx.run(session, images)


def _compare(
    program: Program, images: Images, backends: dict[str, Backend], progress: Progress
) -> dict[str, _Difference]:
    import torch

    from anncvt.runtime.inference import inference_copy

    assert program.student is not None
    student = inference_copy(program.student)
    differences = {name: _Difference() for name in backends}
    first, *rest = torch.arange(len(images)).tensor_split([1])
    with progress.task("comparing backends", len(images)) as task, torch.inference_mode():
        for indices in (first, *(part for many in rest for part in many.split(BATCH) if len(part))):
            batch = images.batch(indices, program.preprocess)
            reference = student(batch).numpy()
            for name, backend in backends.items():
                differences[name].add(backend(batch.numpy()), reference, name)
            task.advance(len(indices))
    return differences
