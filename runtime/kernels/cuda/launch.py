"""From torch tensors to launches of CUDA kernels, with the functions of :mod:`anncvt.runtime.fallback`.

Images of float32, float16 and bfloat16; sums are float32, results of the image's type, weight gradients float32. An
epilogue is computed in float32.
Everything is enqueued on the current stream, and nothing waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anncvt.runtime.epilogue import Epilogue
from anncvt.runtime.kernels.cuda import driver
from anncvt.runtime.kernels.cuda.geometry import Layer, Walk, layer, split
from anncvt.runtime.kernels.cuda.variant import FLAT, LANES, SHARPNESS, Variant, tile_for
from anncvt.runtime.kernels.spec import as_pair
from anncvt.runtime.kernels.tensors import (
    multiplied_forward,
    multiplied_input_gradient,
    multiplied_weight_gradient,
    nhwc,
)

#: Kernels index with 32 bits: the most elements of one call's tensors, less what a last tile goes beyond them.
MOST_ELEMENTS = 2**31 - 2**16
_ALIGNMENT = 16
Numbers = dict[str, float]


@multiplied_forward
def forward(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """See :func:`anncvt.runtime.fallback.forward`."""
    shape = _layer(x, weight, stride, padding, dilation)
    image = _nhwc(x)
    y = image.new_empty(x.shape[0], *shape.output, weight.shape[0])
    for part, result in _parts(image, y):
        _walk("forward", part, weight, None, result, shape.forward, groups)
    return y.permute(0, 3, 1, 2)


@multiplied_forward
def fused_forward(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    epilogue: Epilogue,
) -> Tensor:
    """See :class:`anncvt.runtime.epilogue.Epilogue`."""
    shape = _layer(x, weight, stride, padding, dilation)
    image = _nhwc(x)
    y = image.new_empty(x.shape[0], *shape.output, weight.shape[0])
    lines = {name: _aligned(value.detach().float().contiguous()) for name, value in epilogue.lines.items()}
    more = [] if epilogue.residual is None else [_nhwc(epilogue.residual.to(x.dtype))]
    numbers = {"added": len(more), "low": epilogue.low, "high": epilogue.high}
    for part, result, *added in _parts(image, y, *more):
        beside = added[0] if added else None
        _walk("fused", part, weight, beside, result, shape.forward, groups, numbers, lines)
    return y.permute(0, 3, 1, 2)


@multiplied_input_gradient
def input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    gradient: str,
) -> Tensor:
    """See :func:`anncvt.runtime.fallback.input_gradient`."""
    shape = _layer(x, weight, stride, padding, dilation)
    image, g = _nhwc(x), _nhwc(grad.to(x.dtype))
    dx = torch.empty_like(image)
    for part, result, values in _parts(g, dx, image):
        for rows, cols in shape.backward:
            there = (slice(None), slice(rows.first, None, rows.step), slice(cols.first, None, cols.step))
            taps = weight[:, :, rows.tap :: rows.tap_step, cols.tap :: cols.tap_step][:, :, : rows.taps, : cols.taps]
            steep = SHARPNESS[gradient]
            _walk("dx", part, taps, values[there], result[there], (rows, cols), groups, {"sharpness": steep})
    return dx.permute(0, 3, 1, 2)


@multiplied_weight_gradient
def exact_weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """See :func:`anncvt.runtime.fallback.exact_weight_gradient`; float32."""
    shape = _layer(x, weight, stride, padding, dilation)
    total = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    for image, g in _parts(_nhwc(x), _nhwc(grad.to(x.dtype))):
        total += _weight_gradient(g, image, weight.detach().float(), shape, groups)
    return total


def integer_forward(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    zero: int = 0,
) -> Tensor:
    """``-sum |x - w|`` of integers, exactly.

    Args:
        x: ``[N, C, H, W]`` uint8.
        weight: ``[O, C/groups, kh, kw]`` uint8.
        zero: the value of a padded pixel.

    Returns:
        ``[N, O, H', W']`` int32.
    """
    shape = _layer(x, weight, stride, padding, dilation)
    # Four channels to a word; those added are what padding is, on both sides, and add nothing.
    more = (0, 0, 0, 0, 0, -weight.shape[1] % 4)
    words = _words(F.pad(x.unflatten(1, (groups, -1)), more, value=zero).flatten(1, 2))
    w = _words(F.pad(weight, more, value=zero)).permute(0, 3, 1, 2)
    y = torch.empty(x.shape[0], *shape.output, weight.shape[0], dtype=torch.int32, device=x.device)
    pad = zero * 0x01010101
    for part, result in _parts(words, y):
        _walk("integer", part, w, None, result, shape.forward, groups, {"pad": pad - (pad >> 31 << 32)})
    return y.permute(0, 3, 1, 2)


def _walk(
    kind: str,
    x: Tensor,
    weight: Tensor,
    beside: Tensor | None,
    y: Tensor,
    walks: tuple[Walk, Walk],
    groups: int,
    more: Mapping[str, float] | None = None,
    lines: Mapping[str, Tensor] | None = None,
) -> None:
    """Fill ``y`` ``[N, H', W', ..]`` from ``x`` ``[N, H, W, ..]``; ``weight`` has the taps that are met.

    ``y`` and ``beside`` may be parts of tensors; they lie alike. ``lines`` are the other tensors of an epilogue.
    """
    if not y.numel():
        return
    rows, cols = walks
    # [group, tap, channel of x, channel of y]
    order = (0, 3, 2, 1) if kind != "dx" else (0, 3, 1, 2)
    w = weight.detach().flatten(2).unflatten(0, (groups, -1)).permute(*order)
    depth, columns = w.shape[2:]
    alone = kind != "integer" and groups > 1 and depth == columns == 1
    vector = 4 if (groups if alone else depth) % 4 == (0 if alone else columns % 4) == 0 else 1
    numbers: Numbers = {
        "M": y.shape[0] * rows.size * cols.size,
        "PH": rows.size,
        "PW": cols.size,
        "SH": x.shape[1],
        "SW": x.shape[2],
        **rows.numbers("h"),
        **cols.numbers("w"),
        "taps_h": rows.taps if cols.taps else 0,
        "taps_w": max(1, cols.taps),
        "depth": (groups if alone else depth) // vector,
        **_distances("x", x, vector),
        **_distances("y", y, vector),
        **(more or {}),
    }
    tensors = {"x": x, "y": y, **(lines or {})}
    if beside is not None or lines is not None:
        tensors["r"] = x if beside is None else beside  # where nothing is added, nothing is read
    if alone:
        variant = Variant(f"depthwise_{kind}", _name(x), _name(y), vector, FLAT)
        tensors["w"] = _aligned(w.float().permute(1, 2, 3, 0).contiguous())
        grid = (-(-int(numbers["M"]) * int(numbers["depth"]) // FLAT.threads), 1, 1)
        driver.launch(variant, grid, tensors, numbers)
        return
    tile = tile_for(kind, columns)
    tensors["w"] = _tiled(w, tile.depth, tile.columns)
    steps = tensors["w"].shape[1] // tile.depth
    dtype = "uint32" if kind == "integer" else _name(x)
    places, across = -(-int(numbers["M"]) // tile.rows), -(-columns // tile.columns)
    splits, per = split(places * across * groups, steps, _room(x) * tile.blocks, 8)
    numbers |= {"steps": steps, "per": per, "splits": splits, "part": 0}
    numbers |= {"w_wide": tensors["w"].shape[2] // 4, "y_wide": columns // vector}
    grid = (places, across, groups * splits)
    if splits == 1:
        driver.launch(Variant(kind, dtype, _name(y), vector, tile), grid, tensors, numbers)
        return
    parts = torch.empty(splits, *y.shape, dtype=torch.int32 if kind == "integer" else torch.float32, device=y.device)
    numbers |= {"part": parts[0].numel() // vector, **_distances("y", parts[0], vector)}
    if beside is not None:
        tensors["r"] = beside.contiguous()  # as the parts lie
    variant = Variant("forward" if kind == "fused" else kind, dtype, _name(parts), vector, tile)
    _launch(variant, grid, tensors | {"y": parts}, numbers)
    if kind == "fused":
        numbers |= {"entries": numbers["part"], "depth": y.shape[3] // vector}
        grid = (-(-int(numbers["entries"]) // FLAT.threads), 1, 1)
        _launch(Variant("finish", "float32", _name(y), vector, FLAT), grid, tensors | {"x": parts, "y": y}, numbers)
    else:
        y.copy_(parts.sum(0, dtype=parts.dtype))


def _launch(
    variant: Variant, grid: tuple[int, int, int], tensors: Mapping[str, Tensor], numbers: Mapping[str, float]
) -> None:
    """A kernel with what it takes of these."""
    given = {name: numbers[name] for name in variant.numbers if not name.startswith("grid_")}
    driver.launch(variant, grid, {name: tensors[name] for name in variant.pointers}, given)


def _weight_gradient(g: Tensor, x: Tensor, weight: Tensor, shape: Layer, groups: int) -> Tensor:
    """``sum g*sign(x - w)``, float32, of ``g`` ``[N, H', W', O]`` and ``x`` ``[N, H, W, C]``."""
    outputs, depth, kh, kw = weight.shape
    rows, cols = shape.forward
    pixels = g.shape[0] * shape.output[0] * shape.output[1]
    alone = groups > 1 and depth == outputs // groups == 1
    if not pixels or not x.numel():
        return torch.zeros_like(weight)
    across, down = (groups, groups) if alone else (depth, outputs // groups)
    vector = 4 if across % 4 == down % 4 == 0 else 1
    numbers: Numbers = {
        "OH": shape.output[0],
        "OW": shape.output[1],
        "SH": x.shape[1],
        "SW": x.shape[2],
        "pixels": pixels,
        **rows.numbers("h"),
        **cols.numbers("w"),
        "taps_w": cols.taps,
        **_distances("x", x, vector),
        **_distances("g", g, vector),
        "part": weight.numel() // vector,
        "sharpness": SHARPNESS["exact"],
    }
    if alone:
        w = weight.permute(1, 2, 3, 0).contiguous()
        wide = -(-groups // vector // LANES)
        splits, per = split(wide * kh * kw, pixels, _room(x) * 4, 64)
        variant, grid = Variant("depthwise_dw", _name(x), "float32", vector, FLAT), (kh * kw, wide, splits)
        numbers |= {"depth": groups // vector, "per": per}
    else:
        w = weight.permute(0, 2, 3, 1).contiguous()
        tile = tile_for("dw", max(across, down))
        steps, tiles = -(-pixels // tile.depth), -(-depth // tile.columns)
        blocks = -(-down // tile.rows) * tiles * kh * kw * groups
        splits, per = split(blocks, steps, _room(x) * tile.blocks, 8)
        variant = Variant("dw", _name(x), "float32", vector, tile)
        grid = (tiles * kh * kw, -(-down // tile.rows), groups * splits)
        numbers |= {"rows": down, "cols": depth, "col_tiles": tiles, "taps": kh * kw}
        numbers |= {"steps": steps, "per": per, "splits": splits}
    parts = w.new_empty(splits, *w.shape)
    driver.launch(variant, grid, {"g": g, "w": _aligned(w), "x": x, "y": parts}, numbers)
    total = parts.sum(0)
    if alone:
        return total.permute(3, 0, 1, 2)
    # The kernel's sums are of g*(sign + 1)/2.
    return (2 * total - g.sum((0, 1, 2), dtype=torch.float32).view(-1, 1, 1, 1)).permute(0, 3, 1, 2)


def _layer(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Layer:
    kernel = (weight.shape[2], weight.shape[3])
    return layer((x.shape[2], x.shape[3]), kernel, as_pair(stride), tuple(padding), as_pair(dilation))


def _tiled(w: Tensor, depth: int, columns: int) -> Tensor:
    """``[group, tap and channel, column]`` of ``[group, tap, channel, column]``, with zeros up to whole tiles.

    float32 or words.
    """
    w = (w if w.dtype == torch.int32 else w.float()).flatten(1, 2)
    return _aligned(F.pad(w, (0, -w.shape[2] % columns, 0, -w.shape[1] % depth)).contiguous())


def _distances(name: str, x: Tensor, vector: int) -> Numbers:
    """Of images, rows and pixels of ``[N, H, W, C]``, in entries of ``vector`` channels."""
    n, h, w = (x.stride(axis) // vector for axis in range(3))
    return {f"{name}n": n, f"{name}h": h, f"{name}w": w}


def _parts(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The batch in pieces whose entries have 32-bit indices.

    Raises:
        RuntimeError: one image alone has too many.
    """
    images = tensors[0].shape[0]
    largest = max(t[0].numel() for t in tensors) if images else 0
    if images * largest <= MOST_ELEMENTS:
        return [tensors]
    most = MOST_ELEMENTS // largest
    if not most:
        raise RuntimeError(f"adder2d on CUDA takes images of {MOST_ELEMENTS} values, not of {largest}")
    return list(zip(*(t.split(most) for t in tensors), strict=True))


def _aligned(x: Tensor) -> Tensor:
    """A copy of what does not begin where vectors of four may lie."""
    return x.clone() if x.data_ptr() % _ALIGNMENT else x


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _nhwc(x: Tensor) -> Tensor:
    return _aligned(nhwc(x))


def _words(x: Tensor) -> Tensor:
    """``[N, H, W, C/4]`` int32 of bytes ``[N, C, H, W]``; C is a multiple of four."""
    bytes_ = _nhwc(x)
    # As a row, since strides of single pixels can be any, which torch will not see as words.
    return bytes_.view(-1).view(torch.int32).view(*bytes_.shape[:3], bytes_.shape[3] // 4)


@functools.cache
def _room_of(device: torch.device) -> int:
    return driver.multiprocessors(device)


def _room(x: Tensor) -> int:
    return _room_of(x.device)
