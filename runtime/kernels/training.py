"""Generators of the training kernels: the forward one, and the choice among all of them.

All work on NHWC (torch's ``channels_last``), for any batch size, one parallel task a block of rows of one image. But
for those of depthwise layers (:mod:`anncvt.runtime.kernels.depthwise`), a task copies the rows it reads into a padded
scratch block ``[row][channel block][column][channel]`` that stays in the cache, then computes tiles of ``pixels`` x
``lanes`` channels whose sums stay in registers.

Forward: ``|x-w| = 2*max(w,x) - x - w``. The sum over x is shared by all output channels and the sum over w is a
constant, which leaves one max and one multiply-add in the inner loop, the cost of a convolution. The operand order
``max(w, x)`` matters: LLVM folds the broadcast of x into the instruction only as the second operand. Where x and w are
large and close to each other the difference of those sums loses digits: a tile with a result below ``TRUSTED`` of what
its largest ``|x|`` allows, or not a number, is computed again as ``sum |x-w|``.
"""

# No `from __future__ import annotations`: TVMScript evaluates the annotations of the kernels.
import functools
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from anncvt.runtime.kernels import depthwise
from anncvt.runtime.kernels.gradients import input_gradient, weight_gradient
from anncvt.runtime.kernels.microkernel import LANES, Microkernel
from anncvt.runtime.kernels.spec import SHARPNESS, Spec, divisor, row_block, tile
from anncvt.runtime.kernels.target import Cpu
from anncvt.runtime.kernels.tir import padded, span, splat, tree

TRUSTED = 2.0**-7
"""``sum |x-w|`` in proportion to ``taps * max|x|`` down to which the fast form is kept: it loses at most these bits."""


def generate(spec: Spec, cpu: Cpu) -> Any:
    """The kernel of ``spec`` as a ``tirx.PrimFunc``."""
    forward, dx = (_forward, input_gradient)
    if spec.depthwise:
        forward, dx = depthwise.forward, depthwise.input_gradient
    make: dict[str, Callable[..., Any]] = {
        "forward": forward,
        "dx_full": functools.partial(dx, scale=1.0),
        "dx_exact": functools.partial(dx, scale=SHARPNESS),
        "dw_exact": weight_gradient,
    }
    return make[spec.kind](spec, cpu).with_attr("global_symbol", "main")


