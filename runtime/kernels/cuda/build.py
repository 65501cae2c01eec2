"""Cubins: compiled by NVRTC (which comes with torch for CUDA) or nvcc, kept in the folder of compiled kernels.

A cubin is for one architecture (``"sm_90"``). Making one needs TVM, for the source, and one of the two compilers, but
no GPU; using one that is there needs neither.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from anncvt.errors import AnncvtError
from anncvt.progress import SILENT, Progress
from anncvt.runtime.kernels import store
from anncvt.runtime.kernels.cuda.variant import Variant

OLDEST = 75
"""The oldest architecture that the source is written for."""
_GENERATORS = ("depthwise", "emit", "epilogue", "prelude", "source", "tiles", "variant", "weights")
_NVRTC = ("libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12", "nvrtc64_130_0.dll", "nvrtc64_120_0.dll")


def cubin(variant: Variant, arch: str, folder: Path | None = None) -> bytes:
    """The kernel for an architecture, from disk, else compiled (one to several seconds) and kept.

    Args:
        folder: where; that of compiled kernels if not told.

    Raises:
        AnncvtError: it is not on disk, and TVM or a CUDA compiler is missing, or the compiler refuses.
    """
    path = path_of(variant, arch, folder)
    if store.intact(path):
        store.used(path)
        return path.read_bytes()[:-32]
    missing = lacking()
    if missing:
        raise AnncvtError(
            f"no kernel {variant.name} for {arch}, and {missing} to make it with",
            where=str(path.parent),
            fix=f"prebuild it where TVM and nvcc are: anncvt kernels build --arch {arch}, and copy the folder",
        )
    from anncvt.runtime.kernels.cuda.source import source

    content = compiled(source(variant), arch)
    with contextlib.suppress(OSError):  # an unwritable folder costs the next process the same time
        store.write(path, lambda fresh: fresh.write_bytes(content))
    return content


def present(variant: Variant, arch: str, folder: Path | None = None) -> bool:
    """Whether the kernel is on disk."""
    return store.intact(path_of(variant, arch, folder))


def build(
    wanted: Iterable[Variant], archs: Iterable[str], *, folder: Path | None = None, progress: Progress = SILENT
) -> list[Path]:
    """Compile what is not there yet, several at a time; the files, for copying.

    Raises:
        AnncvtError: an architecture is none or too old, a compiler is missing, or the folder cannot be written.
    """
    pairs = [(variant, checked(arch)) for arch in archs for variant in wanted]
    with (
        progress.task("compile CUDA kernels", len(pairs)) as task,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for _ in pool.map(lambda pair: cubin(pair[0], pair[1], folder), pairs):
            task.advance()
    if not all(present(*pair, folder) for pair in pairs):
        place = str(folder or store.folder())
        raise AnncvtError("cannot write compiled kernels", where=place, fix="choose a writable place with -o")
    return [path_of(*pair, folder) for pair in pairs]


def checked(arch: str) -> str:
    """An architecture as ``sm_NN``.

    Raises:
        AnncvtError: it is none, or too old.
    """
    match = re.fullmatch(r"(?:sm_)?(\d{2,3}[af]?)", arch)
    if match is None or int(match.group(1).rstrip("af")) < OLDEST:
        raise AnncvtError(f"{arch!r} is no architecture that kernels are made for", fix=f"sm_{OLDEST} or later: sm_90")
    return f"sm_{match.group(1)}"


def path_of(variant: Variant, arch: str, folder: Path | None = None) -> Path:
    """The file of a kernel, whether it exists or not. Its name tells the generators it was made by."""
    made_by = hashlib.sha256(f"{variant!r} {arch} {_sources()}".encode()).hexdigest()[:16]
    return (folder or store.folder()) / f"{variant.name}-{arch}-{made_by}.cubin"


def lacking() -> str | None:
    """What is missing here to compile a kernel: ``"no TVM"``, ``"no NVRTC and no nvcc"``, or nothing."""
    if importlib.util.find_spec("tvm") is None:
        return "no TVM"
    return "no NVRTC and no nvcc" if _nvrtc() is None and nvcc() is None else None


def compiled(source: str, arch: str) -> bytes:
    """A cubin of CUDA source.

    Raises:
        AnncvtError: the compiler's message.
    """
    return _by_nvcc(source, arch) if _nvrtc() is None else _by_nvrtc(source, arch)


def nvcc() -> str | None:
    """The path of nvcc: of ``CUDA_HOME``, else on ``PATH``, else where toolkits are installed."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home) / "bin"] if home else []
    found = (shutil.which("nvcc", path=str(place)) for place in [*places, *os.get_exec_path(), "/usr/local/cuda/bin"])
    return next(filter(None, found), None)


def _by_nvcc(source: str, arch: str) -> bytes:
    compiler = nvcc()
    assert compiler is not None
    with tempfile.TemporaryDirectory() as scratch:
        given, made = Path(scratch) / "kernel.cu", Path(scratch) / "kernel.cubin"
        given.write_text(source)
        command = [compiler, f"-arch={arch}", "-cubin", "-w", "-o", str(made), str(given)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise _refused("nvcc", arch, done.stderr)
        return made.read_bytes()


def _by_nvrtc(source: str, arch: str) -> bytes:
    library = _nvrtc()
    assert library is not None
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    done = library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    if done:
        raise _refused("NVRTC", arch, f"error {done}")
    try:
        options = (ctypes.c_char_p * 1)(f"--gpu-architecture={arch}".encode())
        if library.nvrtcCompileProgram(program, 1, options):
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            raise _refused("NVRTC", arch, log.value.decode(errors="replace"))
        done = library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        made = ctypes.create_string_buffer(size.value)
        done = done or library.nvrtcGetCUBIN(program, made)
        if done or not size.value:
            raise _refused("NVRTC", arch, f"error {done}: no machine code")
        return made.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _refused(compiler: str, arch: str, message: str) -> AnncvtError:
    lines = [line for line in message.splitlines() if "error" in line.lower()] or message.splitlines() or ["no message"]
    return AnncvtError(f"{compiler} does not compile a kernel for {arch}: {lines[0].strip()}")


@functools.cache
def _nvrtc() -> ctypes.CDLL | None:
    """That of the packages that torch for CUDA comes with, which the driver knows; else a toolkit's."""
    for name in (*_packaged(), *_NVRTC):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


def _packaged() -> list[str]:
    """NVRTC in the installed packages named nvidia-cuda-nvrtc (or -cu12), and beside torch's own libraries."""
    places = [
        *(Path(place) / "nvidia" for place in sys.path),
        *(Path(place) for place in getattr(importlib.util.find_spec("torch"), "submodule_search_locations", ())),
    ]
    patterns = ("lib/libnvrtc.so.*", "*/lib/libnvrtc.so.*", "lib/nvrtc64_*_0.dll", "*/bin/nvrtc64_*_0.dll")
    return [str(path) for place in places for pattern in patterns for path in sorted(place.glob(pattern), reverse=True)]


@functools.cache
def _sources() -> str:
    """What the generated code depends on, and not how it is launched."""
    here = Path(__file__).parent
    content = b"".join((here / f"{name}.py").read_bytes() for name in _GENERATORS)
    return hashlib.sha256(content).hexdigest()
