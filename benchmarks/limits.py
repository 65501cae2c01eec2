"""What one core can do at most: small loops of the instructions a kernel consists of, with nothing else in them.

The loops are generated as C with inline assembly and built with the machine's compiler, because a compiler left to
itself would remove or reorder them.
"""

from __future__ import annotations

import ctypes
import platform
import subprocess
import tempfile
import time
from pathlib import Path

from anncvt.runtime.processor import features

#: name -> (instructions for one register of sums ``{a}``, elements of a vector of ``bits``).
_BODIES = {
    "fma": ("vfmadd231ps {r}12,{r}13,{r}{a}", 32),
    "max_fma": ("vmaxps {r}12,{r}13,{r}15; vfmadd231ps {r}15,{r}14,{r}{a}", 32),
    "clip_fma": ("vmovaps {r}12,{r}15; vfmadd213ps {r}12,{r}13,{r}15; vmaxps {r}15,{r}13,{r}15; "
                 "vminps {r}15,{r}14,{r}15; vfmadd231ps {r}15,{r}14,{r}{a}", 32),
    "sad": ("vpsadbw {r}12,{r}13,{r}15; vpaddd {r}15,{r}{a},{r}{a}", 8),
    "max_dot": ("vpmaxub {r}12,{r}13,{r}15; vpdpbusd {r}14,{r}15,{r}{a}", 8),
}  # fmt: skip
_NEEDS = {"max_dot": "avx512vnni", "sad": "avx2"}
_SUMS, _ROUNDS = 12, 2_000_000


def port_limits() -> dict[str, float]:
    """Elements per nanosecond (Gop/s) of one core: ``fma`` (a convolution), ``max_fma`` (the adder), ``clip_fma`` (its
    input gradient), and for bytes ``sad`` and ``max_dot``. Empty without AVX2 or a C compiler."""
    found = features() or frozenset()
    if platform.machine() not in ("x86_64", "AMD64") or "avx2" not in found:
        return {}
    register, bits = ("%%zmm", 512) if "avx512bw" in found else ("%%ymm", 256)
    names = [name for name in _BODIES if _NEEDS.get(name, "avx2") in found]
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "limits.c", Path(folder) / "limits.so"
        source.write_text("\n".join(_function(name, register) for name in names), encoding="utf-8")
        try:
            subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return {}
        loops = ctypes.CDLL(str(library))
        return {name: _SUMS * bits / _BODIES[name][1] / _nanoseconds(getattr(loops, name)) for name in names}


def _function(name: str, register: str) -> str:
    body = "".join(
        instruction.strip().format(r=register, a=a) + "\\n"
        for a in range(_SUMS)
        for instruction in _BODIES[name][0].split(";")
    )
    clobbered = ",".join(f'"xmm{i}"' for i in range(16))
    # From zeros: subnormal numbers left in a register would cost extra.
    start = f'__asm__ volatile("vzeroall" ::: {clobbered});'
    return f'void {name}(long n) {{ {start} for (long i = 0; i < n; i++) __asm__ volatile("{body}" ::: {clobbered}); }}'


def _nanoseconds(loop: ctypes._CFuncPtr) -> float:
    """Of one round, the best of a few."""
    best = float("inf")
    for _ in range(8):
        start = time.process_time()
        loop(ctypes.c_long(_ROUNDS))
        best = min(best, time.process_time() - start)
    return best / _ROUNDS * 1e9
