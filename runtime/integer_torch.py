"""Integer networks at speed: the arithmetic of :mod:`anncvt.runtime.integer` in torch, equal to it bit for bit.

Adders run on the float kernels of the op, which is exact while every sum of integers stays below 2**24 (float32) or
2**53 (float64); convolutions run in float64 and epilogues in int64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import anncvt.runtime.op  # noqa: F401  (registers torch.ops.anncvt.adder2d)
from anncvt.runtime.integer import Epilogue, Step
from anncvt.runtime.integer_network import INPUT, IntegerNetwork

#: A step, its output and (where it has one) its accumulators.
Watcher = Callable[[Step, Tensor, "Tensor | None"], None]


#: A step, its inputs and its residual -> its output and (where it has and tells one) its accumulators.
Compute = Callable[[Step, Sequence[Tensor], "Tensor | None"], "tuple[Tensor, Tensor | None]"]


def execute(step: Step, inputs: Sequence[Tensor], residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The output of a step and, where it has one, its accumulators."""
    if step.epilogue is None:
        return rearrange(step, inputs), None
    accumulators = accumulate(step, inputs)
    return finish(step.epilogue, accumulators, residual), accumulators


@torch.no_grad()
def run(network: IntegerNetwork, pixels: Tensor, watch: Watcher | None = None, compute: Compute = execute) -> Tensor:
    """Pixels ``[N, C, H, W]`` uint8 -> logits ``[N, classes]`` int32, as :func:`anncvt.runtime.integer_network.run`.

    Args:
        watch: called after each step with the step, its output and its accumulators (or None).
        compute: executes a step.
    """
    values = {INPUT: torch.from_numpy(network.enter(pixels.numpy()))}
    spent = network.last_readers()
    for step in network.steps:
        residual = None if step.residual is None else values[step.residual]
        output, accumulators = compute(step, [values[name] for name in step.inputs], residual)
        values[step.name] = output
        if watch is not None:
            watch(step, output, accumulators)
        for name in spent.get(step.name, ()):
            del values[name]
    return values[network.steps[-1].name].flatten(1)


def accumulate(step: Step, inputs: Sequence[Tensor]) -> Tensor:
    """The accumulators ``[N, O, H', W']`` int32 of a step that has them."""
    if step.op == "adder":
        return _adder(step, inputs)
    x = inputs[0]
    if step.op == "convolution":
        assert step.weight is not None
        weight, zero = torch.from_numpy(step.weight).double(), step.pad_values[0]
        sides, window = _sides(step), step.window
        centred = F.pad(x.double() - zero, sides)
        return F.conv2d(centred, weight, None, window.stride, 0, window.dilation, window.groups).int()
    if step.op == "sum_pool":
        padded = F.pad(x.double(), _sides(step), value=float(step.pad_values[0]))
        taps = step.kernel[0] * step.kernel[1]
        # The mean times the count, which is a whole number up to rounding.
        return (F.avg_pool2d(padded, step.kernel, step.window.stride) * taps).round().int()
    return x.int()


def rearrange(step: Step, inputs: Sequence[Tensor]) -> Tensor:
    """The output of a step that has no accumulators, uint8."""
    x = inputs[0]
    if step.op == "max_pool":
        padded = F.pad(x, _sides(step), value=0)
        return F.max_pool2d(padded.float(), step.kernel, step.window.stride, 0, step.window.dilation).to(torch.uint8)
    if step.op == "slice":
        first, (down, across) = step.channels[0], step.window.stride
        return x[:, first : first + step.shape[0], ::down, ::across].contiguous()
    if step.op == "pad":
        return F.pad(x, [*_sides(step), *step.channels], value=step.pad_values[0])
    if step.op == "concatenate":
        return torch.cat([*inputs], 1)
    if step.op == "shuffle":
        return x.unflatten(1, (step.window.groups, -1)).transpose(1, 2).flatten(1, 2)
    return x.reshape(len(x), *step.shape)


def finish(epilogue: Epilogue, accumulators: Tensor, residual: Tensor | None) -> Tensor:
    """Requantise, see :class:`anncvt.runtime.integer.Epilogue`."""
    total = accumulators.long()
    total *= torch.from_numpy(epilogue.multiplier).long().view(-1, 1, 1)
    total += torch.from_numpy(epilogue.bias + (1 << (epilogue.shift - 1))).view(-1, 1, 1)
    if residual is not None:
        total.add_(residual.long(), alpha=epilogue.residual_multiplier)
    small = epilogue.low >= 0 and epilogue.high <= 255
    total >>= epilogue.shift
    return total.clamp_(epilogue.low, epilogue.high).to(torch.uint8 if small else torch.int32)


def _adder(step: Step, inputs: Sequence[Tensor]) -> Tensor:
    assert step.weight is not None and step.filter_group is not None
    taps = int(np.prod(step.weight.shape[1:]))
    # Kernels sum 2 max(x, w), x and w apart: four times a tap's largest value bounds every partial sum.
    dtype = torch.float32 if 4 * 255 * taps < 2**24 else torch.float64
    window, weight = step.window, torch.from_numpy(step.weight).to(dtype)
    result = torch.empty((len(inputs[0]), *step.shape), dtype=torch.int32)
    for at, (x, pad_value) in enumerate(zip(inputs, step.pad_values, strict=True)):
        chosen = torch.from_numpy(np.flatnonzero(step.filter_group == at))
        padded = F.pad(x.to(dtype), _sides(step), value=float(pad_value))
        geometry = (list(window.stride), [0, 0], list(window.dilation), window.groups)
        result[:, chosen] = torch.ops.anncvt.adder2d(padded, weight[chosen], *geometry).int()
    return result


def _sides(step: Step) -> list[int]:
    """Padding in the order of ``F.pad``."""
    top, left, bottom, right = step.window.padding
    return [left, right, top, bottom]
