"""How one step of an integer layer is computed: the instructions a processor has for it.

A step takes a few input channels of one pixel (``group`` of them, side by side) and the weights of ``lanes`` output
channels for those, and adds to a vector of ``lanes`` sums. Two instructions per step are the usual cost:

================  ======================================  ============
form              instructions                            operands of a step
================  ======================================  ============
adder, x86        psadbw, padd                            8 channels x 2, 4 or 8 outputs
adder, VNNI       vpmaxub, vpdpbusd (by twos)             4 channels x 16 outputs
adder, Arm        uabd, udot (by ones)                    4 channels x 4 outputs
adder, old Arm    uabal, and one uadalp for eight         16 channels x 4 outputs
convolution       pmaddwd, padd (int16 operands)          2 channels x 4, 8 or 16 outputs
convolution       vpdpbusd                                4 channels x 16 outputs
================  ======================================  ============

``vpdpbusd`` adds up ``2*max(x, w)``, and ``sum |x-w| = sum 2*max(x,w) - sum x - sum w``: the sum over the window is
shared by all output channels, and is what their sums begin with; that over the weights is a constant. Elsewhere plain
expressions are left to the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import DataType, DataTypeCode, tirx
from tvm.script import tirx as T

from anncvt.runtime.kernels.flat import splat
from anncvt.runtime.kernels.integer_layer import IntegerLayer

#: What narrow sums are counted from.
ORIGIN = 1 << 15


@dataclass(frozen=True)
class Form:
    """One way to compute ``sums + (x meets w)``.

    ``registers`` vectors of ``sums`` fit the register file beside the operands. The outputs of a pixel fill up to
    ``vectors`` of them. What is of one vector, of all pixels, must be less than 1 KB: TVM puts larger buffers on the
    heap, and LLVM leaves them in memory.
    """

    name: str
    lanes: int
    group: int
    registers: int
    vectors: int
    step: Callable[[Any, Any, Any], Any]
    sums: str = "int32"
    source: str = "uint8"  # int16: a copy of the input holds x - zero
    weight: str = "uint8"
    #: Of a form whose steps add up ``2*max(x, w)``: 16 sums and four times as many bytes of x, added side by side.
    quads: Callable[[Any, Any], Any] | None = None
    alternate: Callable[[Any, Any, Any], Any] | None = None  # of step, every other one
    together: int = 0  # channels of one output side by side in the weights of a step; 0: all of them
    of_rows: int = 0  # registers of a 1x1 layer, whose pixels are one row; 0: as of every other
    packs: bool = False  # there are instructions for :func:`packed`
    #: 16 sums of int32, to which products of int16 side by side are added.
    pairs: Callable[[Any, Any, Any], Any] | None = None

    @property
    def maxima(self) -> bool:
        """Whether steps add up ``2*max(x, w)``."""
        return self.quads is not None

    def narrows(self, layer: IntegerLayer) -> bool:
        """Whether sums are kept within int16, less :data:`ORIGIN`, so that ``pairs`` multiplies and adds at once."""
        return self.pairs is not None and self.maxima and layer.narrow and layer.totals == "short"

    def order(self, vectors: int) -> list[int]:
        """Which output each lane of ``vectors`` vectors sums. Four 64-bit lanes are narrowed two vectors at a time."""
        natural = list(range(vectors * self.lanes))
        if self.sums != "int64" or self.lanes != 4 or vectors % 2:
            return natural
        return [base + i for base in natural[::8] for i in (0, 1, 4, 5, 2, 3, 6, 7)]

    def narrow(self, vectors: Sequence[Any]) -> Any:
        """The lower halves of 64-bit lanes as one int32 vector, in the order of the outputs."""
        count = len(vectors)
        if self.order(count) == list(range(count * self.lanes)):
            return self.join([vector.astype(f"int32x{self.lanes}") for vector in vectors])
        halves = [T.reinterpret("int32x8", vector) for vector in vectors]
        pairs = [
            tirx.Shuffle([a, b], [0, 2, 8, 10, 4, 6, 12, 14]) for a, b in zip(halves[::2], halves[1::2], strict=True)
        ]
        return pairs[0] if len(pairs) == 1 else tirx.Shuffle(pairs, list(range(8 * len(pairs))))

    def join(self, vectors: Sequence[Any]) -> Any:
        """Vectors of ``lanes`` as one."""
        return vectors[0] if len(vectors) == 1 else tirx.Shuffle(list(vectors), list(range(self.lanes * len(vectors))))


def choose(mode: str, architecture: str, features: tuple[str, ...]) -> Form:
    """The fastest form that a processor with these instruction sets (LLVM's names) has.

    Args:
        mode: ``"adder"`` or ``"conv"``.
        architecture: ``"x86_64"``, ``"aarch64"``, ...
    """
    if architecture == "x86_64":
        return _x86_adder(features) if mode == "adder" else _x86_convolution(features)
    if architecture == "aarch64" and mode == "adder":
        if "dotprod" in features:
            return Form("udot", 4, 4, 20, 4, _udot)
        return Form("uabal", 4, 16, 16, 4, _uabal, together=2)
    return PLAIN[mode]


def _x86_adder(features: tuple[str, ...]) -> Form:
    if "avx512vnni" in features:
        return Form("max_dot", 16, 4, 14, 2, _max_dot, quads=_quads, packs=True, of_rows=24, pairs=_dot_pairs)
    if "avx512bw" in features:
        return _sad("llvm.x86.avx512.psad.bw.512", 512, 14)
    if "avx2" in features:
        return _sad("llvm.x86.avx2.psad.bw", 256, 8)
    return _sad("llvm.x86.sse2.psad.bw", 128, 8)


def _x86_convolution(features: tuple[str, ...]) -> Form:
    if "avx512vnni" in features:
        return Form("dot", 16, 4, 14, 2, _dot, weight="int8", packs=True, of_rows=24)
    if "avx512bw" in features:
        return _multiply_pairs("llvm.x86.avx512.pmaddw.d.512", 512, 12)
    if "avx2" in features:
        return _multiply_pairs("llvm.x86.avx2.pmadd.wd", 256, 6)
    return _multiply_pairs("llvm.x86.sse2.pmadd.wd", 128, 6)


def _sad(intrinsic: str, bits: int, registers: int) -> Form:
    lanes = bits // 64

    def step(sums: Any, x: Any, w: Any) -> Any:
        return sums + call(intrinsic, f"int64x{lanes}", w, repeat(x, lanes))

    def alternate(sums: Any, x: Any, w: Any) -> Any:
        """The same: the upper halves are zero. Sums of one kind LLVM would reorder, and run out of registers."""
        difference = call(intrinsic, f"int64x{lanes}", w, repeat(x, lanes))
        halves = f"int32x{2 * lanes}"
        return T.reinterpret(f"int64x{lanes}", T.reinterpret(halves, sums) + T.reinterpret(halves, difference))

    return Form(
        "sad", lanes, 8, registers, min(4, 16 // lanes), step, sums="int64", alternate=alternate, packs=bits == 512
    )


def _multiply_pairs(intrinsic: str, bits: int, registers: int) -> Form:
    lanes = bits // 32

    def step(sums: Any, x: Any, w: Any) -> Any:
        return sums + call(intrinsic, f"int32x{lanes}", w, repeat(x, lanes))

    return Form("multiply_pairs", lanes, 2, registers, 2, step, source="int16", weight="int16", packs=bits == 512)


def _max_dot(sums: Any, x: Any, w: Any) -> Any:
    return _dot_product(sums, tirx.max(w, repeat(x, 16)), splat(2, "uint8", 64))


def _quads(sums: Any, x: Any) -> Any:
    return _dot_product(sums, x, splat(1, "uint8", 64))


def _dot(sums: Any, x: Any, w: Any) -> Any:
    return _dot_product(sums, repeat(x, 16), w)


def _dot_product(sums: Any, unsigned: Any, signed: Any) -> Any:
    """16 sums of four products of bytes."""
    return call("llvm.x86.avx512.vpdpbusd.512", "int32x16", sums, unsigned, signed)


def _dot_pairs(sums: Any, a: Any, b: Any) -> Any:
    """Of int32 vectors whose halves are the factors."""
    halves = (T.reinterpret("int16x32", factor) for factor in (a, b))
    return call("llvm.x86.avx512.vpdpwssd.512", "int32x16", sums, *halves)


def _udot(sums: Any, x: Any, w: Any) -> Any:
    difference = call("llvm.aarch64.neon.uabd", "uint8x16", w, repeat(x, 4))
    return call("llvm.aarch64.neon.udot", "int32x4", sums, difference, splat(1, "uint8", 16))


def _uabal(sums: Any, x: Any, w: Any) -> Any:
    """16-bit sums of eight pairs of channels (at most 8*255), then of their pairs of lanes."""
    total = tirx.Broadcast(tirx.const(0, "uint16"), 8)
    for pair in range(8):
        pixel = repeat(tirx.Shuffle([x], [2 * pair, 2 * pair + 1]), 4)
        filters = tirx.Shuffle([w], list(range(8 * pair, 8 * pair + 8)))
        total = total + call("llvm.aarch64.neon.uabd", "uint8x8", filters, pixel).astype("uint16x8")
    return sums + call("llvm.aarch64.neon.uaddlp", "int32x4", total)


def _plain_adder(sums: Any, x: Any, w: Any) -> Any:
    wide = repeat(x, 4)
    return sums + (tirx.max(w, wide) - tirx.min(w, wide)).astype("int32x4")


def _plain_convolution(sums: Any, x: Any, w: Any) -> Any:
    return sums + repeat(x, 4).astype("int32x4") * w.astype("int32x4")


#: Expressions without any instruction by name, for other processors (and widening multiply-adds on Arm).
PLAIN = {
    "adder": Form("plain", 4, 1, 8, 4, _plain_adder),
    "conv": Form("plain", 4, 1, 16, 4, _plain_convolution, source="int16", weight="int16"),
}


def packed(values: Sequence[Any]) -> Any:
    """One to four vectors of 16 int32 as bytes, saturated, one after the other: four instructions of AVX-512."""
    a, b, c, d = (*values, *(4 - len(values)) * [values[-1]])
    pairs = [call("llvm.x86.avx512.packssdw.512", "int16x32", *pair) for pair in ((a, b), (c, d))]
    quads = T.reinterpret("int32x16", call("llvm.x86.avx512.packuswb.512", "uint8x64", *pairs))
    # The instructions work on quarters of vectors, which hold four lanes of each value.
    ordered = T.reinterpret(
        "uint8x64", tirx.Shuffle([quads], [4 * part + own for own in range(4) for part in range(4)])
    )
    return ordered if len(values) == 4 else tirx.Shuffle([ordered], list(range(16 * len(values))))


def repeat(x: Any, times: int) -> Any:
    """The operand ``x`` of a step, ``times`` in a row."""
    kind = DataType(x.ty.dtype)
    element = f"{'uint' if kind.type_code == DataTypeCode.UINT else 'int'}{kind.bits}"
    whole = T.reinterpret(f"int{kind.bits * kind.lanes}", x)
    return T.reinterpret(f"{element}x{kind.lanes * times}", tirx.Broadcast(whole, times))


def call(intrinsic: str, dtype: str, *arguments: Any) -> Any:
    """An instruction by LLVM's name."""
    return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(intrinsic), *arguments, dtype=dtype)
