"""ONNX: the converted network as one file that a stock runtime executes, and sessions on it.

Every adder layer is one ``ai.anncvt::Adder2d`` node; the file carries the op's definition in standard operators
(:mod:`anncvt.runtime.onnx_body`). docs/onnx.md describes the file.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anncvt.errors import AnncvtError
from anncvt.files import atomic_path
from anncvt.program import Program, versions
from anncvt.progress import SILENT, Progress
from anncvt.runtime.onnx_body import DOMAIN, OP_TYPE, OPSETS, VERSION, adder2d_function

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir
    import onnxruntime
    from torch import nn
    from torch.onnx import ONNXProgram

INPUT, OUTPUT = "image", "logits"
#: The lowest opset that torch's exporter writes; older ones are converted from it.
EXPORTER_OPSET = 18
#: Weights above this go to a file beside the model: protobuf ends at 2 GiB, and the graph needs room too.
MAX_EMBEDDED_BYTES = 2**31 - 2**24


def export(program: Program, path: str | Path, *, opset: int = 18, progress: Progress = SILENT) -> Path:
    """Write the student as ONNX. Equal programs give equal bytes.

    The file takes ``image`` (float32, ``[batch, *input_size]``, already normalised) to ``logits``; how to normalise is
    in its metadata (:func:`metadata`).

    Args:
        path: the ``.onnx`` file. Weights beyond 2 GB go to a second file beside it.
        opset: ONNX operator-set version. Below 18 only networks whose operators onnx can convert back.

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
        metadata_props=metadata(program),
        progress=progress,
    )


def export_network(
    network: nn.Module,
    input_size: Sequence[int],
    path: str | Path,
    *,
    opset: int = 18,
    metadata_props: Mapping[str, str] | None = None,
    progress: Progress = SILENT,
) -> Path:
    """:func:`export` for any network, with or without adders, that takes one ``[N, *input_size]`` tensor to another."""
    if opset not in OPSETS:
        raise AnncvtError(
            f"opset {opset} is not supported", fix=f"choose --opset between {OPSETS[0]} and {OPSETS[-1]}; 18 is usual"
        )
    with progress.task("exporting to ONNX", None):
        model = _translate(network, input_size, opset)
        model.metadata_props.update(metadata_props or {})
        _write(model, Path(path))
    return Path(path)


def metadata(program: Program) -> dict[str, str]:
    """What the file says about itself: string keys and values, JSON where there is structure.

    ``anncvt.version``, ``anncvt.source`` (file or zoo name, no folders), ``anncvt.plan`` (SHA-256 of the plan),
    ``anncvt.preprocess`` (``input_size``, ``mean``, ``std``), ``anncvt.versions`` (torch, onnx) and, where known,
    ``anncvt.classes`` and ``anncvt.accuracy`` (percent).
    """
    found = versions()
    entries: dict[str, Any] = {
        "version": found.get("anncvt", "unknown"),
        "source": re.split(r"[/\\]", program.source.model)[-1],
        "preprocess": asdict(program.preprocess),
        "versions": {name: found[name] for name in ("torch", "onnx") if name in found},
    }
    if program.plan is not None:
        entries["plan"] = hashlib.sha256(_json(program.plan.to_json()).encode()).hexdigest()
    if program.classes:
        entries["classes"] = program.classes
    if accuracy := _accuracy(program):
        entries["accuracy"] = accuracy
    return {
        f"anncvt.{name}": value if isinstance(value, str) else _json(value) for name, value in sorted(entries.items())
    }


def session(path: str | Path, *, threads: int | None = None) -> onnxruntime.InferenceSession:
    """Open an exported file in onnxruntime, on the CPU.

    Args:
        threads: threads of one operator; None: onnxruntime's choice, one per core.

    Raises:
        AnncvtError: the file is missing, damaged, of another version of the op, or needs operators that this
            onnxruntime lacks.
    """
    import onnxruntime

    path = Path(path)
    if not path.is_file():
        raise AnncvtError("no such file", where=str(path), fix="write it with `anncvt export DIR -o model.onnx`")
    _check_domain(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common base
        raise AnncvtError(
            f"onnxruntime {onnxruntime.__version__} does not open it: {_first_line(error)}",
            where=str(path),
            fix="export it again, with a lower --opset for an older onnxruntime",
        ) from error


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
            f"{_first_line(error)}",
            fix="normalise the images and resize them to the network's input size",
        ) from error


def _translate(network: nn.Module, input_size: Sequence[int], opset: int) -> onnx_ir.Model:
    """Trace, translate and optimise; the op's body is attached last, or the optimiser would inline it."""
    import onnx_ir

    model = _torch_export(network, input_size, max(opset, EXPORTER_OPSET)).model
    shape = model.graph.inputs[0].shape
    if len(model.graph.outputs) != 1 or shape is None or not isinstance(shape[0], onnx_ir.SymbolicDim):
        raise AnncvtError(
            "the network does not map a batch of any size to one tensor",
            fix="wrap it in a module that returns one tensor and does not fix the batch size",
        )
    _clean(model)
    if opset < EXPORTER_OPSET:
        model = _lower(model, opset)
    if any(node.domain == DOMAIN for node in model.graph.all_nodes()):
        function = onnx_ir.serde.deserialize_function(adder2d_function(opset))
        model.functions[function.identifier()] = function
    return model


