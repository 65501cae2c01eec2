"""What the processor offers: the target kernels are compiled for, and the tile sizes that fit its registers."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cpu:
    """One processor as the kernel generators see it.

    ``lanes`` float32 values fit a vector; a tile accumulates ``pixels`` x ``vectors`` of them in registers; ``fma``
    says whether a multiply-add costs no more than an add.
    """

    name: str
    lanes: int
    pixels: int
    vectors: int
    fma: bool
    clip: bool
    """Whether one instruction clips a vector to [-1, 1] (AVX-512 DQ)."""

    def target(self) -> Any:
        """The ``tvm.target.Target`` to compile for."""
        import tvm

        return tvm.target.Target({"kind": "llvm", "mcpu": self.name})


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
        return Cpu(name, lanes=16, pixels=16, vectors=1, fma=True, clip=has("avx512dq"))
    if has("avx2", "fma"):
        # 16 registers and explicit broadcasts: 12 sums, two vectors of weights, one broadcast, one temporary.
        return Cpu(name, lanes=8, pixels=6, vectors=2, fma=True, clip=False)
    return Cpu(name, lanes=4, pixels=6, vectors=1, fma=False, clip=False)
