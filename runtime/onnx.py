"""ONNX: the converted network as one file that a stock runtime executes, and sessions on it.

Every adder layer is one ``ai.anncvt::Adder2d`` node; the file carries the op's definition in standard operators
(:mod:`anncvt.runtime.onnx_body`). docs/onnx.md describes the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anncvt.errors import AnncvtError, first_line
from anncvt.program import STAGES, Program, versions
from anncvt.progress import SILENT, Progress
from anncvt.runtime import integer_network
from anncvt.runtime.integer_network import IntegerNetwork
from anncvt.runtime.onnx_body import BODIES, DOMAIN, OPSETS, VERSION
from anncvt.runtime.onnx_file import write

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime
    from torch import nn

INPUT, OUTPUT = "image", "logits"
#: Of integers unless told else: the first whose QuantizeLinear onnx's ReferenceEvaluator knows.
INTEGER_OPSET = 19


def export(
    program: Program,
    path: str | Path,
    *,
    opset: int = 18,
    body: str = "scan",
    fuse: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Write the student as ONNX. Equal programs give equal bytes.

    The file takes ``image`` (float32, ``[batch, *input_size]``, already normalised) to ``logits``; how to normalise is
    in its metadata (:func:`metadata`).

    Args:
        path: the ``.onnx`` file. Weights beyond 2 GB go to a second file beside it.
        opset: ONNX operator-set version. Below 18 only networks whose operators exist there.
        body: how the op is defined in standard operators, one of :data:`anncvt.runtime.onnx_body.BODIES`.
        fuse: adders with the BatchNorm, addition and ReLU behind them as one node: fast with the native library,
            slower without it.

    Returns:
        ``path``.

    Raises:
        AnncvtError: nothing was converted yet, the network or ``opset`` is beyond torch's exporter, or ``path`` cannot
            be written.
    """
    if program.student is None:
        raise AnncvtError("there is no adder network to export yet", fix="convert first: `anncvt convert MODEL -o DIR`")
    return export_network(
        program.student,
        program.preprocess.input_size,
        path,
        opset=opset,
        body=body,
        fuse=fuse,
        metadata_props=metadata(program),
        progress=progress,
    )


def export_network(
    network: nn.Module,
    input_size: Sequence[int],
    path: str | Path,
    *,
    opset: int = 18,
    body: str = "scan",
    fuse: bool = False,
    metadata_props: Mapping[str, str] | None = None,
    progress: Progress = SILENT,
) -> Path:
    """:func:`export` for any network, with or without adders, that takes one ``[N, *input_size]`` tensor to another."""
    _require(opset, body)
    from anncvt.runtime.onnx_translate import translate

    with progress.task("exporting to ONNX", None):
        model = translate(network, input_size, opset, body, INPUT, OUTPUT)
        if fuse:
            from anncvt.runtime.onnx_fuse import fuse as fuse_adders

            fuse_adders(model, opset)
        model.metadata_props.update(metadata_props or {})
        write(model, Path(path))
    return Path(path)


