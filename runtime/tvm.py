"""A whole network, of floats or of integers, as one shared library: compile it with TVM, run it without torch.

The file holds the code for one processor family, the weights and a manifest. Any batch size works: code is generated
for fixed batch sizes (1 unless told otherwise), which keeps memory planned and index arithmetic constant, and a larger
batch runs as the largest compiled ones that fit, then the smaller ones.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anncvt.errors import AnncvtError
from anncvt.files import atomic_path
from anncvt.progress import SILENT, Progress
from anncvt.runtime import artifact, processor
from anncvt.runtime.integer_network import IntegerNetwork

if TYPE_CHECKING:
    from torch import nn
    from tvm import ir

    from anncvt.program import Preprocess, Program
    from anncvt.runtime.kernels.deployment import Deployment

FORMAT = 1


def compile(
    program: Program,
    path: str | Path,
    *,
    target: str = "cpu",
    batch: int | Sequence[int] = 1,
    fixed: bool | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Compile the student of ``program`` to a shared library with the weights inside.

    Args:
        program: with a student (from the rewrite on).
        path: the file to write (atomically).
        target: ``"cpu"`` (this machine), ``"avx2"``, ``"avx512"``, or an LLVM target string for another machine.
        batch: batch size(s) to generate code for; 1 is always among them.
        fixed: compute the adders in 16-bit fixed point (x86-64 from AVX2 on), those that lose nothing by it; see
            :mod:`anncvt.runtime.kernels.fixed_point`. None: where the target has AVX-512. False: in float32.
        progress: shows the steps.

    Returns:
        ``path``.

    Raises:
        AnncvtError: TVM is not installed, there is no student, an operator has no compiled form, the target is unknown
            or gains nothing from fixed point, no C compiler links the library, or the file cannot be written.
    """
    if program.student is None:
        raise AnncvtError("there is no student network yet", where="compile", fix="run `anncvt convert` first")
    return compile_network(
        program.student,
        program.preprocess,
        path,
        target=target,
        batch=batch,
        fixed=fixed,
        about=about(program),
        progress=progress,
    )


def about(program: Program) -> dict[str, Any]:
    """What a manifest says about where a network is from."""
    return {"model": program.source.name, "arch": program.source.arch, "classes": program.classes}


#: Batch size of each function by name, target -> the module, what a manifest says of its input and of its output, and
#: whether it has layers in 16-bit fixed point.
Lowered = Callable[[dict[str, int], "Deployment"], "tuple[ir.IRModule, dict[str, Any], dict[str, Any], bool]"]


