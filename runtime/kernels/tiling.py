"""How a layer is cut into work items and register tiles: a small model of cycles, no measuring."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from anncvt.runtime.kernels.layer import LANES, Layer, blocks

#: What one core can keep close while it works on an item: a part of a usual second-level cache, which with AVX-512 is
#: twice as large.
CACHE_BYTES, WIDE_CACHE_BYTES = 256 * 1024, 448 * 1024
#: Weights that stay in the first-level cache while a work item passes over them.
PANEL_BYTES = 8 * 1024
#: From so many pixels in registers on, a vector of weights is used often enough to come from the second-level cache.
WIDE = 12
#: Bytes per cycle that arrive from beyond that cache.
BANDWIDTH = 12
#: Bytes per cycle of a pass over data that lie in that cache at best.
COPY_BANDWIDTH = 6
#: Independent sums that keep the adders busy, where tiles are large (measured: 13 are faster than 10) and where not.
WIDE_LATENCY, LATENCY = 13, 4
#: Input blocks so far apart share the lines of the first-level cache; of its eight ways half are left to other data.
ALIAS_BYTES, ALIAS_BLOCKS = 4096, 4
#: Tiles that go on in the next line have inner loops of their own, each or (in assembly) by the column they begin at;
#: 14 of these were slower than none.
MOST_COLUMNS = 8
#: What beginning a work item costs.
ITEM_CYCLES = 400
#: Share of the machine that few work items leave idle: a few threads should be balanced, many all have something to do.
IDLE = {1: 0.5, 2: 0.04, 3: 0.1, 4: 0.02}


@dataclass(frozen=True)
class Tiling:
    """``rows`` x ``out_blocks`` is one work item; ``height`` x ``width`` pixels (at most) are summed in registers.

    All pixels of the item are done for ``depth`` input blocks before the next blocks' turn. ``linear``: a tile is
    ``width`` pixels in a row that goes on in the next line of the image. A tile has the sums of ``vectors`` output
    blocks; the last ones of an item may overlap.
    """

    rows: int
    out_blocks: int
    height: int
    width: int
    depth: int
    linear: bool = False
    vectors: int = 1


def tiling(layer: Layer, accumulators: int, linear: bool = False, vectors: int = 1) -> Tiling:
    """The cheapest cut for a machine whose registers hold ``accumulators`` vectors of 16 sums.

    ``linear``: tiles may go on in the next line. ``vectors``: output blocks that share the pixels of a tile, where
    there are so many.
    """
    height, _ = layer.out_size
    heights = [rows for rows in range(1, height + 1) if height % rows == 0] or [height]
    if len(heights) == 2 and height > 2:  # a prime number of rows: the last block may overlap its neighbour
        heights = sorted({2, 4, 8, -(-height // 4), -(-height // 2), height} & set(range(2, height + 1)))
    options = itertools.chain.from_iterable(_options(layer, rows, accumulators, linear, vectors) for rows in heights)
    return min(options, key=lambda option: option[0])[1]


def _depth(layer: Layer, accumulators: int) -> int:
    """Input blocks whose weights for 16 output channels stay in the first-level cache; all, where tiles are large.

    Of blocks that lie where they push each other out of that cache, a few.
    """
    seen = blocks(layer.in_channels // layer.groups)
    if layer.per_lane or not layer.blocked or layer.form == "fixed":
        return seen
    if not layer.copied and layer.size[0] * layer.size[1] * LANES * 4 % ALIAS_BYTES == 0:
        seen = min(seen, ALIAS_BLOCKS)
    if accumulators >= WIDE:
        return seen
    return min(seen, max(1, PANEL_BYTES // (layer.kernel[0] * layer.kernel[1] * LANES * LANES * 4)))


def _options(
    layer: Layer, rows: int, accumulators: int, linear: bool, most_vectors: int
) -> Iterator[tuple[tuple[float, ...], Tiling]]:
    """Every register tile for items of ``rows`` rows, with its cost in cycles."""
    height, width = layer.out_size
    row_blocks, out = -(-height // rows), blocks(layer.out_channels)
    grid = (1, rows * width) if layer.pointwise else (rows, width)
    taps = layer.in_channels // layer.groups * layer.kernel[0] * layer.kernel[1]
    reach = (layer.kernel[0] - 1) * layer.dilation[0] + 1
    pixels = rows * width if layer.pointwise else ((rows - 1) * layer.stride[0] + reach) * layer.size[1]
    inputs = layer.in_channels * pixels * 4
    weights = out * LANES * taps * 4
    cache = WIDE_CACHE_BYTES if accumulators >= WIDE else CACHE_BYTES
    moved = weights * (row_blocks if weights > cache else 1)
    moved += inputs * row_blocks * (out if inputs > cache else 1)
    # Each item reads its input once more to sum it, or to copy it (which asks of each pixel whether it is padding); in
    # fixed point both at once.
    fixed = layer.form == "fixed"
    passes = 1 if fixed else (layer.form == "max") + 2 * layer.copied
    depth = _depth(layer, accumulators)
    latency = WIDE_LATENCY if accumulators >= WIDE else LATENCY
    for cuts in (1, 2, 4, 8):
        out_blocks = -(-out // cuts)
        vectors = min(most_vectors, out_blocks)
        most = accumulators // vectors
        items = row_blocks * -(-out // out_blocks)
        overhead = moved / BANDWIDTH + items * (ITEM_CYCLES + passes * inputs / COPY_BANDWIDTH)
        idle = max(IDLE.get(items, 0), (-items % 8) / 8 * 0.02)
        shapes = [
            (-(-grid[0] // tall) * -(-grid[1] // wide), tall, wide, False)
            for tall in range(1, min(grid[0], most) + 1)
            for wide in range(1, min(grid[1], most // tall) + 1)
        ]
        if linear and not layer.pointwise and not layer.per_lane and width <= MOST_COLUMNS:
            most_wide = min(accumulators, rows * width)
            shapes += [(-(-rows * width // wide), 1, wide, True) for wide in range(1, most_wide + 1)]
        for tiles, tall, wide, goes_on in shapes:
            # One operation per sum and tap, one weight load per tile and tap; latency needs independent sums.
            per_tap = tiles * (max(tall * wide * vectors, latency) + vectors)
            tile_blocks = row_blocks * -(-out // out_blocks) * -(-out_blocks // vectors)
            cycles = (per_tap * taps * tile_blocks / (2 if fixed else 1) + overhead) * (1 + idle)
            yield (cycles, tall * wide), Tiling(rows, out_blocks, tall, wide, depth, goes_on, vectors)
