"""Training kernels of depthwise layers: a vector of channels meets only its own weights, and is read where it lies.

All work on NHWC, one parallel task a block of rows of one image. A tile of pixels side by side stays in registers.
Which of its columns lie beyond the image is known when the kernel is made, so that at run time only rows are asked for.
There are no copies: such a layer has so little to compute that moving its data is what takes the time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from anncvt.runtime.kernels.flat import f32, function, prefetch, ramp, spread
from anncvt.runtime.kernels.gradients import clipped
from anncvt.runtime.kernels.spec import Axis, Spec, row_block, tile
from anncvt.runtime.kernels.target import Cpu

#: Pixels of a tile: with more, sums of the gradient leave the registers.
MOST_PIXELS = 7


def forward(spec: Spec, cpu: Cpu) -> tirx.PrimFunc:
    """``(X[n,H,W,C], W[C/L,kh,kw,L], one, Y[n,H',W',C])``: ``-sum |x-w|``.

    ``one`` is 1. The compiler must not know it: it would turn the multiply-adds into additions, which the adders have
    no time for besides the subtractions.
    """
    return _Forward(spec, cpu).function()


def input_gradient(spec: Spec, cpu: Cpu, scale: float) -> tirx.PrimFunc:
    """``(X[n,H,W,C], D[n,H',W',C], W[C/L,kh,kw,L], one, Y[n,H,W,C])``: ``sum g*clip(scale*(w-x), -1, 1)``.

    W comes scaled; ``one``: see :func:`anncvt.runtime.kernels.gradients.clipped`.
    """
    return _InputGradient(spec, cpu, scale).function()


class _Taps(NamedTuple):
    """What meets along one axis: position ``p < positions`` and kernel position ``first + t*step``, ``t < taps``.

    They meet at source position ``stride*p + offset + t*move``, where that is within ``limit``. The result is that of
    position ``spread*p + rest``.
    """

    positions: int
    stride: int
    taps: int
    first: int
    step: int
    offset: int
    move: int
    limit: int
    spread: int = 1
    rest: int = 0

    def kernel(self, t: Any) -> Any:
        return self.first + t * self.step

    def source(self, position: Any, t: Any) -> Any:
        return position * self.stride + (self.offset + t * self.move)

    def last(self, position: Any) -> Any:
        """The highest source position."""
        return self.source(position, self.taps - 1 if self.move > 0 else 0)

    def target(self, position: Any) -> Any:
        return position * self.spread + self.rest

    def inside(self, position: int, t: int) -> bool:
        return 0 <= self.source(position, t) < self.limit

    def whole(self, start: int, count: int) -> bool:
        """Whether all taps of ``count`` positions lie within the source."""
        ends = itertools.product((start, start + count - 1), (0, self.taps - 1))
        return self.taps == 0 or all(self.inside(position, t) for position, t in ends)


class _Kernel:
    """The loops of both kernels, over a ``source`` that meets the weights; all buffers are addressed flat.

    Args:
        spec, cpu: of the kernel.
        rows, columns: how source and result meet; the results of all pairs are the whole.
        size: height and width of the result.
    """

    one: Any
    at_hand: Any = None  # what :meth:`begin` reads

    def __init__(
        self, spec: Spec, cpu: Cpu, rows: tuple[_Taps, ...], columns: tuple[_Taps, ...], size: tuple[int, int]
    ) -> None:
        self.spec, self.cpu, self.rows, self.columns, self.size = spec, cpu, rows, columns, size
        self.lanes, self.channels = spec.lanes, spec.groups * spec.lanes
        self.batch = tirx.Var("n", "int64")  # and so are all places: there are tensors of more than 2^31 elements
        self.inputs = (self.batch, spec.height, spec.width, self.channels)
        self.outputs = (self.batch, *spec.output, self.channels)
        self.weights = (spec.groups, *spec.kernel, self.lanes)

    def loops(self, source: Any, weight: Any, y: Any) -> None:
        """Emit everything."""
        self.source, self.weight, self.y = source, weight, y
        positions = max(taps.positions for taps in self.rows)
        block = row_block(positions, self.columns[0].limit * self.channels * 4 * self.rows[0].stride)
        blocks = -(-positions // block)
        with T.parallel(self.batch * blocks) as task, T.serial(block) as i:
            image, position = task // blocks, task % blocks * block + i
            for rows, columns in itertools.product(self.rows, self.columns):
                with T.If(position < rows.positions), T.Then():
                    self._row(image, rows, columns, position)

    def _row(self, image: Any, rows: _Taps, columns: _Taps, row: Any) -> None:
        pixels = tile(columns.positions, min(self.cpu.clipped, MOST_PIXELS))
        tiles = [(start, min(pixels, columns.positions - start)) for start in range(0, columns.positions, pixels)]
        inner = [start for start, count in tiles if count == pixels and columns.whole(start, count)]
        for start, count in tiles:
            if start not in inner:
                self._tile(image, rows, columns, row, start, count)
        if inner:  # these follow each other
            with T.serial(len(inner)) as step:
                self._tile(image, rows, columns, row, inner[0] + step * pixels, pixels)

    def _tile(self, image: Any, rows: _Taps, columns: _Taps, row: Any, start: Any, count: int) -> None:
        """``start`` is a number where columns lie beyond the source."""
        lanes, own = self.lanes, [ramp(j * self.lanes, self.lanes) for j in range(count)]
        line = (image * self.size[0] + rows.target(row)) * self.size[1]
        below = (image * rows.limit + rows.last(row) + rows.stride) * columns.limit + columns.source(start, 0)
        following = line + columns.target(start + count)
        with T.serial(self.spec.groups) as group:
            places = [(line + columns.target(start + j)) * self.channels + group * lanes for j in range(count)]
            totals, kept = (T.alloc_buffer((count * lanes,), "float32", scope="local") for _ in range(2))
            for j, (at, place) in enumerate(zip(own, places, strict=True)):
                T.buffer_store(totals, spread(f32(0), lanes), [at])
                self.begin(kept, at, ramp(place, lanes))
                self._ask(below, following, columns, group * count + j, j * columns.spread * self.spec.groups + group)
            with T.serial(rows.taps) as t:
                source_row = rows.source(row, t)
                base = (image * rows.limit + source_row) * columns.limit
                weights = [self._weights(group, rows.kernel(t), columns.kernel(u)) for u in range(columns.taps)]
                with T.If(tirx.all(source_row >= 0, source_row < rows.limit)):
                    with T.Then():
                        for (u, weight), (j, at) in itertools.product(enumerate(weights), enumerate(own)):
                            if isinstance(start, int) and not columns.inside(start + j, u):
                                T.buffer_store(totals, self.beyond(totals[at], weight), [at])
                                continue
                            pixel = (base + columns.source(start + j, u)) * self.channels + group * lanes
                            value = self.source[ramp(pixel, lanes)]
                            T.buffer_store(totals, self.tap(totals[at], kept[at], j, value, weight), [at])
                    with T.Else():
                        for weight, at in itertools.product(weights, own):
                            T.buffer_store(totals, self.beyond(totals[at], weight), [at])
            for at, place in zip(own, places, strict=True):
                T.buffer_store(self.y, self.end(totals[at]), [ramp(place, lanes)])

    def _ask(self, below: Any, following: Any, columns: _Taps, number: Any, own: Any) -> None:
        """Ask for what comes from far: the source's pixels that the next row adds, and the next tile's results.

        That is faster by a quarter in the order of memory, where all vectors are wanted.

        Args:
            below, following: the first pixel of each.
            columns: of the tile.
            number: of a vector of results in this tile, in the order of memory.
            own: how many vectors it is behind the tile's first.
        """
        for step in range(columns.stride):
            prefetch(self.source, below * self.channels + (number * columns.stride + step) * self.lanes)
        place = following * self.channels + (number if columns.spread == 1 else own) * self.lanes
        prefetch(self.y, place, write=True)
        if self.at_hand is not None:
            prefetch(self.at_hand, place)

    def _weights(self, group: Any, row: Any, column: int) -> Any:
        (tall, wide), lanes = self.spec.kernel, self.lanes
        return self.weight[ramp(((group * tall + row) * wide + column) * lanes, lanes)]

    def begin(self, kept: Any, at: Any, place: Any) -> None:
        """Store what a result at ``place`` wants to have at hand."""

    def tap(self, total: Any, kept: Any, number: int, value: Any, weight: Any) -> Any:
        """The total of result ``number`` of a tile with one more tap."""
        raise NotImplementedError

    def beyond(self, total: Any, weight: Any) -> Any:
        """The same where the tap lies beyond the source."""
        return total

    def end(self, total: Any) -> Any:
        """The result."""
        return total


class _Forward(_Kernel):
    def __init__(self, spec: Spec, cpu: Cpu) -> None:
        sizes, before = (spec.height, spec.width), (spec.padding.top, spec.padding.left)
        rows, columns = (
            _Taps(out, stride, kernel, 0, 1, -start, dilation, size)
            for out, stride, kernel, start, dilation, size in zip(
                spec.output, spec.stride, spec.kernel, before, spec.dilation, sizes, strict=True
            )
        )
        super().__init__(spec, cpu, (rows,), (columns,), spec.output)

    def function(self) -> tirx.PrimFunc:
        return function({"x": self.inputs, "w": self.weights, "one": None, "y": self.outputs}, self._body)

    def _body(self, x: Any, w: Any, one: Any, y: Any) -> None:
        self.one = one
        self.loops(x, w, y)

    def tap(self, total: Any, kept: Any, number: int, value: Any, weight: Any) -> Any:
        return self._added(total, tirx.abs(value - weight))

    def beyond(self, total: Any, weight: Any) -> Any:
        return self._added(total, tirx.abs(weight))

    def end(self, total: Any) -> Any:
        return spread(f32(0), self.lanes) - total

    def _added(self, total: Any, distance: Any) -> Any:
        return total + (distance * spread(self.one, self.lanes) if self.cpu.fma else distance)


class _InputGradient(_Kernel):
    def __init__(self, spec: Spec, cpu: Cpu, scale: float) -> None:
        self.scale = scale
        sizes, before = (spec.height, spec.width), (spec.padding.top, spec.padding.left)
        rows, columns = (
            tuple(_by_remainder(Axis.of(size, kernel, stride, start, dilation), size, out))
            for size, kernel, stride, start, dilation, out in zip(
                sizes, spec.kernel, spec.stride, before, spec.dilation, spec.output, strict=True
            )
        )
        super().__init__(spec, cpu, rows, columns, sizes)

    def function(self) -> tirx.PrimFunc:
        shapes = {"x": self.inputs, "d": self.outputs, "w": self.weights, "one": None, "y": self.inputs}
        return function(shapes, self._body)

    def _body(self, x: Any, d: Any, w: Any, one: Any, y: Any) -> None:
        self.at_hand, self.one = x, one
        self.loops(d, w, y)

    def begin(self, kept: Any, at: Any, place: Any) -> None:
        T.buffer_store(kept, self.at_hand[place] * spread(f32(-self.scale), self.lanes), [at])

    def tap(self, total: Any, kept: Any, number: int, value: Any, weight: Any) -> Any:
        return total + clipped(weight, kept, number, self.one, self.lanes, self.cpu) * value


def _by_remainder(axis: Axis, size: int, outputs: int) -> Iterator[_Taps]:
    """Of the input positions with each remainder modulo the stride."""
    for rest in range(min(axis.stride, size)):
        yield _Taps(
            positions=-(-(size - rest) // axis.stride),
            stride=1,
            taps=axis.count[rest],
            first=axis.first[rest],
            step=axis.step,
            offset=axis.offset[rest],
            move=-axis.back,
            limit=outputs,
            spread=axis.stride,
            rest=rest,
        )
