"""How an integer layer is cut into work items and register tiles: a small model of cycles, no measuring."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from anncvt.runtime.kernels.integer_forms import Form
from anncvt.runtime.kernels.integer_layer import IntegerLayer
from anncvt.runtime.kernels.layer import LANES, blocks

#: Bytes of input that stay in the first-level cache while all output channels meet them.
NEAR_BYTES = 24 << 10
#: Bytes that stay in the second-level cache.
CACHE_BYTES = 256 << 10
#: Bytes per cycle from the second-level cache, and from beyond it.
CACHE_BANDWIDTH, BANDWIDTH = 24, 8
#: Of an input that a work item copies and adds up.
COPY_BANDWIDTH = 8
#: What beginning a work item costs, and a register tile.
ITEM_CYCLES, TILE_CYCLES = 500, 12
#: Share of the machine that few work items leave idle: a few threads should be balanced, many all have something to do.
IDLE = {1: 0.5, 2: 0.02, 3: 0.2, 4: 0.01}
#: The same of the last round of eight threads, were the others full.
LAST_ROUND = 0.02


@dataclass(frozen=True)
class IntegerTiling:
    """``rows`` x ``panels`` is one work item; ``height`` x ``width`` pixels and ``vectors`` of sums are in registers.

    A panel is what ``vectors`` hold of the output channels of one group; items of a grouped layer take whole groups.
    """

    rows: int
    panels: int
    height: int
    width: int
    vectors: int


def tiling(layer: IntegerLayer, form: Form) -> IntegerTiling:
    """The cheapest cut."""
    vectors = panel_vectors(layer, form)
    height, _ = layer.out_size
    heights = [rows for rows in range(1, height + 1) if height % rows == 0]
    if len(heights) == 2 and height > 2:  # a prime number of rows: the last block may overlap its neighbour
        heights = sorted({1, 2, 4, 8, -(-height // 4), -(-height // 2), height} & set(range(1, height + 1)))
    options = itertools.chain.from_iterable(_options(layer, form, vectors, rows) for rows in heights)
    return min(options, key=lambda option: option[0])[1]


def panel_vectors(layer: IntegerLayer, form: Form) -> int:
    """Vectors of sums per pixel: enough for the outputs of a group, and stored in whole blocks where they can be.

    Beyond two only where the weights that belong to them stay in the first-level cache.
    """
    needed = blocks(layer.filters) * LANES if layer.out_in_place else layer.filters
    fitting = [v for v in range(1, form.vectors + 1) if not layer.out_in_place or needed % (v * form.lanes) == 0]
    near = [v for v in fitting if v <= 2 or v * layer.taps * form.lanes <= NEAR_BYTES] or fitting
    return min(near, key=lambda v: (-(-needed // (v * form.lanes)) * v, -v))


def spans(extent: int, tile: int) -> list[tuple[int, int, int]]:
    """``extent`` as equal tiles of at most ``tile``, at most two sizes: ``(start, tiles, size)``."""
    count = -(-extent // tile)
    small, larger = divmod(extent, count)
    cut = [(0, larger, small + 1), (larger * (small + 1), count - larger, small)]
    return [span for span in cut if span[1]]


def panels_of(layer: IntegerLayer, form: Form, vectors: int) -> int:
    """Panels of one group."""
    return -(-layer.filters // (vectors * form.lanes))


def _options(
    layer: IntegerLayer, form: Form, vectors: int, rows: int
) -> Iterator[tuple[tuple[float, ...], IntegerTiling]]:
    height, width = layer.out_size
    row_blocks, panels = -(-height // rows), panels_of(layer, form, vectors)
    grid = (1, rows * width) if layer.pointwise else (rows, width)
    taps = layer.taps
    steps = -(-taps // form.group)
    size = 2 if form.source == "int16" else 1
    reach = (layer.kernel[0] - 1) * layer.dilation[0] + 1
    pixels = rows * width if layer.pointwise else ((rows - 1) * layer.stride[0] + reach) * layer.size[1]
    pixels_max = (form.of_rows if layer.pointwise and form.of_rows else form.registers) // vectors
    tiles = min(
        (
            (-(-grid[0] // tall) * -(-grid[1] // wide), -(tall * wide), tall, wide)
            for tall in range(1, min(grid[0], pixels_max) + 1)
            for wide in range(1, min(grid[1], pixels_max // tall) + 1)
        ),
    )
    count, _, tall, wide = tiles
    # Units of work that can be cut apart: panels, or whole groups of them.
    units, per_unit = (panels, 1) if layer.groups == 1 else (layer.groups, panels)
    bandwidth = CACHE_BANDWIDTH if layer.read_as_stored and form.source == "uint8" else COPY_BANDWIDTH
    weights = per_unit * vectors * form.lanes * taps * size
    for cuts in (1, 2, 4, 8, 16):
        share = -(-units // cuts)
        items = row_blocks * -(-units // share)
        inputs = layer.depth * (1 if layer.groups == 1 else share) * pixels * size
        per_panel = count * (steps * vectors + TILE_CYCLES) + grid[0] * grid[1] * vectors * steps * 1.2
        # Every panel reads the input of its group again; beyond the first-level cache that costs bandwidth.
        again = inputs / (1 if layer.groups == 1 else share)
        if again > NEAR_BYTES:
            per_panel += again / (CACHE_BANDWIDTH if again < CACHE_BYTES else BANDWIDTH)
        moved = items * (inputs + share * weights) / BANDWIDTH
        cycles = row_blocks * units * per_unit * per_panel + moved + items * (ITEM_CYCLES + inputs / bandwidth)
        idle = max(IDLE.get(items, 0), (-items % 8) / 8 * LAST_ROUND)
        yield (cycles * (1 + idle), items), IntegerTiling(rows, share * per_unit, tall, wide, vectors)
