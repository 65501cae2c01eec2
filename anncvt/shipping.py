"""What becomes of an adder network: exported, compiled, and then checked, run and timed; part of :mod:`anncvt.api`.

Wherever a function takes a ``program``, the path of a program folder does as well.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anncvt import devices
from anncvt.arguments import beside, choice_of, opened
from anncvt.errors import AnncvtError
from anncvt.measure import DataChoice, chosen
from anncvt.program import Program
from anncvt.progress import SILENT, Progress

ONNX, LIBRARY, HARDWARE = "model.onnx", "model.so", "hardware"
INTEGER_ONNX, INTEGER_LIBRARY = "model.int8.onnx", "model.int8.so"
#: Images that ``check`` compares the backends on.
CHECK_IMAGES = 1000
#: And the executions of its integers, of which some are slow.
INTEGER_IMAGES = 2


def export(
    program: Program | str | Path,
    path: str | Path | None = None,
    *,
    integers: bool = False,
    opset: int | None = None,
    body: str = "scan",
    fuse: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Write the adder network as ONNX, to ``model.onnx`` in its folder unless ``path`` says else.

    Args:
        integers: its integer network instead (of 8 bits or fewer), to ``model.int8.onnx``.
        opset: None: 18, for integers 19.
        body: the op in standard operators: "scan", whose memory stays small, or "one", without control flow.
        fuse: adders with what follows them as one node.

    Raises:
        AnncvtError: nothing converted yet, or not quantized yet, not exportable, or ``path`` cannot be written.
    """
    from anncvt.runtime import onnx

    program = opened(program, progress)
    target = beside(program, path, INTEGER_ONNX if integers else ONNX)
    options = {} if opset is None else {"opset": opset}
    if integers:
        return onnx.export_integers(program, target, body=body, fuse=fuse, **options, progress=progress)
    return onnx.export(program, target, body=body, fuse=fuse, **options, progress=progress)


def export_hardware(
    program: Program | str | Path,
    path: str | Path | None = None,
    data: DataChoice | str | None = None,
    *,
    golden: int = 2,
    progress: Progress = SILENT,
) -> Path:
    """Write the integer network as a package for hardware, to ``hardware`` in its folder unless ``path`` says else.

    Args:
        data: images for golden vectors; default: the test images of the conversion.
        golden: how many.

    Raises:
        AnncvtError: not quantized yet, no data, or ``path`` is something else or cannot be written.
    """
    from anncvt.runtime import hardware, integer_network

    program = opened(program, progress)
    target = beside(program, path, HARDWARE)
    network = integer_network.load(program.folder or "")
    images = chosen(program, choice_of(data), "synthetic").open(
        "test", program.preprocess, at_most=golden, labelled=False, progress=progress
    )
    about = {"model": program.source.name, "arch": program.source.arch, "classes": program.classes}
    pixels = images.pixels[:golden].numpy()
    return hardware.export(network, target, pixels, about=about, progress=progress)


