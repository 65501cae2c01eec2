"""Generators of the gradient kernels: ``g*clip(w-x, -1, 1)`` for the input, ``g*sign(x-w)`` for the weights.

Layout and blocking are those of :mod:`anncvt.runtime.kernels.training`. The sign is the clip of a difference scaled by
``SHARPNESS``.
"""

# No `from __future__ import annotations`: TVMScript evaluates the annotations of the kernels.
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from anncvt.runtime.kernels.spec import SHARPNESS, Axis, Spec, divisor, row_block, tile
from anncvt.runtime.kernels.target import Cpu
from anncvt.runtime.kernels.tir import choose, padded, span, splat


def input_gradient(spec: Spec, cpu: Cpu, scale: float) -> Any:
    """``(X[n,H,W,G*C], D[n,H',W',G*O], W[G,C/L,O/ob,kh,kw,ob,L], one, Y[n,H,W,G*C])``; D is the output's gradient.

    ``sum g*clip(scale*(w-x), -1, 1)``; W comes scaled. ``one`` is 1: the compiler must not know it (:func:`clipped`).
    """
    G, C, L, (KH, KW) = spec.groups, spec.channels, spec.lanes, spec.kernel
    (OH, OW), outputs = spec.output, spec.outputs
    H, W = spec.height, spec.width
    rows = Axis.of(H, KH, spec.stride[0], spec.padding.top, spec.dilation[0])
    cols = Axis.of(W, KW, spec.stride[1], spec.padding.left, spec.dilation[1])
    CB = C // L
    ob = divisor(outputs, 16)
    OB = outputs // ob
    # A pixel keeps its sum and its value in registers.
    PT = tile(cols.blocks, cpu.clipped)
    wide = -(-cols.blocks // PT)
    WP = wide * PT + cols.high - cols.low
    RB = row_block(rows.blocks, WP * G * outputs * 4)
    blocks = -(-rows.blocks // RB)
    ROWS = RB + rows.high - rows.low
    SH, SW = rows.stride, cols.stride

    def operand(block, row, channel_block, column, o):
        return T.broadcast(block[row, channel_block, column, o], L)

    @T.prim_func(s_tir=True)
    def main(x: T.handle, d: T.handle, w: T.handle, one: T.float32, y: T.handle):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        n = T.int64()
        X = T.match_buffer(x, (n, H, W, G * C), "float32")
        D = T.match_buffer(d, (n, OH, OW, G * outputs), "float32")
        Wp = T.match_buffer(w, (G, CB, OB, KH, KW, ob, L), "float32")
        Y = T.match_buffer(y, (n, H, W, G * C), "float32")
        for task in T.parallel(n * blocks):
            gp = T.alloc_buffer((ROWS, G * OB, WP, ob), "float32")
            for r in T.serial(ROWS):
                for b in T.serial(G * OB):
                    for j in T.serial(WP):
                        gp[r, b, j, span(0, ob)] = padded(
                            D, task // blocks, task % blocks * RB + r + rows.low, j + cols.low, b * ob, ob, OH, OW
                        )
            for rh, rw, g, cb, i, jw in T.grid(SH, SW, G, CB, RB, wide):
                if (task % blocks * RB + i) * SH + rh < H and jw * (PT * SW) + rw < W:
                    acc = T.alloc_buffer((PT * L,), "float32", scope="local")
                    pixel = T.alloc_buffer((PT * L,), "float32", scope="local")
                    for j in T.unroll(PT):
                        acc[T.ramp(j * L, 1, L)] = splat(0.0, L)
                        # Columns beyond the edge repeat the last one; they are not stored.
                        pixel[T.ramp(j * L, 1, L)] = X[
                            task // blocks,
                            (task % blocks * RB + i) * SH + rh,
                            T.min((jw * PT + j) * SW + rw, W - 1),
                            T.ramp((g * CB + cb) * L, 1, L),
                        ] * splat(-scale, L)
                    for b in T.serial(OB):
                        for t in T.serial(choose(rows.count, rh)):
                            for u in T.serial(choose(cols.count, rw)):
                                for o in T.serial(ob):
                                    for j in T.unroll(PT):
                                        acc[T.ramp(j * L, 1, L)] = acc[T.ramp(j * L, 1, L)] + clipped(
                                            Wp[
                                                g,
                                                cb,
                                                b,
                                                choose(rows.first, rh) + t * rows.step,
                                                choose(cols.first, rw) + u * cols.step,
                                                o,
                                                T.ramp(0, 1, L),
                                            ],
                                            pixel[T.ramp(j * L, 1, L)],
                                            j,
                                            one,
                                            L,
                                            cpu,
                                        ) * operand(
                                            gp,
                                            i + choose(rows.offset, rh) - t * rows.back - rows.low,
                                            g * OB + b,
                                            jw * PT + j + choose(cols.offset, rw) - u * cols.back - cols.low,
                                            o,
                                        )
                    for j in T.unroll(PT):
                        if (jw * PT + j) * SW + rw < W:
                            Y[
                                task // blocks,
                                (task % blocks * RB + i) * SH + rh,
                                (jw * PT + j) * SW + rw,
                                T.ramp((g * CB + cb) * L, 1, L),
                            ] = acc[T.ramp(j * L, 1, L)]

    return main


def weight_gradient(spec: Spec, cpu: Cpu) -> Any:
    """``(X[n,H,W,G*C], D[n,H',W',G*O], W[G,O/L,C/cb,kh,kw,cb,L], one, P[parts, like W])``: ``sum g*sign(x-w)``.

    W comes scaled, ``one`` is 1 as in the input gradient. Each of ``parts`` parallel tasks adds its share of the batch
    to its own P; the caller clears and sums them.
    """
    G, C, L, (KH, KW) = spec.groups, spec.channels, spec.lanes, spec.kernel
    (SH, SW), (DH, DW), (OH, OW) = spec.stride, spec.dilation, spec.output
    H, W, top, left = spec.height, spec.width, spec.padding.top, spec.padding.left
    OB, depthwise = spec.outputs // L, spec.depthwise
    cb = L if depthwise else divisor(C, 16)
    CB, reduced = C // cb, 1 if depthwise else cb
    # Weights and sums of a tile's input channels stay in registers.
    CT = divisor(reduced, cpu.clipped)
    WP = (OW - 1) * SW + (KW - 1) * DW + 1
    RB = row_block(OH, WP * G * C * 4 * SH)
    blocks = -(-OH // RB)
    ROWS = (RB - 1) * SH + (KH - 1) * DH + 1

    def operand(block, row, channel_block, column, c):
        if depthwise:
            return block[row, channel_block, column, T.ramp(0, 1, L)]
        return T.broadcast(block[row, channel_block, column, c], L)

    @T.prim_func(s_tir=True)
    def main(x: T.handle, d: T.handle, w: T.handle, one: T.float32, p: T.handle):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        n = T.int64()
        parts = T.int64()
        X = T.match_buffer(x, (n, H, W, G * C), "float32")
        D = T.match_buffer(d, (n, OH, OW, G * OB * L), "float32")
        Wp = T.match_buffer(w, (G, OB, CB, KH, KW, reduced, L), "float32")
        P = T.match_buffer(p, (parts, G, OB, CB, KH, KW, reduced, L), "float32")
        for part in T.parallel(parts):
            xp = T.alloc_buffer((ROWS, G * CB, WP, cb), "float32")
            for item in T.serial((part + 1) * n * blocks // parts - part * n * blocks // parts):
                for r in T.serial(ROWS):
                    for b in T.serial(G * CB):
                        for j in T.serial(WP):
                            xp[r, b, j, span(0, cb)] = padded(
                                X,
                                (part * n * blocks // parts + item) // blocks,
                                (part * n * blocks // parts + item) % blocks * (RB * SH) + r - top,
                                j - left,
                                b * cb,
                                cb,
                                H,
                                W,
                            ) * splat(SHARPNESS, cb)
                for g, ob, b, kh, kw, ct in T.grid(G, OB, CB, KH, KW, reduced // CT):
                    acc = T.alloc_buffer((CT * L,), "float32", scope="local")
                    taps = T.alloc_buffer((CT * L,), "float32", scope="local")
                    for c in T.unroll(CT):
                        acc[T.ramp(c * L, 1, L)] = splat(0.0, L)
                        taps[T.ramp(c * L, 1, L)] = splat(0.0, L) - Wp[g, ob, b, kh, kw, ct * CT + c, T.ramp(0, 1, L)]
                    for i in T.serial(T.min(T.int64(RB), OH - (part * n * blocks // parts + item) % blocks * RB)):
                        # a number the compiler does not know: it would unroll the loop, and run out of registers
                        for j in T.serial(T.Cast("int32", one) * OW):
                            for c in T.unroll(CT):
                                acc[T.ramp(c * L, 1, L)] = (
                                    acc[T.ramp(c * L, 1, L)]
                                    + clipped(
                                        operand(xp, i * SH + kh * DH, g * CB + b, j * SW + kw * DW, ct * CT + c),
                                        taps[T.ramp(c * L, 1, L)],
                                        c,
                                        one,
                                        L,
                                        cpu,
                                    )
                                    * D[
                                        (part * n * blocks // parts + item) // blocks,
                                        (part * n * blocks // parts + item) % blocks * RB + i,
                                        j,
                                        T.ramp((g * OB + ob) * L, 1, L),
                                    ]
                                )
                    for c in T.unroll(CT):
                        P[part, g, ob, b, kh, kw, ct * CT + c, T.ramp(0, 1, L)] = (
                            P[part, g, ob, b, kh, kw, ct * CT + c, T.ramp(0, 1, L)] + acc[T.ramp(c * L, 1, L)]
                        )

    return main


def clipped(a: Any, b: Any, index: Any, one: Any, lanes: int, cpu: Cpu) -> Any:
    """``clip(a + b, -1, 1)`` of vectors, spread over both kinds of execution unit.

    Clipping occupies the adders (AVX-512's range instruction as well as a maximum and a minimum) while the
    multiply-adders idle, so the sum is ``a*one + b`` there: with a literal 1 the compiler would turn it back into an
    addition. On Zen 4 39 instead of 29 Gop/s a core.
    """
    total = a + b
    if not cpu.fma or lanes not in (8, 16):
        return tirx.min(tirx.max(total, splat(-1.0, lanes)), splat(1.0, lanes))
    fused = T.call_llvm_pure_intrin(
        T.llvm_lookup_intrinsic_id(f"llvm.fma.v{lanes}f32"), a, T.broadcast(one, lanes), b, dtype=f"float32x{lanes}"
    )
    if not (cpu.clip and lanes == 16):
        return tirx.min(tirx.max(fused, T.broadcast(T.float32(0) - one, lanes)), T.broadcast(one, lanes))
    # One range instruction is half of a maximum and a minimum: every second sum goes to the adders.
    total = T.if_then_else(index % 2 == 0, total, fused)
    smaller_magnitude, all_lanes, current_rounding = T.int32(2), T.int16(-1), T.int32(4)
    return T.call_llvm_pure_intrin(
        T.llvm_lookup_intrinsic_id("llvm.x86.avx512.mask.range.ps.512"),
        total,
        splat(1.0, lanes),
        smaller_magnitude,
        total,
        all_lanes,
        current_rounding,
        dtype="float32x16",
    )
