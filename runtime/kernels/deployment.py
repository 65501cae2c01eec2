"""What a network is compiled for: a name a user can type, resolved to TVM's target and what the kernels need of it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from tvm.target import Target, codegen

from anncvt.errors import AnncvtError
from anncvt.runtime.kernels.layer import Layer
from anncvt.runtime.kernels.target import LEVELS, host
from anncvt.runtime.kernels.tiling import WIDE, Tiling, tiling
from anncvt.runtime.processor import RELEVANT, architecture


@dataclass(frozen=True)
class Deployment:
    """A resolved target; ``name``: as the user gave it.

    ``accumulators``: vectors of 16 float32 sums that its registers hold beside the operands.
    ``features``: instruction sets the code may use (LLVM's names), to be checked before it is loaded.
    ``fixed``: adders of floats are computed in 16-bit fixed point where that loses nothing.
    """

    name: str
    target: Any
    architecture: str
    features: tuple[str, ...]
    accumulators: int
    compiler: str | None  # of the linker for another architecture; None: this machine's
    fixed: bool = False

    @property
    def assembly(self) -> bool:
        """Whether the innermost loops may be AVX2 code (beyond AVX2, LLVM's are as good)."""
        return (
            self.architecture == "x86_64" and {"avx2", "fma"} <= set(self.features) and "avx512f" not in self.features
        )

    def cut(self, layer: Layer) -> Tiling:
        """How a float32 kernel is cut. Tiles may go on in the next line where they are large, or assembly."""
        return tiling(layer, self.accumulators, linear=self.assembly or self.accumulators >= WIDE)

    @classmethod
    def parse(cls, name: str) -> Deployment:
        """Resolve ``"cpu"`` (this machine), ``"avx2"``, ``"avx512"`` or ``"llvm -mtriple=... -mcpu=... -mattr=..."``.

        Raises:
            AnncvtError: the name is unknown, or LLVM does not know the processor.
        """
        return cls._of(_options(name), name)

    @classmethod
    def _of(cls, options: dict[str, Any], name: str) -> Deployment:
        triple = options.get("mtriple", "")
        machine = triple.split("-")[0] or architecture()
        if "mcpu" in options and not codegen.llvm_is_valid_cpu(
            options["mcpu"], triple or codegen.llvm_get_system_triple()
        ):
            raise _unknown(name)  # LLVM would only warn, and compile for a generic processor
        try:
            target = Target(options)
            found = {str(feature) for feature in codegen.llvm_get_cpu_features(target)}
        except Exception as error:  # TVM and LLVM report unknown processors and attributes as they like
            raise _unknown(name) from error
        features = tuple(sorted(found & RELEVANT))
        compiler = None if machine == architecture() else f"{triple}-gcc"
        return cls(name, target, machine, features, _accumulators(machine, features), compiler)


def _options(name: str) -> dict[str, Any]:
    if name == "cpu":
        return {"kind": "llvm", "mcpu": host().name}
    if name in LEVELS:
        return {"kind": "llvm", "mcpu": LEVELS[name]}
    words = shlex.split(name)
    if words[:1] == ["cuda"]:
        raise AnncvtError(
            "no library is compiled for GPUs: there networks run in torch, on this package's CUDA kernels",
            where="--target",
            fix='`anncvt evaluate DIR --device cuda`, or `anncvt.load(DIR).student.to("cuda")`; docs/gpu.md',
        )
    if not words or words[0] != "llvm" or any(not word.startswith("-") or "=" not in word for word in words[1:]):
        raise _unknown(name)
    pairs = dict(word.lstrip("-").split("=", 1) for word in words[1:])
    options: dict[str, Any] = {"kind": "llvm", **pairs}
    if "mattr" in pairs:
        options["mattr"] = pairs["mattr"].split(",")
    return options


def _accumulators(machine: str, features: tuple[str, ...]) -> int:
    """Registers minus operands and a temporary, in vectors of 16."""
    if "avx512f" in features:
        return 16  # 32 registers of 16, but more sums than this gain nothing
    if machine == "aarch64":
        return 6  # 32 registers of 4
    return 5 if "avx2" in features else 3  # 16 registers of 8 or 4


def _unknown(name: str) -> AnncvtError:
    return AnncvtError(
        f"unknown target {name!r}",
        where="--target",
        fix='use cpu, avx2, avx512 or an LLVM target such as "llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a72"',
    )