def compile(
    program: Program | str | Path,
    path: str | Path | None = None,
    *,
    target: str = "cpu",
    batch: int | Sequence[int] = 1,
    integers: bool = False,
    fixed: bool | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Compile the adder network with TVM, to ``model.so`` in its folder unless ``path`` says else.

    Args:
        target, batch: see :func:`anncvt.runtime.tvm.compile`.
        fixed: compute the adders in 16-bit fixed point (:mod:`anncvt.runtime.kernels.fixed_point`). None: where it is
            much faster, and the logits of a few images stay what they are in torch (:mod:`anncvt.precision`).
        integers: compile the integer network instead, to ``model.int8.so``.

    Raises:
        AnncvtError: nothing converted (or quantized) yet, TVM missing, an operator without a kernel, or ``path`` cannot
            be written.
    """
    from anncvt import precision
    from anncvt.runtime import contestants, integer_network, tvm

    program = opened(program, progress)
    if integers:
        return tvm.compile_network(
            integer_network.load(program.folder or ""),
            program.preprocess,
            beside(program, path, INTEGER_LIBRARY),
            target=target,
            batch=batch,
            about=tvm.about(program),
            progress=progress,
        )
    make = functools.partial(tvm.compile, program, target=target, batch=batch, progress=progress)
    library = beside(program, path, LIBRARY)
    if fixed is None and program.student is not None and precision.worth_trying(target):
        return precision.write(program, library, make, contestants.in_tvm, progress)
    return make(library, fixed=bool(fixed))


def compile_for_onnxruntime(
    program: Program | str | Path,
    path: str | Path | None = None,
    *,
    target: str | None = None,
    fixed: bool | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Build the native library that makes the folder's ONNX files fast in onnxruntime.

    It goes to ``libanncvt_ort.so`` in the folder, where :func:`anncvt.runtime.onnx.session` looks for it, unless
    ``path`` says else. Files under other names than ``export`` gives them are left out, with a note, if they are
    damaged.

    Args:
        target: see :func:`anncvt.runtime.onnx_native.build`.
        fixed: see :func:`compile`.

    Raises:
        AnncvtError: nothing was exported yet, TVM or a C compiler is missing, the target gains nothing from fixed
            point, or ``path`` cannot be written.
    """
    from anncvt import precision
    from anncvt.runtime import contestants, onnx_native

    program = opened(program, progress)
    found = sorted(Path(program.folder).glob("*.onnx")) if program.folder else []
    if not found:
        raise AnncvtError("nothing was exported yet", where=program.folder, fix="run `anncvt export DIR` first")
    models = [file for file in found if file.name in (ONNX, INTEGER_ONNX)]
    others = [file for file in found if file not in models]
    library = beside(program, path, onnx_native.LIBRARY)
    make = functools.partial(onnx_native.build, models, others=others, target=target, progress=progress)
    floats = next((file for file in models if file.name == ONNX), None)
    if fixed is None and floats is not None and program.student is not None and precision.worth_trying(None):
        with_library = functools.partial(contestants.in_onnxruntime, floats, None)
        return precision.write(program, library, make, with_library, progress)
    return make(library, fixed=bool(fixed))


def build_kernels(
    archs: Sequence[str],
    dtypes: Sequence[str] = ("float32",),
    *,
    output: str | Path | None = None,
    progress: Progress = SILENT,
) -> list[Path]:
    """Compile the CUDA kernels, for GPUs that are elsewhere; those that are there already stay.

    Args:
        archs: ``"sm_80"``, ``"sm_90"``, ...
        dtypes: of images: "float32", "float16", "bfloat16".
        output: the folder; default: that of compiled kernels. On the other machine ``ANNCVT_CACHE`` names it.

    Returns:
        The files.

    Raises:
        AnncvtError: an unknown architecture or type, no compiler, or a folder that cannot be written.
    """
    from anncvt.runtime.kernels.cuda import build
    from anncvt.runtime.kernels.cuda.variant import DTYPES, variants

    unknown = next((dtype for dtype in dtypes if dtype not in DTYPES), None)
    if unknown is not None:
        raise AnncvtError(f"no kernels for images of type {unknown!r}", fix=f"choose of {', '.join(DTYPES)}")
    return build.build(
        list(variants(dtypes=dtypes)), archs, folder=None if output is None else Path(output), progress=progress
    )


def check(
    program: Program | str | Path,
    data: DataChoice | str | None = None,
    *,
    onnx_path: str | Path | None = None,
    so_path: str | Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Compare the exported and the compiled network with torch, see :func:`anncvt.runtime.check.check`.

    Returns:
        ``{"ok", "backends": {name: {"ok", "max_abs", "max_rel", "top1_agreement"}}, "images", "data", ...}``.

    Args:
        data: the images to compare on, at most 1000 unless it has a limit; default: the test images of the conversion,
            else noise.
        onnx_path, so_path: default: what lies in the program's folder.

    Raises:
        AnncvtError: neither file is there, or one cannot be run.
    """
    from anncvt.runtime.check import check as check_backends

    program = opened(program, progress)
    choice = chosen(program, choice_of(data), "synthetic")
    if choice.spec == "synthetic":
        progress.note("checking on noise; name real images with --data DATA")
    images = choice.open("test", program.preprocess, at_most=CHECK_IMAGES, labelled=False, progress=progress)
    result = check_backends(program, images, onnx_path=onnx_path, so_path=so_path, progress=progress)
    return {**result, "data": images.name}


def check_integers(
    program: Program | str | Path,
    data: DataChoice | str | None = None,
    *,
    onnx_path: str | Path | None = None,
    so_path: str | Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Compare all executions of the folder's integer network bit for bit, layer by layer.

    Args:
        data: the images to compare on, at most 2 unless it has a limit; default: the test images of the conversion,
            else noise.
        onnx_path: the exported network; default: ``model.int8.onnx`` in the program's folder, if it is there.
        so_path: the compiled network; default: ``model.int8.so`` there, if it is.

    Returns:
        See :func:`anncvt.runtime.check_integers.check`, and "data".

    Raises:
        AnncvtError: not quantized yet, the data cannot be read, or the file holds another network.
    """
    from anncvt.runtime import integer_network
    from anncvt.runtime.check import exported_file
    from anncvt.runtime.check_integers import check as compare

    program = opened(program, progress)
    network = integer_network.load(program.folder or "")
    choice = chosen(program, choice_of(data), "synthetic")
    images = choice.open("test", program.preprocess, at_most=INTEGER_IMAGES, labelled=False, progress=progress)
    files = {
        "onnx_path": onnx_path or exported_file(program, INTEGER_ONNX),
        "so_path": so_path or exported_file(program, INTEGER_LIBRARY),
    }
    return {**compare(network, images.pixels.numpy(), **files, progress=progress), "data": images.name}


def run(
    program: Program | str | Path,
    inputs: str | Path | Sequence[str | Path],
    *,
    backend: str = "torch",
    integers: bool = False,
    device: str = "cpu",
    top: int = 5,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """Classify picture files: ``{"input", "top": [{"class", "index", "probability"}, ...]}`` for each.

    Args:
        backend: "torch", "onnxruntime" (what ``export`` wrote) or "tvm" (what ``compile`` wrote).
        integers: run the integer network; ``export`` and ``compile`` with ``integers`` write it for the other two.
        device: "cpu", "cuda" or "auto", for floats in torch.

    Raises:
        AnncvtError: a picture cannot be read, there is no such device, or the backend has nothing to run.
    """
    from anncvt.predict import predict
    from anncvt.runtime.check import exported_file

    program = opened(program, progress)
    pictures = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    files = {"onnxruntime": (ONNX, INTEGER_ONNX), "tvm": (LIBRARY, INTEGER_LIBRARY)}
    name = files[backend][integers] if backend in files else None
    path = None if name is None else exported_file(program, name)
    where = devices.choose(device)
    return predict(
        program, pictures, backend=backend, path=path, integers=integers, device=where, top=top, progress=progress
    )


def bench(
    program: Program | str | Path,
    *,
    batch: int = 1,
    threads: int | None = None,
    repeats: int = 50,
    seconds: float = 60,
    device: str = "cpu",
    teacher_in_tvm: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Time the adder network against its CNN on every backend, see :func:`anncvt.runtime.bench.bench`.

    Returns:
        ``{"rows": [{"network", "backend", "dtype", "batch", "threads", "p50_ms", "p90_ms", ...}], "missing",
        "settings"}``.

    Raises:
        AnncvtError: nothing converted yet, or a file in the folder cannot be run.
    """
    from anncvt.facts import keep_bench
    from anncvt.runtime.bench import bench as bench_backends

    program = opened(program, progress)
    result = bench_backends(
        program,
        batch=batch,
        threads=threads,
        repeats=repeats,
        seconds=seconds,
        device=devices.choose(device),
        teacher_in_tvm=teacher_in_tvm,
        progress=progress,
    )
    keep_bench(program, result)
    return result
