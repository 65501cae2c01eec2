"""The CUDA kernels there are. All take their geometry as arguments: one compiled kernel serves every shape.

A variant fixes what the generated code depends on: the computation, the types, whether channels come four at a time,
and the tile. This module imports neither torch nor TVM.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

SHARPNESS = {"full": 0.5, "exact": 2.0**80}
"""``2*saturate(s*d + 0.5) - 1`` is ``clip(d, -1, 1)`` for the first s, ``sign(d)`` for the second."""

HALVES = ("float16", "bfloat16")
DTYPES = ("float32", *HALVES)
KINDS = (
    *("forward", "fused", "finish", "dx", "dw", "integer"),
    *("depthwise_forward", "depthwise_fused", "depthwise_dx", "depthwise_dw"),
)
"""``fused`` is ``forward`` with an epilogue, ``finish`` that epilogue on sums in parts."""
FLOATS = ("high", "low", "sharpness")
"""The numbers that are float32; all others are int32."""
LANES = 32
"""Channel vectors side by side in a block of ``depthwise_dw``, and the rows of pixels below them:"""
STRIPES = 8


@dataclass(frozen=True)
class Tile:
    """A block computes ``rows`` x ``columns`` results, ``depth`` taps at a time; a thread ``height`` x ``width``."""

    rows: int
    columns: int
    height: int
    width: int
    depth: int = 16
    blocks: int = 2
    """Blocks that a multiprocessor should have room for: while one waits for its threads, another computes."""
    unrolled: int = 16
    """Taps in a row without a jump; with all 64 sums in registers, more of them would spill."""

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.rows // self.height * (self.columns // self.width)


#: By kind, the largest first. Gradient kernels keep a second value beside each sum, hence smaller tiles of a thread.
TILES = {
    "forward": (
        Tile(128, 128, 8, 8, depth=8, unrolled=2),
        Tile(128, 64, 8, 4),
        Tile(128, 32, 8, 4, blocks=4),
        Tile(128, 16, 4, 4, blocks=4),
    ),
    "dx": (Tile(128, 64, 8, 4), Tile(128, 32, 8, 4, blocks=3), Tile(128, 16, 4, 4, blocks=4)),
    "dw": (Tile(64, 64, 8, 4, blocks=3), Tile(32, 32, 4, 4, blocks=6), Tile(16, 16, 2, 4, blocks=16)),
}
TILES["fused"] = TILES["integer"] = TILES["forward"]
#: Of the kernels without shared tiles: so many threads, each with results of its own.
FLAT = Tile(256, 1, 1, 1)

_WALK = (
    *("M", "PH", "PW", "SH", "SW", "delta_h", "delta_w", "depth", "mul_h", "mul_w", "off_h", "off_w", "taps_h"),
    "taps_w",
)
_PLACES = ("xh", "xn", "xw", "yh", "yn", "yw")
_TILED = ("part", "per", "splits", "steps", "w_wide", "y_wide")
#: Of an epilogue: whether there is something to add, and the limits.
_EPILOGUE = ("added", "high", "low")
_NUMBERS = {
    "forward": (*_WALK, *_PLACES, *_TILED),
    "fused": (*_WALK, *_PLACES, *_TILED, *_EPILOGUE),
    "finish": ("depth", "entries", "splits", *_EPILOGUE),
    "dx": (*_WALK, *_PLACES, *_TILED, "sharpness"),
    "integer": (*_WALK, *_PLACES, *_TILED, "pad"),
    "dw": (
        *("OH", "OW", "SH", "SW", "col_tiles", "cols", "delta_h", "delta_w", "gh", "gn", "gw", "mul_h", "mul_w"),
        *("off_h", "off_w", "part", "per", "pixels", "rows", "sharpness", "splits", "steps", "taps", "taps_w"),
        *("xh", "xn", "xw"),
    ),
    "depthwise_forward": (*_WALK, *_PLACES),
    "depthwise_fused": (*_WALK, *_PLACES, *_EPILOGUE),
    "depthwise_dx": (*_WALK, *_PLACES, "sharpness"),
    "depthwise_dw": (
        *("OH", "OW", "SH", "SW", "delta_h", "delta_w", "depth", "gh", "gn", "gw", "mul_h", "mul_w"),
        *("off_h", "off_w", "part", "per", "pixels", "sharpness", "taps_w", "xh", "xn", "xw"),
    ),
}
#: What every kernel is told: how many blocks there are.
_GRID = ("grid_x", "grid_y", "grid_z")
_POINTERS = {
    "forward": ("w", "x", "y"),
    "fused": ("r", "scale", "shift", "w", "x", "y"),
    "finish": ("r", "scale", "shift", "x", "y"),
    "dx": ("r", "w", "x", "y"),
    "integer": ("w", "x", "y"),
    "dw": ("g", "w", "x", "y"),
    "depthwise_forward": ("w", "x", "y"),
    "depthwise_fused": ("r", "scale", "shift", "w", "x", "y"),
    "depthwise_dx": ("r", "w", "x", "y"),
    "depthwise_dw": ("g", "w", "x", "y"),
}


@dataclass(frozen=True)
class Variant:
    """One kernel. ``dtype`` is that of the image (and of gradients), ``out`` that of the results (and what is added).

    With ``vector`` 4, channels of a group are a multiple of four on both sides, and loads and stores take four.
    """

    kind: str
    dtype: str
    out: str
    vector: int
    tile: Tile

    @property
    def name(self) -> str:
        """Of the function and of the file."""
        return f"{self.kind}_{self.dtype}_{self.out}_{self.vector}_{self.tile.rows}x{self.tile.columns}"

    @property
    def pointers(self) -> tuple[str, ...]:
        """The tensors a launch passes, in this order, before the numbers."""
        return _POINTERS[self.kind]

    @property
    def numbers(self) -> tuple[str, ...]:
        """The numbers a launch passes, in this order."""
        return tuple(sorted((*_NUMBERS[self.kind], *_GRID)))


def variants(kinds: Iterable[str] = KINDS, dtypes: Iterable[str] = DTYPES) -> Iterator[Variant]:
    """Every kernel of these kinds for images of these types (``integer`` has its own type)."""
    for kind, vector in itertools.product(kinds, (4, 1)):
        tiles = TILES.get(kind, (FLAT,))
        if kind == "integer":
            yield from (Variant(kind, "uint32", "int32", vector, tile) for tile in tiles)
            continue
        for dtype, tile in itertools.product(dtypes, tiles):
            if kind == "finish":
                yield Variant(kind, "float32", dtype, vector, tile)
                continue
            for out in _results(kind, dtype):
                yield Variant(kind, dtype, out, vector, tile)


def _results(kind: str, dtype: str) -> tuple[str, ...]:
    """Weight gradients, and sums in parts, are float32."""
    if kind.endswith("dw") or dtype == "float32":
        return ("float32",)
    return (dtype, "float32") if kind in ("forward", "dx") else (dtype,)


def tile_for(kind: str, columns: int) -> Tile:
    """The tile of a kind for so many output channels (rows and columns of a ``dw`` alike): the cheapest, then largest.

    Narrow tiles reuse less of what they load: a column in them counts up to a quarter more.
    """
    tiles = TILES.get(kind, (FLAT,))
    return min(tiles, key=lambda t: (-(-columns // t.columns) * t.columns * (1 + 4 / t.columns), -t.columns))
