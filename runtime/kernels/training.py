"""Generators of the training kernels: forward, gradient for the input, exact gradient for the weights.

All work on NHWC (torch's ``channels_last``), for any batch size, one parallel task a block of rows of one image. A task
copies the rows it reads into a padded scratch block ``[row][channel block][column][channel]`` that stays in the cache,
then computes tiles of ``pixels`` x ``lanes`` channels whose sums stay in registers.

Forward: ``|x-w| = 2*max(w,x) - x - w``. The sum over x is shared by all output channels and the sum over w is a
constant, which leaves one max and one multiply-add in the inner loop, the cost of a convolution. The operand order
``max(w, x)`` matters: LLVM folds the broadcast of x into the instruction only as the second operand. Where x and w are
large and close to each other the difference of those sums loses digits: a tile with a result below ``TRUSTED`` of what
its largest ``|x|`` allows, or not a number, is computed again as ``sum |x-w|``.

Gradients: ``g*clip(w-x, -1, 1)``, with w and x scaled by ``SHARPNESS`` where the sign is wanted.
"""

# No `from __future__ import annotations`: TVMScript evaluates the annotations of the kernels.
import functools
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from anncvt.runtime.kernels.spec import SHARPNESS, Axis, Spec, divisor, row_block, tile
from anncvt.runtime.kernels.target import Cpu

TRUSTED = 2.0**-7
"""``sum |x-w|`` in proportion to ``taps * max|x|`` down to which the fast form is kept: it loses at most these bits."""


def generate(spec: Spec, cpu: Cpu) -> Any:
    """The kernel of ``spec`` as a ``tirx.PrimFunc``."""
    make: dict[str, Callable[..., Any]] = {
        "forward": _forward,
        "dx_full": functools.partial(_input_gradient, scale=1.0),
        "dx_exact": functools.partial(_input_gradient, scale=SHARPNESS),
        "dw_exact": _weight_gradient,
    }
    return make[spec.kind](spec, cpu)