def _lower(model: onnx_ir.Model, opset: int) -> onnx_ir.Model:
    """Rewrite for an older opset; the op's body must not be there yet, the converter drops functions."""
    import onnx_ir
    from onnx import version_converter

    for node in model.graph.all_nodes():
        # Reductions got it with opset 18; the converter leaves it behind. 0 is its default.
        if node.attributes.get_int("noop_with_empty_axes", 1) == 0:
            node.attributes.pop("noop_with_empty_axes")
    try:
        return onnx_ir.from_proto(version_converter.convert_version(onnx_ir.to_proto(model), opset))
    except (RuntimeError, ValueError) as error:
        raise AnncvtError(
            f"this network cannot be expressed in opset {opset}: {_first_line(error)}",
            fix=f"export with --opset {EXPORTER_OPSET} or above",
        ) from error


def _torch_export(network: nn.Module, input_size: Sequence[int], opset: int) -> ONNXProgram:
    import torch

    from anncvt.runtime.inference import inference_copy

    op = torch.ops.anncvt.adder2d.default if hasattr(torch.ops.anncvt, "adder2d") else None
    batch = torch.export.Dim("batch")
    try:
        with _quiet("torch.onnx", "onnxscript"):
            exported = torch.onnx.export(
                inference_copy(network),
                (torch.zeros(2, *input_size),),  # not 1: a batch of one is taken for a constant
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=({0: batch},),
                input_names=[INPUT],
                output_names=[OUTPUT],
                custom_translation_table={op: _node_builder()} if op else None,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
        raise AnncvtError(
            f"torch's exporter does not take this network: {_first_line(_root(error))}",
            fix="check that it runs on a batch of two and that its forward does not depend on the data",
        ) from error
    assert exported is not None
    return exported


def _node_builder() -> Any:
    """The translation of ``torch.ops.anncvt.adder2d`` to a bare node that states every attribute.

    The schema stays private to the builder: registered with onnx, it would take precedence over the op's body in shape
    inference.
    """
    from onnx.defs import OpSchema
    from onnxscript import values

    schema = OpSchema(
        OP_TYPE,
        DOMAIN,
        VERSION,
        inputs=[OpSchema.FormalParameter("x", "T"), OpSchema.FormalParameter("w", "T")],
        outputs=[OpSchema.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[
            *(OpSchema.Attribute(name, OpSchema.AttrType.INTS, "") for name in ("strides", "pads", "dilations")),
            OpSchema.Attribute("group", OpSchema.AttrType.INT, ""),
        ],
    )
    node = values.Op(values.Opset(DOMAIN, VERSION), OP_TYPE, schema)

    def adder2d(x, weight, stride, padding, dilation, groups, gradient="full"):
        from anncvt.runtime.geometry import expand_padding

        pads = list(expand_padding(padding))
        return node(x, weight, strides=list(stride), pads=pads, dilations=list(dilation), group=groups)

    return adder2d


def _clean(model: onnx_ir.Model) -> None:
    """Remove what the exporter notes about this machine (stack traces, file names); name adders after their layers."""
    seen: dict[str, int] = {}
    for node in model.graph.all_nodes():
        if node.domain == DOMAIN and (layer := _layer(node)):
            seen[layer] = seen.get(layer, 0) + 1
            node.name = layer if seen[layer] == 1 else f"{layer}.{seen[layer]}"
    model.producer_name, model.producer_version = "anncvt", versions().get("anncvt", "unknown")
    model.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()


def _layer(node: onnx_ir.Node) -> str | None:
    """Qualified name of the module a node came from, from the exporter's list ``['', 'a', 'a.b', 'adder2d']``."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    return scopes[-2] if len(scopes) > 1 else None


def _write(model: onnx_ir.Model, path: Path) -> None:
    """Save and check, the weights embedded if they fit."""
    import onnx_ir

    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    with atomic_path(path) as temporary:
        if weights > MAX_EMBEDDED_BYTES:
            _save_external(model, path, temporary)
        else:
            onnx_ir.save(model, temporary)
        _check(temporary, path)


def _save_external(model: onnx_ir.Model, path: Path, temporary: Path) -> None:
    """Weights to ``<stem>-<hash>.data`` beside the model: an older model keeps its own until it is replaced."""
    import onnx
    import onnx_ir

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        draft, data = Path(folder, "draft.onnx"), Path(folder, "weights")
        onnx_ir.save(model, draft, external_data=data.name)
        name = f"{path.stem}-{_sha256(data)[:12]}.data"
        os.replace(data, path.parent / name)
        proto = onnx.load(draft, load_external_data=False)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = name
        temporary.write_bytes(proto.SerializeToString(deterministic=True))


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check(file: Path, target: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(file, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise AnncvtError(
            f"the exported model is not valid ONNX: {_first_line(error)}",
            where=str(target),
            fix="export with --opset 18 and report the network; nothing was written",
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
    if declared.get(DOMAIN, VERSION) != VERSION:
        raise AnncvtError(
            f"it uses version {declared[DOMAIN]} of {DOMAIN}, this anncvt knows version {VERSION}",
            where=str(path),
            fix="open it with the anncvt that wrote it, or export it again",
        )
    bodies = {(function.domain, function.name) for function in model.functions}
    missing = sorted({n.op_type for n in model.graph.node if n.domain == DOMAIN} - {name for _, name in bodies})
    if missing:
        raise AnncvtError(
            f"it lacks the definition of {DOMAIN}::{', '.join(missing)} (a tool dropped the model's functions)",
            where=str(path),
            fix="export it again and see docs/onnx.md for the tools that keep functions",
        )


def _accuracy(program: Program) -> dict[str, float] | None:
    """The last measured accuracy of the student, of whichever stage measured it."""
    for record in reversed(program.history):
        measured = record.metrics.get("student", record.metrics)
        if isinstance(measured, dict) and "top1" in measured:
            return {name: measured[name] for name in ("top1", "top5") if name in measured}
    return None


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Silence the exporter's remarks: what matters of them becomes an error of ours."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
