"""An adder with what follows it in inference, as one module on one op."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from anncvt.nn import AdderConv2d, op_padding
from anncvt.runtime.geometry import output_size


class FusedAdder2d(nn.Module):
    """``clip(scale * adder(x) + shift + residual, low, high)``, ``[N, C, H, W] -> [N, O, H', W']``; no gradients.

    A residual of another shape is added as torch adds.

    Args:
        adder: gives geometry and weights, which are not copied; its own bias and norm are left to ``shift`` and
            ``scale``.
        scale, shift: ``[O]``, of any precision; kept in float32, on the device of the weights.
        low, high: infinite where there is no limit.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, adder: AdderConv2d, scale: Tensor, shift: Tensor, low: float, high: float) -> None:
        super().__init__()
        self.adder = adder
        self.low, self.high = (None if abs(limit) == float("inf") else float(limit) for limit in (low, high))
        self.register_buffer("scale", scale.to(adder.weight.device, torch.float32))
        self.register_buffer("shift", shift.to(adder.weight.device, torch.float32))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        adder = self.adder
        operand, sides = adder.operand(x)
        stride, padding, dilation = list(adder.stride), op_padding(sides), list(adder.dilation)
        lines = (adder.weight, self.scale, self.shift)
        size = (
            len(x),
            adder.out_channels,
            *output_size(operand.shape[2:], adder.kernel_size, stride, padding, dilation),
        )
        if residual is None or residual.shape == size:
            limits = (self.low, self.high)
            return torch.ops.anncvt.adder2d_fused(
                operand, *lines, residual, stride, padding, dilation, adder.groups, *limits
            )
        y = torch.ops.anncvt.adder2d_fused(operand, *lines, None, stride, padding, dilation, adder.groups) + residual
        return y.clamp(-math.inf if self.low is None else self.low, self.high)