def _forward(spec: Spec, cpu: Cpu) -> Any:
    """``(X[n,H,W,G*C], W[G,O/L,C/cb,kh,kw,cb,L], S[G*O], two, Y[n,H',W',G*O])``; S is the sum of each filter's weights.

    ``two`` is 2: a constant that the compiler knows is loaded from memory for each use where registers are scarce.
    """
    G, C, L, (KH, KW) = spec.groups, spec.channels, spec.lanes, spec.kernel
    (SH, SW), (DH, DW), (OH, OW) = spec.stride, spec.dilation, spec.output
    H, W, top, left = spec.height, spec.width, spec.padding.top, spec.padding.left
    OB, fma = spec.outputs // L, cpu.fma
    cb = divisor(C, 16)
    CB = C // cb
    V = divisor(OB, cpu.vectors)
    PT = tile(OW, cpu.pixels)
    wide = -(-OW // PT)
    WP = (wide * PT - 1) * SW + (KW - 1) * DW + 1
    RB = row_block(OH, WP * G * C * 4 * SH)
    HT = min(RB, max(1, cpu.pixels // PT))
    RB = -(-RB // HT) * HT
    blocks = -(-OH // RB)
    ROWS = (RB - 1) * SH + (KH - 1) * DH + 1

    micro = _microkernel(spec, (HT, PT), V, WP) if cpu.assembly and L == LANES else None
    micro_node, micro_key, micro_code = micro.attribute if micro else (None, None, None)

    def update(total, x, w, attempt, two):
        exact = total + tirx.abs(x - w)
        fast = total + (tirx.max(w, x) * T.broadcast(two, L) if fma else tirx.max(w, x))
        return T.if_then_else(attempt == 0, fast, exact)

    def operand(block, row, channel_block, column, c):
        return T.broadcast(block[row, channel_block, column, c], L)

    def result(total, x_sum, w_sum, attempt):
        exact = splat(0.0, L) - total
        fast = (T.broadcast(x_sum, L) + w_sum) - (total if fma else total * splat(2.0, L))
        return T.if_then_else(attempt == 0, fast, exact)

    @T.prim_func(s_tir=True)
    def main(x: T.handle, w: T.handle, s: T.handle, two: T.float32, y: T.handle):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        n = T.int64()
        X = T.match_buffer(x, (n, H, W, G * C), "float32")
        Wp = T.match_buffer(w, (G, OB, CB, KH, KW, cb, L), "float32")
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
                        xp[r, b, j, span(0, cb)] = padded(
                            X, task // blocks, task % blocks * (RB * SH) + r - top, j - left, b * cb, cb, H, W
                        )
            largest = T.alloc_buffer((1,), "float32", scope="local")
            peak = T.alloc_buffer((cb,), "float32", scope="local")
            peak[span(0, cb)] = splat(0.0, cb)
            for g, r, j in T.grid(G, ROWS, WP):
                lane = T.alloc_buffer((cb,), "float32", scope="local")
                lane[span(0, cb)] = splat(0.0, cb)
                for b in T.serial(CB):
                    lane[span(0, cb)] = lane[span(0, cb)] + xp[r, g * CB + b, j, span(0, cb)]
                    peak[span(0, cb)] = tirx.max(peak[span(0, cb)], tirx.abs(xp[r, g * CB + b, j, span(0, cb)]))
                sums[g, r, j] = tree(lane, 0, cb)
            largest[0] = peak[0]
            for c in T.unroll(cb):
                largest[0] = T.max(largest[0], peak[c])
            for g, r, jw in T.grid(G, ROWS, wide):
                row = T.alloc_buffer((PT,), "float32", scope="local")
                row[span(0, PT)] = splat(0.0, PT)
                for kw in T.unroll(KW):
                    row[span(0, PT)] = row[span(0, PT)] + sums[g, r, span(jw * (PT * SW) + kw * DW, PT, SW)]
                across[g, r, span(jw * PT, PT)] = row[span(0, PT)]
            for g, i, jw in T.grid(G, RB, wide):
                column = T.alloc_buffer((PT,), "float32", scope="local")
                column[span(0, PT)] = splat(0.0, PT)
                for kh in T.unroll(KH):
                    column[span(0, PT)] = column[span(0, PT)] + across[g, i * SH + kh * DH, span(jw * PT, PT)]
                window[g, i, span(jw * PT, PT)] = column[span(0, PT)]
            for g, ob, ih, jw in T.grid(G, OB // V, RB // HT, wide):
                acc = T.alloc_buffer((HT * PT * V * L,), "float32", scope="local")
                doubt = T.alloc_buffer((L,), "float32", scope="local")
                doubt[T.ramp(0, 1, L)] = splat(0.0, L)
                for attempt in T.unroll(2):
                    if attempt == 0 or tree(doubt, 0, L) > T.float32(0):
                        # nested: the parser reads what an `and` guards even where there is no microkernel
                        if micro is not None:  # noqa: SIM102
                            if attempt == 0:
                                with T.attr(micro_node, micro_key, micro_code):
                                    T.evaluate(
                                        micro.expression(
                                            T.address_of(acc[0]),
                                            T.address_of(xp[ih * (HT * SH), g * CB, jw * (PT * SW), 0]),
                                            T.address_of(Wp[g, ob * V, 0, 0, 0, 0, 0]),
                                            CB,
                                            1,
                                        )
                                    )
                        if micro is None or attempt == 1:
                            for a in T.unroll(HT * PT * V):
                                acc[T.ramp(a * L, 1, L)] = splat(0.0, L)
                            for b, kh, kw, c in T.grid(CB, KH, KW, cb):
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
                                                two,
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
                                            splat(1.0, L),
                                        )
                                    if task % blocks * RB + ih * HT + i < OH and jw * PT + j < OW:
                                        Y[
                                            task // blocks,
                                            task % blocks * RB + ih * HT + i,
                                            jw * PT + j,
                                            T.ramp((g * OB + ob * V + v) * L, 1, L),
                                        ] = acc[T.ramp(((i * PT + j) * V + v) * L, 1, L)]

    return main


def _microkernel(spec: Spec, tile_size: tuple[int, int], vectors: int, row: int) -> Microkernel:
    """The taps of a tile: x in scratch blocks ``[row][channel block][column][channel]`` of ``row`` columns."""
    (kh, kw), (stride_h, stride_w), (step_h, step_w) = spec.kernel, spec.stride, spec.dilation
    cells = divisor(spec.channels, 16)
    line = row * spec.groups * spec.channels
    rows, connected = (kh, step_h * line), step_w == 1  # connected: the columns of a window are neighbours
    return Microkernel(
        "max",
        tuple(i * stride_h * line + j * stride_w * cells for i in range(tile_size[0]) for j in range(tile_size[1])),
        tuple(v * spec.channels * kh * kw * spec.lanes for v in range(vectors)),
        spec.lanes,
        cells * kw if connected else cells,
        (rows,) if connected else (rows, (kw, step_w * cells)),
        row * cells,
    )
