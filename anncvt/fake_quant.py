"""Quantization-aware training: adder layers that compute in floats what their integers will.

Inputs and weights are rounded to the layer's grid in the forward pass; the backward pass takes rounding for the
identity (straight-through, Bengio et al., arXiv 1308.3432). Clamping is differentiated as it is: activations outside
the grid get no gradient, weights outside get that of the constant ``-|w - clip(w)|`` which they leave, so that they can
come back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anncvt.nn import AdderConv2d, AdderLinear
from anncvt.runtime.integer import Grid
from anncvt.runtime.integer_network import IntegerNetwork


@dataclass(frozen=True)
class FakeQuant:
    """What an :class:`anncvt.nn.AdderConv2d` or ``AdderLinear`` does instead of its plain sum, as its ``fake``.

    Attributes:
        grids: of the filter groups.
        filter_group: ``[O]`` int64.
    """

    grids: tuple[Grid, ...]
    filter_group: Tensor

    def __call__(self, adder: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
        """``adder(x, weight)`` with both on the grid, plus what clamping the weights left.

        Args:
            adder: ``-sum |x - w|``; takes any subset of the filters.
            x: ``[N, C, H, W]``.
            weight: ``[O, C/groups, kh, kw]``.
        """
        if len(self.grids) == 1:
            return _on_one_grid(adder, x, weight, self.grids[0])
        members = [(self.filter_group == at).nonzero()[:, 0] for at in range(len(self.grids))]
        parts = [_on_one_grid(adder, x, weight[chosen], grid) for chosen, grid in zip(members, self.grids, strict=True)]
        return torch.cat(parts, 1)[:, torch.cat(members).argsort()]


def _on_one_grid(adder: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    clipped = weight.clamp(grid.low, grid.high)
    left = (weight - clipped).abs().sum((1, 2, 3))
    return adder(straight_through(x.clamp(grid.low, grid.high), grid), straight_through(clipped, grid)) - left.view(
        -1, 1, 1
    )


def straight_through(x: Tensor, grid: Grid) -> Tensor:
    """``x`` (inside the grid) rounded to it, with the gradient of the identity."""
    return x + ((x / grid.scale).round() * grid.scale - x).detach()


@contextlib.contextmanager
def fake_quantised(student: nn.Module, network: IntegerNetwork) -> Iterator[None]:
    """Inside the block the adders of ``student`` compute on the grids that ``network`` has for them."""
    modules = dict(student.named_modules())
    changed = []
    for step in network.steps:
        module = modules.get(step.name)
        if step.op == "adder" and isinstance(module, (AdderConv2d, AdderLinear)):
            assert step.filter_group is not None
            grids = tuple(network.grid(name) for name in step.inputs)
            module.fake = FakeQuant(grids, torch.from_numpy(step.filter_group).long())
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            module.fake = None