def _forward(spec: Spec, cpu: Cpu) -> Any:
    """``(X[n,H,W,G*C], W[G,O/L,C/cb,kh,kw,cb,L], S[G*O], Y[n,H',W',G*O])``; S is the sum of each filter's weights."""
    G, C, L, (KH, KW) = spec.groups, spec.channels, spec.lanes, spec.kernel
    (SH, SW), (DH, DW), (OH, OW) = spec.stride, spec.dilation, spec.output
    H, W, top, left = spec.height, spec.width, spec.padding.top, spec.padding.left
    OB, depthwise, fma = spec.outputs // L, spec.depthwise, cpu.fma
    cb = L if depthwise else divisor(C, 16)
    CB, reduced = C // cb, 1 if depthwise else cb
    V = 1 if depthwise else divisor(OB, cpu.vectors)
    PT = tile(OW, cpu.pixels)
    wide = -(-OW // PT)
    WP = (wide * PT - 1) * SW + (KW - 1) * DW + 1
    RB = row_block(OH, WP * G * C * 4 * SH)
    HT = min(RB, max(1, cpu.pixels // PT))
    RB = -(-RB // HT) * HT
    blocks = -(-OH // RB)
    ROWS = (RB - 1) * SH + (KH - 1) * DH + 1

    def update(total, x, w, attempt):
        exact = total + tirx.abs(x - w)
        fast = total + (tirx.max(w, x) * _splat(2.0, L) if fma else tirx.max(w, x))
        return exact if depthwise else T.if_then_else(attempt == 0, fast, exact)

    def operand(block, row, channel_block, column, c):
        if depthwise:
            return block[row, channel_block, column, T.ramp(0, 1, L)]
        return T.broadcast(block[row, channel_block, column, c], L)

    def result(total, x_sum, w_sum, attempt):
        exact = _splat(0.0, L) - total
        fast = (T.broadcast(x_sum, L) + w_sum) - (total if fma else total * _splat(2.0, L))
        return exact if depthwise else T.if_then_else(attempt == 0, fast, exact)

    @T.prim_func(s_tir=True)
    def main(x: T.handle, w: T.handle, s: T.handle, y: T.handle):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        n = T.int64()
        X = T.match_buffer(x, (n, H, W, G * C), "float32")
        Wp = T.match_buffer(w, (G, OB, CB, KH, KW, reduced, L), "float32")
        S = T.match_buffer(s, (G * OB * L,), "float32")
        Y = T.match_buffer(y, (n, OH, OW, G * OB * L), "float32")
        for task in T.parallel(n * blocks):
            xp = T.alloc_buffer((ROWS, G * CB, WP, cb), "float32")
            sums = T.alloc_buffer((G, ROWS, WP), "float32")
            across = T.alloc_buffer((G, ROWS, wide * PT), "float32")
            window = T.alloc_buffer((G, RB, wide * PT), "float32")
            for r in T.serial(ROWS):
                for b in T.serial(G * CB):
                    for j in T.serial(WP):
                        xp[r, b, j, _span(0, cb)] = _padded(
                            X, task // blocks, task % blocks * (RB * SH) + r - top, j - left, b * cb, cb, H, W
                        )
            largest = T.alloc_buffer((1,), "float32", scope="local")
            if not depthwise:
                peak = T.alloc_buffer((cb,), "float32", scope="local")
                peak[_span(0, cb)] = _splat(0.0, cb)
                for g, r, j in T.grid(G, ROWS, WP):
                    lane = T.alloc_buffer((cb,), "float32", scope="local")
                    lane[_span(0, cb)] = _splat(0.0, cb)
                    for b in T.serial(CB):
                        lane[_span(0, cb)] = lane[_span(0, cb)] + xp[r, g * CB + b, j, _span(0, cb)]
                        peak[_span(0, cb)] = tirx.max(peak[_span(0, cb)], tirx.abs(xp[r, g * CB + b, j, _span(0, cb)]))
                    sums[g, r, j] = _tree(lane, 0, cb)
                largest[0] = peak[0]
                for c in T.unroll(cb):
                    largest[0] = T.max(largest[0], peak[c])
                for g, r, jw in T.grid(G, ROWS, wide):
                    row = T.alloc_buffer((PT,), "float32", scope="local")
                    row[_span(0, PT)] = _splat(0.0, PT)
                    for kw in T.unroll(KW):
                        row[_span(0, PT)] = row[_span(0, PT)] + sums[g, r, _span(jw * (PT * SW) + kw * DW, PT, SW)]
                    across[g, r, _span(jw * PT, PT)] = row[_span(0, PT)]
                for g, i, jw in T.grid(G, RB, wide):
                    column = T.alloc_buffer((PT,), "float32", scope="local")
                    column[_span(0, PT)] = _splat(0.0, PT)
                    for kh in T.unroll(KH):
                        column[_span(0, PT)] = column[_span(0, PT)] + across[g, i * SH + kh * DH, _span(jw * PT, PT)]
                    window[g, i, _span(jw * PT, PT)] = column[_span(0, PT)]
            for g, ob, ih, jw in T.grid(G, OB // V, RB // HT, wide):
                acc = T.alloc_buffer((HT * PT * V * L,), "float32", scope="local")
                doubt = T.alloc_buffer((L,), "float32", scope="local")
                doubt[T.ramp(0, 1, L)] = _splat(0.0, L)
                for attempt in T.unroll(1 if depthwise else 2):
                    if attempt == 0 or _tree(doubt, 0, L) > T.float32(0):
                        for a in T.unroll(HT * PT * V):
                            acc[T.ramp(a * L, 1, L)] = _splat(0.0, L)
                        for b, kh, kw, c in T.grid(CB, KH, KW, reduced):
                            for i in T.unroll(HT):
                                for j in T.unroll(PT):
                                    for v in T.unroll(V):
                                        acc[T.ramp(((i * PT + j) * V + v) * L, 1, L)] = update(
                                            acc[T.ramp(((i * PT + j) * V + v) * L, 1, L)],
                                            operand(
                                                xp,
                                                (ih * HT + i) * SH + kh * DH,
                                                g * CB + b,
                                                (jw * PT + j) * SW + kw * DW,
                                                c,
                                            ),
                                            Wp[g, ob * V + v, b, kh, kw, c, T.ramp(0, 1, L)],
                                            attempt,
                                        )
                        for i in T.unroll(HT):
                            for j in T.unroll(PT):
                                for v in T.unroll(V):
                                    acc[T.ramp(((i * PT + j) * V + v) * L, 1, L)] = result(
                                        acc[T.ramp(((i * PT + j) * V + v) * L, 1, L)],
                                        window[g, ih * HT + i, jw * PT + j],
                                        S[T.ramp((g * OB + ob * V + v) * L, 1, L)],
                                        attempt,
                                    )
                                    if attempt == 0:
                                        # written so that a NaN, from an infinite x or w, is in doubt too
                                        doubt[T.ramp(0, 1, L)] = T.Select(
                                            acc[T.ramp(((i * PT + j) * V + v) * L, 1, L)]
                                            <= T.broadcast(T.float32(-TRUSTED * C * KH * KW) * largest[0], L),
                                            doubt[T.ramp(0, 1, L)],
                                            _splat(1.0, L),
                                        )
                                    if task % blocks * RB + ih * HT + i < OH and jw * PT + j < OW:
                                        Y[
                                            task // blocks,
                                            task % blocks * RB + ih * HT + i,
                                            jw * PT + j,
                                            T.ramp((g * OB + ob * V + v) * L, 1, L),
                                        ] = acc[T.ramp(((i * PT + j) * V + v) * L, 1, L)]

    return main


def _input_gradient(spec: Spec, cpu: Cpu, scale: float) -> Any:
    """``(X[n,H,W,G*C], D[n,H',W',G*O], W[G,C/L,O/ob,kh,kw,ob,L], one, Y[n,H,W,G*C])``; D is the output's gradient.

    ``sum g*clip(scale*(w-x), -1, 1)``; W comes scaled. ``one`` is 1: the compiler must not know it (see ``_clipped``).
    """
    G, C, L, (KH, KW) = spec.groups, spec.channels, spec.lanes, spec.kernel
    (OH, OW), outputs = spec.output, spec.outputs
    H, W, depthwise = spec.height, spec.width, spec.depthwise
    rows = Axis.of(H, KH, spec.stride[0], spec.padding.top, spec.dilation[0])
    cols = Axis.of(W, KW, spec.stride[1], spec.padding.left, spec.dilation[1])
    CB = C // L
    ob = L if depthwise else divisor(outputs, 16)
    OB, reduced = outputs // ob, 1 if depthwise else ob
    # A pixel keeps its sum and its value in registers.
    PT = tile(cols.blocks, max(2, cpu.pixels * 3 // 4))
    wide = -(-cols.blocks // PT)
    WP = wide * PT + cols.high - cols.low
    RB = row_block(rows.blocks, WP * G * outputs * 4)
    blocks = -(-rows.blocks // RB)
    ROWS = RB + rows.high - rows.low
    SH, SW = rows.stride, cols.stride

    def operand(block, row, channel_block, column, o):
        if depthwise:
            return block[row, channel_block, column, T.ramp(0, 1, L)]
        return T.broadcast(block[row, channel_block, column, o], L)

    @T.prim_func(s_tir=True)
    def main(x: T.handle, d: T.handle, w: T.handle, one: T.float32, y: T.handle):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        n = T.int64()
        X = T.match_buffer(x, (n, H, W, G * C), "float32")
        D = T.match_buffer(d, (n, OH, OW, G * outputs), "float32")
        Wp = T.match_buffer(w, (G, CB, OB, KH, KW, reduced, L), "float32")
        Y = T.match_buffer(y, (n, H, W, G * C), "float32")
        for task in T.parallel(n * blocks):
            gp = T.alloc_buffer((ROWS, G * OB, WP, ob), "float32")
            for r in T.serial(ROWS):
                for b in T.serial(G * OB):
                    for j in T.serial(WP):
                        gp[r, b, j, _span(0, ob)] = _padded(
                            D, task // blocks, task % blocks * RB + r + rows.low, j + cols.low, b * ob, ob, OH, OW
                        )
            for rh, rw, g, cb, i, jw in T.grid(SH, SW, G, CB, RB, wide):
                if (task % blocks * RB + i) * SH + rh < H and jw * (PT * SW) + rw < W:
                    acc = T.alloc_buffer((PT * L,), "float32", scope="local")
                    pixel = T.alloc_buffer((PT * L,), "float32", scope="local")
                    for j in T.unroll(PT):
                        acc[T.ramp(j * L, 1, L)] = _splat(0.0, L)
                        # Columns beyond the edge repeat the last one; they are not stored.
                        pixel[T.ramp(j * L, 1, L)] = X[
                            task // blocks,
                            (task % blocks * RB + i) * SH + rh,
                            T.min((jw * PT + j) * SW + rw, W - 1),
                            T.ramp((g * CB + cb) * L, 1, L),
                        ] * _splat(-scale, L)
                    for b in T.serial(OB):
                        for t in T.serial(_choose(rows.count, rh)):
                            for u in T.serial(_choose(cols.count, rw)):
                                for o in T.serial(reduced):
                                    for j in T.unroll(PT):
                                        acc[T.ramp(j * L, 1, L)] = acc[T.ramp(j * L, 1, L)] + _clipped(
                                            Wp[
                                                g,
                                                cb,
                                                b,
                                                _choose(rows.first, rh) + t * rows.step,
                                                _choose(cols.first, rw) + u * cols.step,
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
                                            i + _choose(rows.offset, rh) - t * rows.back - rows.low,
                                            g * OB + b,
                                            jw * PT + j + _choose(cols.offset, rw) - u * cols.back - cols.low,
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


def _weight_gradient(spec: Spec, cpu: Cpu) -> Any:
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
    CT = divisor(reduced, max(2, cpu.pixels * 3 // 4))
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
                            xp[r, b, j, _span(0, cb)] = _padded(
                                X,
                                (part * n * blocks // parts + item) // blocks,
                                (part * n * blocks // parts + item) % blocks * (RB * SH) + r - top,
                                j - left,
                                b * cb,
                                cb,
                                H,
                                W,
                            ) * _splat(SHARPNESS, cb)
                for g, ob, b, kh, kw, ct in T.grid(G, OB, CB, KH, KW, reduced // CT):
                    acc = T.alloc_buffer((CT * L,), "float32", scope="local")
                    taps = T.alloc_buffer((CT * L,), "float32", scope="local")
                    for c in T.unroll(CT):
                        acc[T.ramp(c * L, 1, L)] = _splat(0.0, L)
                        taps[T.ramp(c * L, 1, L)] = _splat(0.0, L) - Wp[g, ob, b, kh, kw, ct * CT + c, T.ramp(0, 1, L)]
                    for i in T.serial(T.min(T.int64(RB), OH - (part * n * blocks // parts + item) % blocks * RB)):
                        for j in T.serial(OW):
                            for c in T.unroll(CT):
                                acc[T.ramp(c * L, 1, L)] = (
                                    acc[T.ramp(c * L, 1, L)]
                                    + _clipped(
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


def _clipped(a: Any, b: Any, index: Any, one: Any, lanes: int, cpu: Cpu) -> Any:
    """``clip(a + b, -1, 1)`` of vectors, spread over both kinds of execution unit.

    AVX-512's range instruction clips at once. It and the addition use the adders while the multiply-adders idle, so
    every second sum is ``a*one + b``: with a literal 1 the compiler would turn it back into an addition. 39 instead of
    29 Gop/s a core on Zen 4.
    """
    total = a + b
    if not (cpu.clip and lanes == 16):
        return tirx.min(tirx.max(total, _splat(-1.0, lanes)), _splat(1.0, lanes))
    fused = T.call_llvm_pure_intrin(
        T.llvm_lookup_intrinsic_id("llvm.fma.v16f32"), a, T.broadcast(one, lanes), b, dtype="float32x16"
    )
    total = T.if_then_else(index % 2 == 0, total, fused)
    smaller_magnitude, all_lanes, current_rounding = T.int32(2), T.int16(-1), T.int32(4)
    return T.call_llvm_pure_intrin(
        T.llvm_lookup_intrinsic_id("llvm.x86.avx512.mask.range.ps.512"),
        total,
        _splat(1.0, lanes),
        smaller_magnitude,
        total,
        all_lanes,
        current_rounding,
        dtype="float32x16",
    )


def _span(start: Any, lanes: int, stride: int = 1) -> Any:
    return T.ramp(start, stride, lanes) if lanes > 1 else start


def _splat(value: float, lanes: int) -> Any:
    return T.broadcast(T.float32(value), lanes) if lanes > 1 else T.float32(value)


def _padded(X: Any, n: Any, row: Any, column: Any, channel: Any, lanes: int, height: int, width: int) -> Any:
    """``lanes`` channels of a pixel, zero outside the image."""
    inside = tirx.all(row >= 0, row < height, column >= 0, column < width)
    return T.if_then_else(inside, X[n, row, column, _span(channel, lanes)], _splat(0.0, lanes))


def _tree(lane: Any, start: int, count: int) -> Any:
    """The sum of ``count`` scalars of a local vector, pairwise."""
    if count == 1:
        return lane[start]
    half = count // 2
    return _tree(lane, start, half) + _tree(lane, start + half, count - half)


def _choose(table: tuple[int, ...], index: Any) -> Any:
    """``table[index]`` for an index known at run time."""
    value: Any = T.int32(table[-1])
    for i, entry in reversed(list(enumerate(table[:-1]))):
        if entry != table[-1] or any(e != table[-1] for e in table[i:]):
            value = T.Select(index == i, T.int32(entry), value)
    return value
