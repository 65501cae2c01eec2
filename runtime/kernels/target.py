"""What the processor offers: the target kernels are compiled for, and the tile sizes that fit its registers."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

#: Processor levels by name (LLVM's x86-64 levels: every processor of the level runs the code).
LEVELS = {"avx2": "x86-64-v3", "avx512": "x86-64-v4"}


@dataclass(frozen=True)
class Cpu:
    """One processor as the kernel generators see it.

    ``lanes`` float32 values fit a vector; a tile accumulates ``pixels`` x ``vectors`` of them in registers, in gradient
    kernels ``clipped`` x 1, each with a value beside it; ``fma`` says whether a multiply-add costs no more than an add.
    """

    name: str
    lanes: int
    pixels: int
    vectors: int
    clipped: int
    fma: bool
    assembly: bool
    """Whether the innermost forward loops are AVX2 code."""
    clip: bool
    """Whether one instruction clips a vector to [-1, 1] (AVX-512 DQ)."""

    def target(self) -> Any:
        """The ``tvm.target.Target`` to compile for."""
        import tvm

        return tvm.target.Target({"kind": "llvm", "mcpu": self.name})


#: 16 registers and explicit broadcasts: 10 sums, two vectors of weights, a broadcast, the constant 2, a temporary.
#: By level, not by name: for some processors (znver3) LLVM unrolls the inner loops, and spills the sums.
AVX2 = Cpu(LEVELS["avx2"], lanes=8, pixels=5, vectors=2, clipped=5, fma=True, assembly=True, clip=False)


@functools.cache
def host() -> Cpu:
    """The processor this process runs on, by its features."""
    import tvm
    from tvm.target import codegen

    # "native" would silently mean a generic processor without any vector extension.
    name = codegen.llvm_get_system_cpu()
    target = tvm.target.Target({"kind": "llvm", "mcpu": name})

    def has(*features: str) -> bool:
        return all(codegen.target_has_features(feature, target) for feature in features)

    if has("avx512f"):
        # 32 registers, and a broadcast from memory is free as an operand: one vector of weights, many pixels.
        return Cpu(name, lanes=16, pixels=16, vectors=1, clipped=10, fma=True, assembly=False, clip=has("avx512dq"))
    if has("avx2", "fma"):
        return AVX2
    return Cpu(name, lanes=4, pixels=6, vectors=1, clipped=4, fma=False, assembly=False, clip=False)
