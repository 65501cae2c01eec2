"""The native library for onnxruntime: kernels for the layers of given models, built by the machine's C compiler.

The library serves any model: layers that it has no compiled kernel for run in plain loops.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anncvt.errors import AnncvtError
from anncvt.files import atomic_path
from anncvt.progress import SILENT, Progress
from anncvt.runtime import artifact
from anncvt.runtime.geometry import Padding
from anncvt.runtime.kernels.integer_layer import IntegerLayer, totals
from anncvt.runtime.kernels.layer import LANES, Layer
from anncvt.runtime.onnx_body import DOMAIN, VERSION
from anncvt.runtime.processor import architecture

if TYPE_CHECKING:
    import onnx

LIBRARY = "libanncvt_ort.so"
FORMAT = 2
SOURCES = Path(__file__).parent / "ort"
#: Element type of the first two inputs (data, and weights or multipliers) of every op that the library has (numpy's
#: names).
OPS = {
    "Adder2d": "float32",
    "AdderInteger2d": "uint8",
    "FusedAdder2d": "float32",
    "FusedAdder2dResidual": "float32",
    "Block": "float32",
    "Unblock": "float32",
    "FusedAdderInteger2d": "uint8",
    "FusedAdderInteger2dResidual": "uint8",
    "FusedConvInteger2d": "uint8",
    "FusedConvInteger2dBlocked": "uint8",
    "FusedConvInteger2dBlockedResidual": "uint8",
    "BlockInteger": "uint8",
    "UnblockInteger": "uint8",
    "MaxPoolInteger": "uint8",
}
#: Of the linker: only what others call is visible, so that nothing of it meets TVM's own runtime in a process.
_EXPORTS = "{ global: RegisterCustomOps; anncvt_compiled_calls; anncvt_layers; local: *; };\n"
_FLAGS = (
    *("-std=gnu11", "-O3", "-fno-math-errno", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread"),
    *("-Wl,-z,nodelete", "-Wl,-z,defs"),
    # Object files of the same instruction set repeat the loops in assembly that they share.
    "-Wl,--allow-multiple-definition",
)


def build(
    models: Sequence[str | Path],
    path: str | Path,
    *,
    others: Sequence[str | Path] = (),
    target: str | None = None,
    fixed: bool | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Write the library for ``models``.

    Args:
        models: exported ONNX files; their layers get kernels of their own.
        path: the file to write (atomically).
        others: more of them, which are left out if they cannot be read.
        target: None: every instruction set of x86-64, chosen from at run time; ``"cpu"``: those of this machine;
            ``"x86-64"``, ``"avx2"``, ``"avx512"`` or ``"avx512vnni"``: that one.
        fixed: compute the adders of floats in 16-bit fixed point where the weights of the session's model are constant
            and lose nothing by it (x86-64 from AVX2 on), see :mod:`anncvt.runtime.kernels.fixed_point`. None: on
            processors with AVX-512. False: in float32.
        progress: shows the steps.

    Returns:
        ``path``.

    Raises:
        AnncvtError: TVM or a C compiler is missing, a model cannot be read, the target is unknown or gains nothing from
            fixed point, or the file cannot be written.
    """
    from anncvt.program import versions

    try:
        from anncvt.runtime.kernels import ort_library
    except ImportError as error:
        raise AnncvtError("TVM is not installed", where=LIBRARY, fix="install it: pip install 'anncvt[tvm]'") from error
    compiler = _compiler()
    layers = [layer for model in _readable(models, others, progress) for layer in layers_of(model)]
    levels = ort_library.levels(target)
    wanted = ort_library.kernels(layers, levels, fixed=fixed)
    manifest = {
        "format": FORMAT,
        "domain": {DOMAIN: VERSION},
        "ops": OPS,
        "architecture": architecture(),
        "levels": [level.name for level in levels],
        "fixed": any(kernel.layer.mode == "fixed" for kernel in wanted),
        "kernels": len(wanted),
        "versions": versions(),
    }
    with atomic_path(Path(path)) as temporary, tempfile.TemporaryDirectory(prefix="anncvt-") as scratch:
        folder = Path(scratch)
        with progress.task("compiling kernels", len(wanted)) as task:
            objects = ort_library.compile_objects(wanted, folder, task.advance)
        (folder / "table.c").write_text(ort_library.table(wanted), encoding="ascii")
        _link(compiler, objects, folder, temporary)
        artifact.seal(temporary, manifest)
    return Path(path)


def _readable(
    models: Iterable[str | Path], others: Iterable[str | Path], progress: Progress
) -> Iterator[onnx.ModelProto]:
    yield from map(read, models)
    for path in others:
        try:
            yield read(path)
        except AnncvtError as error:
            progress.note(f"left out: {error}")


