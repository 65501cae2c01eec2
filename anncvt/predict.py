"""What a converted network sees in pictures, on any backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anncvt.data import read_image
from anncvt.errors import AnncvtError
from anncvt.program import Program
from anncvt.progress import SILENT, Progress

BACKENDS = ("torch", "onnxruntime", "tvm")


def predict(
    program: Program,
    pictures: Sequence[str | Path],
    *,
    backend: str = "torch",
    path: Path | None = None,
    top: int = 5,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """The most probable classes, ``{"input": path, "top": [{"class", "index", "probability"}, ...]}`` per picture.

    Args:
        backend: one of :data:`BACKENDS`.
        path: the exported or compiled network, for the backends that run one.
        top: how many classes.

    Raises:
        AnncvtError: a picture cannot be read, or the network makes no class scores.
    """
    network = _runner(program, backend, path)
    found = []
    with progress.task("running", len(pictures)) as task:
        for picture in pictures:
            scores = network(read_image(picture, program.preprocess).numpy())
            found.append({"input": str(picture), "top": _best(scores, program.classes, top)})
            task.advance()
    return found


def _runner(program: Program, backend: str, path: Path | None) -> Callable[[np.ndarray], np.ndarray]:
    if backend == "torch":
        student = program.student
        if student is None:
            raise AnncvtError("there is no adder network to run", fix="`anncvt convert MODEL -o DIR` first")

        def run(image: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return student.eval()(torch.from_numpy(image)).numpy()

        return run
    if path is None:
        command = {"onnxruntime": "export", "tvm": "compile"}.get(backend)
        if command is None:
            raise AnncvtError(f"no such backend: {backend!r}", fix=f"choose one of {', '.join(BACKENDS)}")
        raise AnncvtError(
            f"there is nothing to run on {backend} yet", where=program.folder, fix=f"`anncvt {command} DIR` first"
        )
    if backend == "onnxruntime":
        from anncvt.runtime import onnx

        session = onnx.session(path)
        return lambda image: onnx.run(session, image)
    from anncvt.runtime import tvm

    return tvm.load(path)


def _best(scores: np.ndarray, classes: Sequence[str] | None, top: int) -> list[dict[str, Any]]:
    if scores.ndim != 2 or len(scores) != 1:
        shape = "x".join(map(str, scores.shape))
        raise AnncvtError(f"the network's output is {shape}, not class scores", fix="run a classifier")
    shifted = np.exp(scores[0].astype(np.float64) - scores[0].max())
    probabilities = shifted / shifted.sum()
    order = np.argsort(-probabilities, kind="stable")[:top]
    return [
        {
            "class": classes[index] if classes and index < len(classes) else str(index),
            "index": int(index),
            "probability": float(probabilities[index]),
        }
        for index in order
    ]
