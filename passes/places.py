"""What arrives at an adder's taps, and what should leave it, at random places of its output."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from anncvt.nn import _AdderNd
from anncvt.passes.examples import Examples


class Places:
    """``taps`` ``[G, T, P]``, in the order of a flattened weight, and ``targets`` ``[G, O, P]``, by groups ``G``.

    Args:
        count: places ``P``, at most.
        memory: bytes for both, once more for the taps less their means, and for four more of the size of the targets:
            less their means, what a fit misses yet, two at a time of what it tries.
        generator: of the places.
    """

    def __init__(
        self, adder: _AdderNd, examples: Examples, count: int, memory: int, generator: torch.Generator
    ) -> None:
        self.groups = adder.groups
        side = examples.targets.shape[2:]
        #: Taps that share an input channel.
        self.each = math.prod(adder.kernel_size)
        count = min(count, memory // (4 * (2 * adder.in_channels * self.each + 5 * adder.out_channels)))
        picked = torch.randperm(len(examples) * math.prod(side), generator=generator)[: max(count, 2)]
        image, *place = torch.unravel_index(picked, (len(examples), *side))
        here: tuple[Any, ...] = (image, slice(None), *place)
        geometry = [*zip(place, adder.stride, adder.dilation, strict=True)]
        inputs = []
        for offsets in itertools.product(*(range(size) for size in adder.kernel_size)):
            start: Any = [p * stride + o * dilation for (p, stride, dilation), o in zip(geometry, offsets, strict=True)]
            inputs.append(examples.inputs[(image, slice(None), *start)])
        self.taps = self._by_group(torch.stack(inputs, 2).flatten(1))
        self.targets = self._by_group(examples.targets[here])

    def _by_group(self, x: Tensor) -> Tensor:
        """``[P, C]`` as ``[G, C/G, P]``."""
        return x.T.contiguous().view(self.groups, -1, len(x))

    def channels(self, count: int) -> Tensor:
        """Some ``count`` values of every input channel, ``[C, count]``."""
        taps = self.taps.view(-1, self.each, self.taps.shape[2])
        return taps[:, :, : -(-count // self.each)].flatten(1)
