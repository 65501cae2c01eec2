"""Integer layers called with arrays: weights packed once, kernels compiled for each image size and kept."""

from __future__ import annotations

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
from anncvt.runtime.kernels.integer_pack import Requantisation, check, wide
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
        self._wide = end is not None and wide(mode, self._weight, end)
        self._mode = mode
        self._constants: dict[bool, list[Tensor]] = {}

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
        layer = self._layer(channels, (x.shape[2], x.shape[3]), residual is not None, x.dim() == 5)
        y = torch.empty(x.shape[0], *layer.out_shape, dtype=getattr(torch, layer.result)) if out is None else out
        if layer.blocked not in self._constants:  # the same for every image size
            packed = Plan.of(layer, Deployment.parse("cpu")).pack(self._weight, self._zero, self._end)
            self._constants[layer.blocked] = [torch.from_numpy(array) for array in packed]
        most = max(1, _MOST_ELEMENTS // max(x[:1].numel(), y[:1].numel(), 1))
        for start in range(0, x.shape[0], most):
            part = slice(start, start + most)
            ends = [y[part]] if residual is None else [residual[part], y[part]]
            self._run(layer, [x[part], *self._constants[layer.blocked], *ends])
        return y

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
            wide=self._wide,
            blocked=blocked,
        )

    def _run(self, layer: IntegerLayer, arguments: list[Tensor]) -> None:
        cache.use_threads(torch.get_num_threads())
        aligned = [a.contiguous() if a.data_ptr() % _ALIGNMENT == 0 else a.clone() for a in arguments]
        cache.kernel(layer)(*aligned)
        if aligned[-1] is not arguments[-1]:
            arguments[-1].copy_(aligned[-1])


def to_blocks(x: Tensor) -> Tensor:
    """``[N, C, H, W]`` as ``[N, ceil(C/16), H, W, 16]``, lanes beyond the last channel zero."""
    missing = blocks(x.shape[1]) * LANES - x.shape[1]
    padded = F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
    return padded.unflatten(1, (-1, LANES)).permute(0, 1, 3, 4, 2).contiguous()


def from_blocks(y: Tensor, channels: int) -> Tensor:
    """The reverse of :func:`to_blocks`."""
    return y.permute(0, 1, 4, 2, 3).flatten(1, 2)[:, :channels]
