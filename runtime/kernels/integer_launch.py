"""Integer layers called with arrays: weights packed once, kernels compiled for each image size and kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anncvt.runtime.geometry import expand_padding
from anncvt.runtime.kernels import cache
from anncvt.runtime.kernels.deployment import Deployment
from anncvt.runtime.kernels.integer_layer import IntegerLayer
from anncvt.runtime.kernels.integer_pack import Requantisation, check, narrow, totals_of
from anncvt.runtime.kernels.integer_plan import Plan
from anncvt.runtime.kernels.layer import LANES, blocks
from anncvt.runtime.kernels.spec import as_pair

Array = TypeVar("Array", np.ndarray, Tensor)

_ALIGNMENT = 64
#: Kernels index with 32 bits: elements of one call's input or output.
_MOST_ELEMENTS = 2**31 - 1


class IntegerOperator:
    """One adder or convolution layer in integers, on this machine.

    Args:
        weight: ``[O, C/groups, kh, kw]``, uint8 for the adder, int8 for the convolution.
        mode: ``"adder"``, ``-sum |x-w|``; ``"conv"``, ``sum (x-zero)*w``.
        stride, padding, dilation: two integers each; padding may be ``(top, left, bottom, right)``.
        groups: channel groups.
        zero: the value of a padded pixel and, for ``"conv"``, the zero point of x (0..255).
        end: how sums become uint8; without it results are the int32 sums.

    Raises:
        AnncvtError: sums may not fit int32, or what ``end`` makes of them int64.
    """

    def __init__(
        self,
        weight: np.ndarray | Tensor,
        *,
        mode: str = "adder",
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
        zero: int = 0,
        end: Requantisation | None = None,
    ) -> None:
        check(weight := np.asarray(weight), zero)
        self._weight, self._zero, self._end = weight, zero, end
        self._window = (as_pair(stride), expand_padding(padding), as_pair(dilation), groups)
        self._totals = "long" if end is None else totals_of(mode, self._weight, end)
        self._narrow = end is not None and narrow(mode, self._weight, end)
        self._mode = mode
        self._constants: dict[bool, list[Tensor]] = {}
        self._calls: dict[tuple[int, tuple[int, ...], bool], _Call] = {}

    def __call__(self, x: Array, residual: Array | None = None) -> Array:
        """The layer of ``x`` ``[N, C, H, W]`` uint8, with ``residual`` ``[N, O, H', W']`` uint8 added before the shift.

        Returns:
            ``[N, O, H', W']``, uint8 or int32, of the kind of ``x`` (numpy or torch).
        """
        image = torch.as_tensor(x)
        other = None if residual is None else to_blocks(torch.as_tensor(residual))
        y = self.run(image if image.shape[1] < LANES else to_blocks(image), image.shape[1], other)
        plain = from_blocks(y, len(self._weight))
        return plain if isinstance(x, Tensor) else plain.numpy()

    def run(self, x: Tensor, channels: int, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """The same on blocked tensors ``[N, ceil(C/16), H, W, 16]`` whose lanes beyond the last channel are zero.

        ``x``, with ``channels`` channels, may also be plain ``[N, C, H, W]``.
        """
        key = (channels, x.shape[1:], residual is not None)
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = self._prepare(channels, (x.shape[2], x.shape[3]), residual is not None, x.dim())
        y = torch.empty(x.shape[0], *call.out_shape, dtype=call.dtype) if out is None else out
        cache.use_threads(torch.get_num_threads())
        ends = [x, y] if residual is None else [x, residual, y]
        if 0 < x.shape[0] <= call.most:
            call(ends)
        elif x.shape[0]:
            for parts in zip(*(end.split(call.most) for end in ends), strict=True):
                call(list(parts))
        return y

    def _prepare(self, channels: int, size: tuple[int, int], residual: bool, rank: int) -> _Call:
        layer = self._layer(channels, size, residual, rank == 5)
        if layer.blocked not in self._constants:  # the same for every image size
            packed = Plan.of(layer, Deployment.parse("cpu")).pack(self._weight, self._zero, self._end)
            self._constants[layer.blocked] = [torch.from_numpy(array).clone() for array in packed]
        return _Call(layer, self._constants[layer.blocked])

    def _layer(self, channels: int, size: tuple[int, int], residual: bool, blocked: bool) -> IntegerLayer:
        out, _, kh, kw = self._weight.shape
        result = "int32" if self._end is None else "uint8"
        stride, padding, dilation, groups = self._window
        return IntegerLayer(
            self._mode,
            channels,
            size,
            out,
            (kh, kw),
            stride,
            padding,
            dilation,
            groups,
            result=result,
            residual=residual,
            clamped=self._end is not None and self._end.narrow,
            totals=self._totals,
            narrow=self._narrow,
            blocked=blocked,
        )


class _Call:
    """A kernel with its constants; ``most`` images at a time."""

    def __init__(self, layer: IntegerLayer, constants: list[Tensor]) -> None:
        self._kernel, self._constants = cache.kernel(layer), constants
        self.out_shape, self.dtype = layer.out_shape, getattr(torch, layer.result)
        self.most = max(1, _MOST_ELEMENTS // max(math.prod(layer.in_shape), math.prod(layer.out_shape)))

    def __call__(self, ends: list[Tensor]) -> None:
        """``ends``: the input, the residual if there is one, and the output."""
        x, *others = [a.contiguous() if a.data_ptr() % _ALIGNMENT == 0 else a.clone() for a in ends]
        self._kernel(x, *self._constants, *others)
        if others[-1] is not ends[-1]:
            ends[-1].copy_(others[-1])


def to_blocks(x: Tensor) -> Tensor:
    """``[N, C, H, W]`` as ``[N, ceil(C/16), H, W, 16]``, lanes beyond the last channel zero."""
    missing = blocks(x.shape[1]) * LANES - x.shape[1]
    padded = F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
    return padded.unflatten(1, (-1, LANES)).permute(0, 1, 3, 4, 2).contiguous()


def from_blocks(y: Tensor, channels: int) -> Tensor:
    """The reverse of :func:`to_blocks`."""
    return y.permute(0, 1, 4, 2, 3).flatten(1, 2)[:, :channels]