def export_integers(
    program: Program,
    path: str | Path,
    *,
    opset: int = INTEGER_OPSET,
    body: str = "scan",
    fuse: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Write the integer network of the program's folder as ONNX, with the same input and output as :func:`export`.

    It computes what :mod:`anncvt.runtime.integer` does, bit for bit; ``logits`` are the integers times their scale.

    Args:
        opset, body: see :func:`export`.
        fuse: adders and convolutions with their requantisation as one node: fast with the native library.

    Raises:
        AnncvtError: not quantized yet, no such opset or body, or ``path`` cannot be written.
    """
    _require(opset, body)
    network = integer_network.load(program.folder or "")
    from anncvt.runtime.onnx_integer import integer_model

    with progress.task("exporting integers to ONNX", None):
        model = integer_model(network, program.preprocess, opset, body, INPUT, OUTPUT, fuse=fuse)
        model.metadata_props.update(metadata(program, network))
        write(model, Path(path))
    return Path(path)


def metadata(program: Program, network: IntegerNetwork | None = None) -> dict[str, str]:
    """What the file says about itself: string keys and values, JSON where there is structure.

    ``anncvt.version``, ``anncvt.source`` (file or zoo name, no folders), ``anncvt.plan`` (SHA-256 of the plan),
    ``anncvt.preprocess`` (``input_size``, ``mean``, ``std``), ``anncvt.versions`` (torch, onnx) and, where known,
    ``anncvt.classes`` and ``anncvt.accuracy`` (percent).

    Args:
        network: the program's integers, if the file holds these: then the accuracy is theirs, and there are
            ``anncvt.integers`` (what they were made with, and ``sha256``) and ``anncvt.scales`` (of every tensor
            ``scale``, ``zero``, ``bits``).
    """
    found = versions()
    entries: dict[str, Any] = {
        "version": found.get("anncvt", "unknown"),
        "source": program.source.name,
        "preprocess": asdict(program.preprocess),
        "versions": {name: found[name] for name in ("torch", "onnx") if name in found},
    }
    if program.plan is not None:
        entries["plan"] = hashlib.sha256(_json(program.plan.to_json()).encode()).hexdigest()
    if program.classes:
        entries["classes"] = program.classes
    if network is not None:
        made_with = {name: value for name, value in network.settings.items() if name != "seconds"}
        entries["integers"] = {**made_with, "sha256": integer_network.digest(network)}
        grids = {integer_network.INPUT: network.input_grid, **{step.name: step.grid for step in network.steps}}
        entries["scales"] = {name: asdict(grid) for name, grid in grids.items()}
    if accuracy := _accuracy(program) if network is None else _integer_accuracy(program):
        entries["accuracy"] = accuracy
    return {
        f"anncvt.{name}": value if isinstance(value, str) else _json(value) for name, value in sorted(entries.items())
    }


def session(
    path: str | Path, *, threads: int | None = None, library: str | Path | None = None
) -> onnxruntime.InferenceSession:
    """Open an exported file in onnxruntime, on the CPU.

    Its attribute ``anncvt`` tells whether the native library runs the adders, and why
    (:class:`anncvt.runtime.onnx_session.Choice`).

    Args:
        threads: threads of one operator; None: onnxruntime's choice, one per core.
        library: the native library, or ``"none"``. None: what ``ANNCVT_ORT_LIBRARY`` names, else ``libanncvt_ort.so``
            beside the model if it is there.

    Raises:
        AnncvtError: the file is missing, damaged, of another version of the op, or needs operators that this
            onnxruntime lacks; or a library that was named does not fit.
    """
    from anncvt.runtime.onnx_session import open_session

    path = Path(path)
    if not path.is_file():
        what, fix = "no such file", "write it with `anncvt export DIR -o model.onnx`"
        if path.is_dir():
            what, fix = "a folder, not a model", f"name the file in it, such as {path / 'model.onnx'}"
        raise AnncvtError(what, where=str(path), fix=fix)
    _check_domain(path)
    return open_session(path, threads, library)


def run(session: onnxruntime.InferenceSession, images: np.ndarray) -> np.ndarray:
    """Logits ``[N, classes]`` of ``images``, ``[N, C, H, W]`` float32, already normalised.

    Raises:
        AnncvtError: the images are not what the network takes.
    """
    (expected,) = session.get_inputs()
    try:
        return session.run([OUTPUT], {expected.name: images})[0]
    except Exception as error:  # onnxruntime's errors have no common base
        wanted = " x ".join(map(str, expected.shape))
        raise AnncvtError(
            f"the network takes {expected.type} {wanted}, not {images.dtype} {' x '.join(map(str, images.shape))}: "
            f"{first_line(error)}",
            fix="normalise the images and resize them to the network's input size",
        ) from error


def _check_domain(path: Path) -> None:
    """Refuse what this version of the op does not define, before a runtime runs it wrongly or fails obscurely."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError) as error:
        raise AnncvtError("not an ONNX model, or damaged", where=str(path), fix="export it again") from error
    if not model.graph.node:
        raise AnncvtError("not an ONNX model, or damaged", where=str(path), fix="export it again")
    declared = {entry.domain: entry.version for entry in model.opset_import}
    used = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    # Where a native library is registered, onnxruntime's tools declare its domain in every model that they write.
    if used and declared.get(DOMAIN, VERSION) != VERSION:
        raise AnncvtError(
            f"it uses version {declared[DOMAIN]} of {DOMAIN}, this anncvt knows version {VERSION}",
            where=str(path),
            fix="open it with the anncvt that wrote it, or export it again",
        )
    bodies = {(function.domain, function.name) for function in model.functions}
    missing = sorted(used - {name for _, name in bodies})
    if missing:
        raise AnncvtError(
            f"it lacks the definition of {DOMAIN}::{', '.join(missing)} (a tool dropped the model's functions)",
            where=str(path),
            fix="export it again and see docs/onnx.md for the tools that keep functions",
        )


def _accuracy(program: Program) -> dict[str, float] | None:
    """The last measured accuracy of the student, unless a later stage has changed its weights."""
    for record in reversed(program.history):
        measured = record.metrics.get("student", record.metrics)
        if isinstance(measured, dict) and "top1" in measured:
            return {name: measured[name] for name in ("top1", "top5") if name in measured}
        if record.stage in STAGES:
            return None
    return None


def _integer_accuracy(program: Program) -> dict[str, float] | None:
    """What was measured when the integers were made."""
    made = next((record for record in reversed(program.history) if record.stage == "quantized"), None)
    measured = made.metrics.get("integer", {}) if made is not None else {}
    return {name: measured[name] for name in ("top1", "top5") if name in measured} or None


def _require(opset: int, body: str) -> None:
    if opset not in OPSETS:
        raise AnncvtError(
            f"opset {opset} is not supported", fix=f"choose --opset between {OPSETS[0]} and {OPSETS[-1]}; 18 is usual"
        )
    if body not in BODIES:
        raise AnncvtError(f"there is no body {body!r} of the op", fix=f"choose --body {' or '.join(BODIES)}")


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
