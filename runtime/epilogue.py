"""What follows an adder in inference: the line of a BatchNorm, a residual, limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Epilogue(NamedTuple):
    """``clip(scale * y + shift + residual, low, high)`` of a sum ``y`` ``[N, O, H', W']``.

    Attributes:
        scale, shift: ``[O]``, floating point.
        residual: of the shape of ``y``.
        low, high: infinite where there is no limit. A value that is not a number stays so.
    """

    scale: Tensor
    shift: Tensor
    residual: Tensor | None
    low: float
    high: float

    @property
    def lines(self) -> dict[str, Tensor]:
        """The tensors of each channel, by name."""
        return {"scale": self.scale, "shift": self.shift}

    def of(self, y: Tensor) -> Tensor:
        """Computed in ``y``, whose memory is used."""
        scale, shift = (line.to(y.dtype).view(-1, 1, 1) for line in self.lines.values())
        y.mul_(scale).add_(shift)
        if self.residual is not None:
            y.add_(self.residual)
        return y.clamp_(self.low, self.high) if self.low > -float("inf") or self.high < float("inf") else y


def stepwise(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``forward`` with an :class:`Epilogue` as its last argument, which is computed when the layer is done."""

    def fused_forward(*arguments: Any) -> Tensor:
        *layer, epilogue = arguments
        return epilogue.of(forward(*layer))

    return fused_forward
