"""What this machine's processor can do, without any compiler library."""

from __future__ import annotations

import functools
import platform
from collections.abc import Sequence
from pathlib import Path

#: LLVM's names where /proc/cpuinfo spells a feature differently.
_SPELLING = {
    "sse4_1": "sse4.1",
    "sse4_2": "sse4.2",
    "avx512_vnni": "avx512vnni",
    "avx512_bf16": "avx512bf16",
    "avx512_vbmi2": "avx512vbmi2",
    "avx512_bitalg": "avx512bitalg",
    "avx512_vpopcntdq": "avx512vpopcntdq",
    "avx_vnni": "avxvnni",
    "bmi1": "bmi",
    "abm": "lzcnt",
    "asimd": "neon",
    "asimddp": "dotprod",
    "asimdhp": "fullfp16",
}

#: Instruction sets that compiled code may use and a processor may lack (LLVM's names).
RELEVANT = frozenset(
    [
        "sse4.1",
        "sse4.2",
        "ssse3",
        "avx",
        "avx2",
        "fma",
        "f16c",
        "bmi",
        "bmi2",
        "lzcnt",
        "popcnt",
        "movbe",
        "avx512f",
        "avx512bw",
        "avx512cd",
        "avx512dq",
        "avx512vl",
        "avx512vnni",
        "avx512bf16",
        "avx512vbmi",
        "avx512vbmi2",
        "avx512ifma",
        "avx512bitalg",
        "avx512vpopcntdq",
        "avxvnni",
        "neon",
        "dotprod",
        "fullfp16",
        "i8mm",
        "bf16",
        "sve",
    ]
)


@functools.cache
def features() -> frozenset[str] | None:
    """Instruction sets of this processor in LLVM's spelling; ``None`` where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(_SPELLING.get(flag, flag) for flag in value.split())
    return None


def architecture() -> str:
    """``"x86_64"``, ``"aarch64"``, ..."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def flags(names: Sequence[str]) -> list[str]:
    """Features in LLVM's spelling as /proc/cpuinfo spells them."""
    theirs = {ours: name for name, ours in _SPELLING.items()}
    return [theirs.get(name, name) for name in names]


def missing(required: list[str]) -> list[str]:
    """Those of ``required`` that this processor lacks (none where the system does not tell)."""
    found = features()
    return [] if found is None else sorted(set(required) - found)