def read(path: str | Path) -> onnx.ModelProto:
    """The model in ``path`` with the shapes that follow from its input, without weights that lie beside it.

    Raises:
        AnncvtError: it is missing or not an ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError

    damaged = AnncvtError("not an ONNX model, or damaged", where=str(path), fix="write it with `anncvt export DIR`")
    try:
        model = onnx.load(path, load_external_data=False)
        if not model.graph.node:  # an empty file is a valid model of nothing
            raise damaged
        return onnx.shape_inference.infer_shapes(model)
    except (DecodeError, OSError, onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise damaged from error


def layers_of(model: onnx.ModelProto) -> Iterator[Layer | IntegerLayer]:
    """The layers of ``model`` in the library's ops whose input size is known, as kernels for one image."""
    shapes, constants = _shapes(model), {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.domain != DOMAIN or not node.op_type.startswith(("Adder", "FusedAdder", "FusedConv")):
            continue
        x, weight = (shapes.get(name, ()) for name in node.input[:2])
        adder = "Adder" in node.op_type
        blocked = _blocked(node)
        known = len(x) == (5 if blocked else 4) and len(weight) == 4 and min(*x[1:], *weight) > 0
        if known and (adder or blocked or _attributes(node).get("group", 1) == 1):
            yield _layer(node, x[2:4], weight, constants)


def _blocked(node: onnx.NodeProto) -> bool:
    """Whether a layer's input is blocked."""
    return node.op_type.startswith("FusedAdder") or "Blocked" in node.op_type


def _layer(
    node: onnx.NodeProto, size: Sequence[int], weight: Sequence[int], constants: dict[str, onnx.TensorProto]
) -> Layer | IntegerLayer:
    attributes = _attributes(node)
    groups = attributes.get("group", 1)
    out, depth, *kernel = weight
    channels = depth * groups
    fused, adder = node.op_type.startswith("Fused"), "Adder" in node.op_type
    plain = not _blocked(node) and (not adder or (channels < LANES and groups == 1))
    arguments: dict[str, Any] = {
        "in_channels": channels,
        "size": (size[0], size[1]),
        "out_channels": out,
        "kernel": tuple(kernel),
        "stride": tuple(attributes["strides"]),
        "padding": Padding(*attributes["pads"]),
        "dilation": tuple(attributes["dilations"]),
        "groups": groups,
        "blocked": not plain,
    }
    residual = node.op_type.endswith("Residual")
    if "Integer" in node.op_type:
        arguments["totals"] = _totals(node, weight, constants) if fused else "long"
        return IntegerLayer(
            "adder" if adder else "conv", **arguments, result="uint8" if fused else "int32", residual=residual
        )
    activation = ("clamp", attributes["low"], attributes["high"]) if fused else ()
    return Layer("max", 1, **arguments, activation=activation, residual=residual)


def _totals(node: onnx.NodeProto, weight: Sequence[int], constants: dict[str, onnx.TensorProto]) -> str:
    """See :class:`IntegerLayer`; what the library decides when it sees the weights (``totals_of`` in ``ort/ops.c``)."""
    import onnx

    found = [constants[name] for name in node.input[2:4] if name in constants]
    if len(found) < 2 or any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in found):
        return "long"
    multiplier, bias = (int(abs(onnx.numpy_helper.to_array(tensor).astype(float)).max()) for tensor in found)
    attributes = _attributes(node)
    factor = weight[1] * weight[2] * weight[3] * (1 if "Adder" in node.op_type else 128)
    kind = totals(factor, multiplier, bias, attributes.get("residual_multiplier", 0), attributes["shift"])
    return "short" if kind == "short" else "long"


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    import onnx

    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes by name; 0 for a size that is open."""
    found: dict[str, tuple[int, ...]] = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        if value.type.tensor_type.HasField("shape"):
            found[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    return found


def _compiler() -> str:
    name = os.environ.get("CC") or "cc"
    found = shutil.which(name)
    if found is None:
        raise AnncvtError(
            "there is no C compiler",
            where=name,
            fix="install gcc or clang, or name one in $CC; without the library the model runs in onnxruntime all the "
            "same, on the definitions inside it",
        )
    return found


def _link(compiler: str, objects: Iterable[Path], folder: Path, target: Path) -> None:
    exports = folder / "exports.map"
    exports.write_text(_EXPORTS, encoding="ascii")
    sources = [*sorted(SOURCES.glob("*.c")), folder / "table.c", *objects]
    command = [compiler, *_FLAGS, f"-I{SOURCES}", f"-Wl,--version-script={exports}", "-o", str(target)]
    done = subprocess.run([*command, *map(str, sources), "-lm"], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line or "undefined" in line]
        said = (lines or done.stderr.splitlines() or ["no message"])[0]
        raise AnncvtError(
            f"the C compiler failed: {said.strip()}",
            where=compiler,
            fix="name another one in $CC (gcc 10 or clang 14 and later work)",
        )
