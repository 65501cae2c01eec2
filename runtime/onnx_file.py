"""A model as a file: whole or not at all, checked, its weights inside or beside it."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from anncvt.errors import AnncvtError, first_line
from anncvt.files import atomic_path

if TYPE_CHECKING:
    import onnx_ir

#: Weights above this go to a file beside the model: protobuf ends at 2 GiB, and the graph needs room too.
MAX_EMBEDDED_BYTES = 2**31 - 2**24


def write(model: onnx_ir.Model, path: Path) -> None:
    """Save, the weights embedded if they fit, and check.

    Raises:
        AnncvtError: ``path`` cannot be written, or the model is not valid ONNX; then nothing is written.
    """
    import onnx_ir

    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    with atomic_path(path) as temporary:
        if weights > MAX_EMBEDDED_BYTES:
            _write_external(model, path, temporary)
        else:
            onnx_ir.save(model, temporary)
            _check(temporary, path)


def _write_external(model: onnx_ir.Model, path: Path, temporary: Path) -> None:
    """Weights to ``<stem>-<hash>.data`` beside the model: an older model keeps its own until it is replaced."""
    import onnx
    import onnx_ir

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        draft, data = Path(folder, "draft.onnx"), Path(folder, "weights")
        onnx_ir.save(model, draft, external_data=data.name)
        name = f"{path.stem}-{_sha256(data)[:12]}.data"
        beside = path.parent / name
        known = beside.exists()
        os.replace(data, beside)
        proto = onnx.load(draft, load_external_data=False)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = name
        temporary.write_bytes(proto.SerializeToString(deterministic=True))
        try:
            _check(temporary, path)
        except AnncvtError:
            if not known:
                beside.unlink()
            raise


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
            f"the exported model is not valid ONNX: {first_line(error)}",
            where=str(target),
            fix="export with --opset 18 and report the network; nothing was written",
        ) from error
