"""What a converted network sees in pictures, on any backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from anncvt.errors import AnncvtError
from anncvt.images import normalise, read_pixels
from anncvt.program import Program
from anncvt.progress import SILENT, Progress

if TYPE_CHECKING:
    from anncvt.runtime.tvm import Model

BACKENDS = ("torch", "onnxruntime", "tvm")


def predict(
    program: Program,
    pictures: Sequence[str | Path],
    *,
    backend: str = "torch",
    path: Path | None = None,
    integers: bool = False,
    device: torch.device | str = "cpu",
    top: int = 5,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """The most probable classes, ``{"input": path, "top": [{"class", "index", "probability"}, ...]}`` per picture.

    Args:
        backend: one of :data:`BACKENDS`.
        path: the exported or compiled network, for the backends that run one.
        integers: run the integer network.
        device: where torch runs floats; everything else runs on the CPU.
        top: how many classes.

    Raises:
        AnncvtError: no such backend, a picture cannot be read, or the network makes no class scores.
    """
    if backend not in BACKENDS:
        raise AnncvtError(f"no such backend: {backend!r}", fix=f"choose one of {', '.join(BACKENDS)}")
    device = torch.device(device)
    if device.type != "cpu" and (integers or backend != "torch"):
        what = "integer networks run" if integers else f"{backend} runs"
        raise AnncvtError(f"{what} on the CPU, not on {device}", fix="leave out --device, or run floats in torch")
    if integers:
        network = _integers(program, backend, path)
    else:
        network = _normalised(program, _network(program, backend, path, device, progress))
    found = []
    with progress.task("running", len(pictures)) as task:
        for picture in pictures:
            scores = network(read_pixels(picture, program.preprocess))
            found.append({"input": str(picture), "top": _best(scores, program.classes, top)})
            task.advance()
    return found


#: Pixels ``[1, C, H, W]`` uint8 -> scores.
Runner = Callable[[torch.Tensor], np.ndarray]


def _integers(program: Program, backend: str, path: Path | None) -> Runner:
    if backend == "torch":
        from anncvt.runtime import integer_network, integer_torch

        network = integer_network.load(program.folder or "")
        scale = network.steps[-1].grid.scale
        return lambda pixels: integer_torch.run(network, pixels).numpy() * scale
    if backend == "onnxruntime":
        return _normalised(program, _session(path, program, "export DIR --int8"))
    compiled = _loaded(path, program, "compile DIR --int8")
    return lambda pixels: compiled(pixels) * compiled.manifest["output"]["scale"]


def _normalised(program: Program, network: Callable[[np.ndarray], np.ndarray]) -> Runner:
    return lambda pixels: network(normalise(pixels, program.preprocess).numpy())


def _network(
    program: Program, backend: str, path: Path | None, device: torch.device, progress: Progress
) -> Callable[[np.ndarray], np.ndarray]:
    if backend == "torch":
        from anncvt.runtime.torch_runner import runner

        if program.student is None:
            raise AnncvtError("there is no adder network to run", fix="`anncvt convert MODEL -o DIR` first")
        return runner(program.student, device, progress)
    if backend == "onnxruntime":
        return _session(path, program, "export DIR")
    return _loaded(path, program, "compile DIR")


def _session(path: Path | None, program: Program, command: str) -> Callable[[np.ndarray], np.ndarray]:
    from anncvt.runtime import onnx

    session = onnx.session(_made(path, "onnxruntime", program, command))
    return lambda image: onnx.run(session, image)


def _loaded(path: Path | None, program: Program, command: str) -> Model:
    from anncvt.runtime import tvm

    return tvm.load(_made(path, "tvm", program, command))


def _made(path: Path | None, backend: str, program: Program, command: str) -> Path:
    """``path``, which ``command`` writes."""
    if path is None:
        raise AnncvtError(
            f"there is nothing to run on {backend} yet", where=program.folder, fix=f"`anncvt {command}` first"
        )
    return path


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