def compile_network(
    network: nn.Module | IntegerNetwork,
    preprocess: Preprocess,
    path: str | Path,
    *,
    target: str = "cpu",
    batch: int | Sequence[int] = 1,
    fixed: bool | None = None,
    about: dict[str, Any] | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Compile any network of convolutions and adders, see :func:`compile`; ``about`` goes into the manifest.

    An integer network takes pixels, bytes as they are in a picture, and gives int32 logits, bit for bit those of its
    reference. Its normalisation is part of it: nothing is computed in floats.
    """
    require()
    about = about or {}
    if isinstance(network, IntegerNetwork):
        lowered, about = _integers(network), {**about, "integers": network.settings}
    else:
        lowered = _floats(network, preprocess.input_size)
    return _write(lowered, preprocess, Path(path), _deployment(target, fixed), batch, about, progress)


def _deployment(target: str, fixed: bool | None) -> Deployment:
    from anncvt.runtime.kernels import fixed_point
    from anncvt.runtime.kernels.deployment import Deployment

    deployment = Deployment.parse(target)
    chosen = fixed_point.chosen(fixed, deployment.architecture, deployment.features)
    if fixed and not chosen:
        raise fixed_point.refusal(deployment.name)
    return dataclasses.replace(deployment, fixed=chosen)


def _floats(network: nn.Module, size: Sequence[int]) -> Lowered:
    from anncvt.runtime.kernels.network import export, lower

    def lowered(
        batches: dict[str, int], deployment: Deployment
    ) -> tuple[ir.IRModule, dict[str, Any], dict[str, Any], bool]:
        programs = {name: export(network, (count, *size)) for name, count in batches.items()}
        module, shape, fixed = lower(programs, deployment)
        source = {"name": "image", "shape": ["batch", *size], "dtype": "float32"}
        return module, source, {"name": "logits", "shape": ["batch", *shape], "dtype": "float32"}, fixed

    return lowered


def _integers(network: IntegerNetwork) -> Lowered:
    from anncvt.runtime.kernels.integer_lowering import lower

    last = network.steps[-1]
    source = {"name": "pixels", "shape": ["batch", *network.input_shape], "dtype": "uint8"}
    result = {"name": "logits", "shape": ["batch", last.shape[0]], "dtype": "int32", "scale": last.grid.scale}
    return lambda batches, deployment: (lower(network, batches, deployment), source, result, False)


def _write(
    lowered: Lowered,
    preprocess: Preprocess,
    path: Path,
    deployment: Deployment,
    batch: int | Sequence[int],
    about: dict[str, Any],
    progress: Progress,
) -> Path:
    """Lower a network, build it, and write it with its manifest."""
    from anncvt.program import versions
    from anncvt.runtime.kernels.network import build_library

    functions = {f"batch_{size}": size for size in _batches(batch)}
    with progress.task("Compiling", 3) as task:
        module, source, result, fixed = lowered(functions, deployment)
        task.advance()
        manifest = {
            "format": FORMAT,
            **about,
            "input": source,
            "output": result,
            "preprocess": {
                "input_size": list(preprocess.input_size),
                "mean": list(preprocess.mean),
                "std": list(preprocess.std),
            },
            "functions": functions,
            "target": {
                "name": deployment.name,
                "fixed": fixed,
                "architecture": deployment.architecture,
                "features": list(deployment.features),
                "flags": processor.flags(deployment.features),
            },
            "versions": versions(),
        }
        with atomic_path(path) as temporary:
            build_library(module, deployment, temporary, task.advance)
            artifact.seal(temporary, manifest)
    return path


def load(path: str | Path, *, threads: int | None = None) -> Model:
    """Load a compiled network. Imports no torch.

    Args:
        path: what :func:`compile` wrote.
        threads: threads of one call; default: all cores (or ``TVM_NUM_THREADS``).

    Raises:
        AnncvtError: the file is missing or damaged, this processor lacks instructions it was compiled for, or TVM's
            runtime is not installed.
    """
    path = Path(path)
    manifest = artifact.read_manifest(path)
    if manifest["format"] > FORMAT:
        raise AnncvtError("written by a newer anncvt", where=str(path), fix="update anncvt, or compile it again")
    _check_machine(path, manifest["target"])
    require()
    return Model(path, manifest, threads)


class Model:
    """A compiled network: ``model(images) -> logits``. Calls from several threads take turns; models run in parallel.

    Attributes:
        manifest: what the network is, its input and preprocessing, versions and target (a JSON object).
    """

    def __init__(self, path: Path, manifest: dict[str, Any], threads: int | None = None) -> None:
        import tvm
        from tvm.runtime.vm import VirtualMachine

        self.manifest = manifest
        self._path, self._threads, self._lock = path, threads, threading.Lock()
        self._configured: set[int] = set()
        try:
            # dlopen by a plain name would search the system's folders instead.
            self._machine = VirtualMachine(tvm.runtime.load_module(str(path.resolve())), tvm.cpu())
        except (RuntimeError, OSError, ValueError, AttributeError) as error:  # what TVM makes of a failed dlopen
            raise AnncvtError(
                f"cannot load: {str(error).strip().splitlines()[-1]}",
                where=str(path),
                fix="compile it again with the installed version of TVM",
            ) from error
        functions: dict[str, int] = manifest["functions"]
        self._result = tuple(manifest["output"]["shape"][1:]), np.dtype(manifest["output"]["dtype"])
        shape, dtype = manifest["input"]["shape"][1:], manifest["input"]["dtype"]
        self._functions = []
        for size, name in sorted(((size, name) for name, size in functions.items()), reverse=True):
            images = tvm.runtime.empty((size, *shape), dtype)  # kept: a new one for each call takes longer
            self._functions.append((size, self._machine[name], images, np.from_dlpack(images)))

    def __call__(self, images: Any) -> np.ndarray:
        """Logits of ``images`` ``[N, C, H, W]``, any ``N``, an array or whatever gives one by DLPack.

        A network of floats takes normalised images, float32, and gives float32; a network of integers takes pixels,
        uint8, and gives int32 (times ``manifest["output"]["scale"]``). The result is ``[N, classes]``, or of the shape
        that the network has (``manifest["output"]["shape"]``).

        Raises:
            AnncvtError: shape or dtype do not fit the network.
        """
        images = self._images(images)
        logits = np.empty((len(images), *self._result[0]), self._result[1])
        with self._lock:
            self._configure_threads()
            start = 0
            for size, function, tensor, view in self._functions:
                while len(images) - start >= size:
                    view[...] = images[start : start + size]
                    logits[start : start + size] = np.from_dlpack(function(tensor))
                    start += size
        return logits

    def _images(self, given: Any) -> np.ndarray:
        """``given`` as an array that the network takes."""
        images = np.from_dlpack(given) if hasattr(given, "__dlpack__") else np.asarray(given)
        expected = self.manifest["input"]
        size, dtype = expected["shape"][1:], np.dtype(expected["dtype"])
        if list(images.shape[1:]) != size:
            raise AnncvtError(
                f"images of shape {list(images.shape)}, expected [N, {', '.join(map(str, size))}]",
                where=str(self._path),
                fix="resize them as manifest['preprocess'] says",
            )
        if dtype == np.uint8 and images.dtype != np.uint8:
            raise AnncvtError(
                f"images of {images.dtype}, expected pixels of uint8",
                where=str(self._path),
                fix="give pixels as they are in a picture, 0..255, not normalised",
            )
        return images

    def _configure_threads(self) -> None:
        """TVM keeps a thread pool per calling thread, so the count is set once in each."""
        if self._threads is None or threading.get_ident() in self._configured:
            return
        import tvm

        tvm.get_global_func("runtime.config_threadpool")(1, self._threads)
        self._configured.add(threading.get_ident())


def _batches(batch: int | Sequence[int]) -> list[int]:
    sizes = {1, *([batch] if isinstance(batch, int) else batch)}
    if min(sizes) < 1:
        raise AnncvtError(f"batch size {min(sizes)}", where="compile", fix="give positive batch sizes")
    return sorted(sizes)


def _check_machine(path: Path, target: dict[str, Any]) -> None:
    fix = "compile it on this machine, or for more processors (`anncvt compile --target avx512` or `avx2`)"
    if target["architecture"] != processor.architecture():
        raise AnncvtError(
            f"compiled for {target['architecture']}, this machine is {processor.architecture()}",
            where=str(path),
            fix=fix,
        )
    missing = processor.missing(target["features"])
    if missing:
        raise AnncvtError(f"this processor lacks {', '.join(missing)}", where=str(path), fix=fix)


def require() -> None:
    """Import TVM, without torch where torch is not imported yet: TVM does not need it and it costs seconds.

    Raises:
        AnncvtError: it is not installed.
    """
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # makes `import torch` raise ImportError
    try:
        import tvm  # noqa: F401
    except ImportError as error:
        raise AnncvtError(
            "TVM is not installed", where="runtime.tvm", fix="install it: pip install 'anncvt[tvm]'"
        ) from error
    finally:
        if hidden:
            del sys.modules["torch"]
