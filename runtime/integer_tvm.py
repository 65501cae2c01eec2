"""Integer networks on the compiled integer kernels: adders and convolutions with their epilogues in one pass each.

Equal to :mod:`anncvt.runtime.integer` bit for bit. What has no kernel (pooling, rescaling, rearranging) is computed by
:mod:`anncvt.runtime.integer_torch`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from anncvt.runtime import integer_torch, kernels
from anncvt.runtime.integer import Epilogue, Step
from anncvt.runtime.integer_network import IntegerNetwork
from anncvt.runtime.integer_torch import Watcher


def usable() -> bool:
    """Whether there are compiled kernels here."""
    return kernels.usable(torch.empty(0))


class Compiled:
    """An integer network whose kernels are compiled on first use and kept."""

    def __init__(self, network: IntegerNetwork) -> None:
        self.network = network
        self._layers = {step.name: _Layer(step) for step in network.steps if step.weight is not None}

    def run(self, pixels: Tensor, watch: Watcher | None = None) -> Tensor:
        """As :func:`anncvt.runtime.integer_torch.run`; ``watch`` sees no accumulators, which stay in the kernels."""
        return integer_torch.run(self.network, pixels, watch, self._compute)

    def accumulate(self, step: Step, inputs: Sequence[Tensor]) -> Tensor:
        """The accumulators of an adder or a convolution, by a kernel that ends there."""
        return self._layers[step.name].sums(inputs)

    def _compute(self, step: Step, inputs: Sequence[Tensor], residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        layer = self._layers.get(step.name)
        if layer is None:
            return integer_torch.execute(step, inputs, residual)
        return layer.outputs(inputs, residual), None


class _Layer:
    """One step, as a kernel for each of its filter groups."""

    def __init__(self, step: Step) -> None:
        from anncvt.runtime.kernels.integer_launch import IntegerOperator
        from anncvt.runtime.kernels.integer_pack import Requantisation

        assert step.weight is not None and step.epilogue is not None
        self.step, self.epilogue = step, step.epilogue
        # Logits are wider than bytes: their epilogue is not in the kernel.
        self.fused = self.epilogue.low >= 0 and self.epilogue.high <= 255
        self.members = _members(step)
        self.kernels, self.plain = [], []
        for chosen, pad_value in zip(self.members, step.pad_values, strict=True):
            weight, part = step.weight[chosen.numpy()], _of(self.epilogue, chosen.numpy())
            window = step.window
            options = {
                "mode": "adder" if step.op == "adder" else "conv",
                "stride": window.stride,
                "padding": window.padding,
                "dilation": window.dilation,
                "groups": window.groups,
                "zero": pad_value,
            }
            self.plain.append(IntegerOperator(weight, **options))  # type: ignore[arg-type]
            if self.fused:
                end = Requantisation(
                    part.multiplier, part.bias, part.shift, part.low, part.high, part.residual_multiplier
                )
                self.kernels.append(IntegerOperator(weight, **options, end=end))  # type: ignore[arg-type]

    def sums(self, inputs: Sequence[Tensor]) -> Tensor:
        return self._joined([kernel(x) for kernel, x in zip(self.plain, inputs, strict=True)])

    def outputs(self, inputs: Sequence[Tensor], residual: Tensor | None) -> Tensor:
        if not self.fused:
            return integer_torch.finish(self.epilogue, self.sums(inputs), residual)
        parts = [
            kernel(x, None if residual is None else residual[:, chosen])
            for kernel, x, chosen in zip(self.kernels, inputs, self.members, strict=True)
        ]
        return self._joined(parts)

    def _joined(self, parts: list[Tensor]) -> Tensor:
        """The filters in their order."""
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)[:, torch.cat(self.members).argsort()]


def _members(step: Step) -> list[Tensor]:
    """The filters of each group."""
    if step.filter_group is None:
        return [torch.arange(step.shape[0])]
    return [torch.from_numpy(np.flatnonzero(step.filter_group == at)) for at in range(len(step.inputs))]


def _of(epilogue: Epilogue, filters: np.ndarray) -> Epilogue:
    """The epilogue of some filters."""
    return Epilogue(
        epilogue.multiplier[filters],
        epilogue.bias[filters],
        epilogue.shift,
        epilogue.low,
        epilogue.high,
        epilogue.residual_multiplier,
    )
