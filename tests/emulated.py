"""Kernels compiled for 64-bit Arm, run by qemu's user emulation: no runtime of TVM, no Arm machine."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import tirx

from anncvt.runtime.kernels.deployment import Deployment

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
needs_emulator = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"needs {COMPILER} and {EMULATOR} (qemu-user)"
)
#: DLPack's codes of numpy's kinds.
_CODES = {"i": 0, "u": 1, "f": 2}


def deployment(cpu: str) -> Deployment:
    """Linux on the Arm processor ``cpu``, for example ``"cortex-a72"``."""
    return Deployment.parse(f"llvm -mtriple=aarch64-linux-gnu -mcpu={cpu}")


def run(function: tirx.PrimFunc, arrays: Sequence[np.ndarray], out: np.ndarray, cpu: str, folder: Path) -> np.ndarray:
    """``function(*arrays, out)`` on an emulated ``cpu`` that has no instructions beyond its own."""
    object_file, program = folder / "kernel.o", folder / "kernel"
    module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
    tvm.compile(module, deployment(cpu).target).mod.write_to_file(str(object_file), "o")
    headers = [*tvm_ffi.libinfo.include_paths(), str(Path(tvm.__file__).parent / "include")]
    source = Path(__file__).parent / "run_kernel.c"
    options = ["-O1", "-static", *(f"-I{folder}" for folder in headers), "-o", str(program)]
    subprocess.run([COMPILER, str(source), str(object_file), *options, "-lm"], check=True, capture_output=True)
    words = []
    for index, array in enumerate((*arrays, out)):
        path = folder / f"{index}.bin"
        array.tofile(path)
        kind = f"{_CODES[array.dtype.kind]}:{array.itemsize * 8}"
        words.append(f"{kind}:{'x'.join(map(str, array.shape))}:{path}")
    done = subprocess.run([EMULATOR, "-cpu", cpu, str(program), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.fromfile(folder / f"{len(arrays)}.bin", out.dtype).reshape(out.shape)
