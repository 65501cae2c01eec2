"""Which kernels a session of onnxruntime gets: those of the native library, or the definitions inside the model."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anncvt.errors import AnncvtError, first_line
from anncvt.runtime import artifact, processor
from anncvt.runtime.onnx_body import DOMAIN, VERSION
from anncvt.runtime.onnx_native import FORMAT, LIBRARY

if TYPE_CHECKING:
    import onnx
    import onnxruntime

#: Names the library where it does not lie beside the model; "none": no library.
VARIABLE = "ANNCVT_ORT_LIBRARY"

_REBUILD = "run `anncvt compile DIR --for onnxruntime` again"

_log = logging.getLogger(__name__)
#: The library counts the layers of all sessions of a process: those of one are told by opening one at a time.
_opening = threading.Lock()


@dataclass(frozen=True)
class Choice:
    """How a session executes the adders of its model; ``why`` is a sentence.

    ``loops``: layers for which the library should have a compiled kernel and has none. ``fixed``: those that a session
    computes in 16-bit fixed point. ``unfit``: there is a library, but not one for this model on this machine.
    """

    native: bool
    why: str
    library: Path | None = None
    loops: int = 0
    fixed: int = 0
    unfit: bool = False


def open_session(path: Path, threads: int | None, library: str | Path | None = None) -> onnxruntime.InferenceSession:
    """See :func:`anncvt.runtime.onnx.session`; the model's version of the op was checked."""
    choice = choose(path, library)
    if choice.library is not None:
        try:
            with _opening:
                before = _layers(choice.library)
                opened = _open(path, threads, choice.library)
                found = [after - earlier for after, earlier in zip(_layers(choice.library), before, strict=True)]
            return _told(opened, _in_detail(choice, *found))
        except Exception as error:  # onnxruntime's errors have no common base
            if library is not None:
                raise AnncvtError(
                    f"onnxruntime does not open it with the native library: {first_line(error)}",
                    where=str(path),
                    fix=_REBUILD,
                ) from error
            choice = Choice(False, f"{choice.library} did not work: {first_line(error)}", unfit=True)
    return _told(_open_stock(path, threads), choice)


def _layers(library: Path) -> list[int]:
    """Layers that sessions of this process were made of so far: all that may have a compiled kernel, those that
    have one, those in 16-bit fixed point."""
    counts = (ctypes.c_uint64 * 3)()
    ctypes.CDLL(str(library.resolve())).anncvt_layers(counts)
    return list(counts)


def _in_detail(choice: Choice, layers: int, compiled: int, fixed: int) -> Choice:
    """``choice`` with what the library made of the layers in ``why``."""
    why = choice.why
    if fixed:
        why += f", {fixed} of {layers} layers in 16-bit fixed point"
    if compiled < layers:
        why += (
            f", but {layers - compiled} of {layers} layers in its plain loops, because it has no compiled kernel for "
            f"them on this machine: {_REBUILD}"
        )
    return replace(choice, why=why, loops=layers - compiled, fixed=fixed)


def choose(path: Path, library: str | Path | None = None) -> Choice:
    """Whether the native library can run all adders of the model at ``path``, and which library that is.

    Raises:
        AnncvtError: a library that was asked for, with ``library`` or :data:`VARIABLE`, is missing, damaged or for
            another machine.
    """
    import onnx

    asked = os.environ.get(VARIABLE) if library is None else library
    if asked is not None and str(asked) == "none":
        return Choice(False, "no library is wanted")
    model = onnx.load(path, load_external_data=False)
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    if not nodes:
        return Choice(False, "the model has no adders")
    place = Path(asked) if asked is not None else path.parent / LIBRARY
    if asked is None and not place.is_file():
        return Choice(
            False, f"there is no {LIBRARY} beside the model: `anncvt compile DIR --for onnxruntime` builds it"
        )
    try:
        manifest = artifact.read_manifest(place)
        _check(manifest, place)
    except AnncvtError as error:
        if asked is not None:
            raise
        return Choice(False, f"{error}: {error.fix}", unfit=True)
    for node in nodes:
        if (reason := _beyond(node, model, manifest["ops"])) is not None:
            return Choice(False, reason, unfit=True)
    return Choice(True, "all adders run in the native library", place)


def _check(manifest: dict[str, Any], place: Path) -> None:
    if "domain" not in manifest:
        raise AnncvtError("not a library for onnxruntime", where=str(place), fix=_REBUILD)
    if manifest["format"] != FORMAT or manifest["domain"].get(DOMAIN) != VERSION:
        raise AnncvtError("made by another version of anncvt", where=str(place), fix=_REBUILD)
    if manifest["architecture"] != processor.architecture():
        raise AnncvtError(
            f"made for {manifest['architecture']}, this machine is {processor.architecture()}",
            where=str(place),
            fix=_REBUILD,
        )


def _beyond(node: onnx.NodeProto, model: onnx.ModelProto, ops: dict[str, str]) -> str | None:
    """What the library lacks for ``node``."""
    import onnx

    if node.op_type not in ops:
        return f"the library has no {node.op_type}, so it is not of the model's version: export again and {_REBUILD}"
    types = _types(model)
    for name in node.input[:2]:  # the data and the weights
        if types.get(name):
            dtype = onnx.helper.tensor_dtype_to_np_dtype(types[name]).name
            if dtype != ops[node.op_type]:
                return f"{node.name or node.op_type} is in {dtype}, the library's {node.op_type} in {ops[node.op_type]}"
    return None


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element types by name, as far as the model states them."""
    found = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.value_info):
        found[value.name] = value.type.tensor_type.elem_type
    return found


def _open(path: Path, threads: int | None, library: Path | None) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    if library is not None:
        options.register_custom_ops_library(str(library.resolve()))
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _open_stock(path: Path, threads: int | None) -> onnxruntime.InferenceSession:
    import onnxruntime

    try:
        return _open(path, threads, None)
    except Exception as error:  # onnxruntime's errors have no common base
        raise AnncvtError(
            f"onnxruntime {onnxruntime.__version__} does not open it: {first_line(error)}",
            where=str(path),
            fix="export it again, with a lower --opset for an older onnxruntime",
        ) from error


def _told(session: onnxruntime.InferenceSession, choice: Choice) -> onnxruntime.InferenceSession:
    session.anncvt = choice
    level = logging.WARNING if choice.loops or choice.unfit else logging.INFO
    _log.log(level, "%s: %s", "native" if choice.native else "stock", choice.why)
    return session
