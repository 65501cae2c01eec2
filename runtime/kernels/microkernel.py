"""The innermost loops of a layer for AVX2 as assembly: sums of a tile of pixels stay in registers over all its taps.

With 16 registers the loops have none to spare, and the instructions barely fit the decoder. LLVM, however the loops
are written, now spills sums and now reloads constants; the same loops then take up to three times as long. Here
registers and order are fixed.

Per tap (one input value of every pixel, one or two vectors of weights):

    load the weights; for each pixel: broadcast x; t = max(w, x); sum += t * 2

The maximum occupies the adders, the multiplication by 2 moves the accumulation to the multiply-adders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

#: Floats of a register.
LANES = 8
#: Registers for sums; the others hold weights (two), the constant and two values on their way.
SUMS = {"max": 10, "conv": 12}


@dataclass(frozen=True)
class Microkernel:
    """One loop nest. All offsets and steps are in floats.

    ``pixels``: of the tile's pixels in x; ``vectors``: of the weight vectors of a tap (one or two), which lie
    ``advance`` behind those of the tap before. x is read in runs of ``run`` neighbours; ``loops`` repeat that, the
    innermost last, as ``(times, step in x)``. The outermost loop steps by ``outer``; how often it runs, the call says.
    """

    form: str  # "max": max(w, x), twice; "conv": w * x
    pixels: tuple[int, ...]
    vectors: tuple[int, ...]
    advance: int
    run: int
    loops: tuple[tuple[int, int], ...]
    outer: int

    @property
    def name(self) -> str:
        return f"anncvt_taps_{hashlib.sha256(repr(self).encode()).hexdigest()[:16]}"

    @property
    def attribute(self) -> tuple[Any, str, str]:
        """Node, key and value of the attribute that brings the function into a module."""
        return tirx.const(0, "int32"), "pragma_import_llvm", self.llvm()

    def imported(self) -> Any:
        """The scope in which :meth:`call` may be used."""
        return T.attr(*self.attribute)

    def call(self, sums: Any, x: Any, weight: Any, times: Any, fresh: Any) -> None:
        """Emit ``sums[pixel, vector, lane] += taps``, or ``= taps`` where ``fresh``.

        ``sums``, ``x`` and ``weight`` are addresses; ``times`` is how often the outermost loop runs.
        """
        T.evaluate(self.expression(sums, x, weight, times, fresh))

    def expression(self, sums: Any, x: Any, weight: Any, times: Any, fresh: Any) -> Any:
        """:meth:`call`, to be evaluated."""
        counts = (tirx.Cast("int64", value) for value in (times, fresh))
        return tirx.call_extern("int32", self.name, sums, x, weight, *counts)

    def llvm(self) -> str:
        """The function as LLVM IR."""
        text = "".join(f"{line}\\0A" for line in self._assembly()).replace("$", "$$")
        clobbered = ",".join(f"~{{{name}}}" for name in ("rax", "r8", "r9", *(f"ymm{i}" for i in range(16))))
        constraints = f"={{rsi}},={{rdx}},={{rcx}},{{rdi}},{{r10}},0,1,2,{clobbered},~{{memory}},~{{flags}}"
        return (
            f"define i32 @{self.name}(ptr %sums, ptr %x, ptr %w, i64 %n, i64 %fresh) {{\n"
            f'  %r = call {{ ptr, ptr, i64 }} asm sideeffect "{text}", "{constraints}"'
            "(ptr %sums, i64 %fresh, ptr %x, ptr %w, i64 %n)\n  ret i32 0\n}\n"
        )

    def _assembly(self) -> Iterator[str]:
        """AT&T syntax. rdi: sums, rsi: x, rdx: weights, rcx: times of the outermost loop, r10: fresh."""
        sums = range(len(self.pixels) * len(self.vectors))
        for register in sums:
            yield f"vxorps %xmm{register}, %xmm{register}, %xmm{register}"
        yield "testq %r10, %r10"
        yield "jnz 5f"
        for register in sums:
            yield f"vmovups {register * LANES * 4}(%rdi), %ymm{register}"
        yield "5:"
        if self.form == "max":
            yield f"movl ${0x40000000}, %eax"  # 2.0
            yield "vmovd %eax, %xmm15"
            yield "vbroadcastss %xmm15, %ymm15"
        unroll = next(count for count in (4, 3, 5, 2, 1) if self.run % count == 0)
        counters = ("%r8d", "%r9d")
        inner = [(times, step) for times, step in self.loops if times > 1]
        yield "1:"
        for level, (times, _) in enumerate(inner):
            yield f"movl ${times}, {counters[level]}"
            yield f"{level + 2}:"
        yield f"movl ${self.run // unroll}, %eax"
        yield "4:"
        for tap in range(unroll):
            yield from self._tap(tap)
        yield f"addq ${unroll * 4}, %rsi"
        yield f"addq ${unroll * self.advance * 4}, %rdx"
        yield "decl %eax"
        yield "jnz 4b"
        passed = self.run
        for level, (times, step) in reversed(list(enumerate(inner))):
            yield f"addq ${(step - passed) * 4}, %rsi"
            yield f"decl {counters[level]}"
            yield f"jnz {level + 2}b"
            passed = times * step
        yield f"addq ${(self.outer - passed) * 4}, %rsi"
        yield "decq %rcx"
        yield "jnz 1b"
        for register in sums:
            yield f"vmovups %ymm{register}, {register * LANES * 4}(%rdi)"
        yield "vzeroupper"

    def _tap(self, tap: int) -> Iterator[str]:
        count = len(self.vectors)
        for v, offset in enumerate(self.vectors):
            yield f"vmovups {(offset + tap * self.advance) * 4}(%rdx), %ymm{12 + v}"
        for p, offset in enumerate(self.pixels):
            yield f"vbroadcastss {(offset + tap) * 4}(%rsi), %ymm14"
            if self.form == "conv":
                for v in range(count):
                    yield f"vfmadd231ps %ymm{12 + v}, %ymm14, %ymm{p * count + v}"
                continue
            # All maxima of a pixel before its sums: a fifth faster than in turns. The last one may overwrite the pixel.
            values = (11, 14)[-count:]
            for v, value in enumerate(values):
                yield f"vmaxps %ymm14, %ymm{12 + v}, %ymm{value}"
            for v, value in enumerate(values):
                yield f"vfmadd231ps %ymm{value}, %ymm15, %ymm{p * count + v}"
