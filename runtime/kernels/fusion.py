"""Values of a network on their way to kernels, and what is still waiting to be fused.

A layer is not emitted where it stands in the graph: it waits as :class:`Pending` while the batch norm, the residual
addition and the activation behind it join its epilogue, and becomes a kernel call when somebody needs its result.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from anncvt.runtime.geometry import Padding
from anncvt.runtime.kernels.layer import Activation
from anncvt.runtime.kernels.layout import Axis, Window


@dataclass(frozen=True)
class Value:
    """A computed tensor of torch's ``shape``; ``blocked``: ``expr`` is NCHW16c (``[N, C]`` has one pixel)."""

    expr: Any
    shape: tuple[int, ...]
    blocked: bool
    dtype: str = "float32"


@dataclass(frozen=True)
class Convolution:
    """The adder (``mode`` ``"max"`` or ``"abs"``) or convolution (``"conv"``) that a pending value begins with."""

    x: Value
    weight: np.ndarray  # [O, C/groups, kh, kw]
    mode: str
    stride: tuple[int, int]
    padding: Padding
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True)
class Combination:
    """``x``, or ``x`` combined with ``other`` element by element (see ``elementwise.COMBINE``)."""

    x: Value
    combine: str = ""
    other: Value | None = None


@dataclass(frozen=True)
class Pending:
    """``activation(scale * source + shift + residual)``, not computed yet; ``scale``, ``shift`` are float64 ``[C]``."""

    source: Convolution | Combination
    shape: tuple[int, ...]
    scale: np.ndarray
    shift: np.ndarray
    residual: Value | None = None
    activation: Activation = ()

    @classmethod
    def of(cls, source: Convolution | Combination, shape: tuple[int, ...]) -> Pending:
        return cls(source, shape, np.ones(shape[1]), np.zeros(shape[1]))

    @property
    def open(self) -> bool:
        """Whether scale, shift and residual may still join (nothing nonlinear came yet)."""
        return self.residual is None and not self.activation

    @property
    def affine(self) -> bool:
        """Whether scale and shift do anything."""
        return bool(np.any(self.scale != 1) or np.any(self.shift != 0))

    def scaled(self, scale: np.ndarray, shift: np.ndarray) -> Pending:
        """Followed by ``scale * _ + shift``; only where :attr:`open`."""
        return dataclasses.replace(self, scale=self.scale * scale, shift=self.shift * scale + shift)

    def added(self, residual: Value) -> Pending:
        """Followed by an addition; only where :attr:`open`."""
        return dataclasses.replace(self, residual=residual)

    def activated(self, activation: Activation) -> Pending:
        """Followed by an activation; only where there is none yet."""
        return dataclasses.replace(self, activation=activation)


@dataclass(frozen=True)
class View:
    """Slices and paddings of a blocked value, not copied yet."""

    x: Value
    axes: tuple[Axis, Axis, Axis]  # channels, rows, columns
    fill: float = 0.0

    @classmethod
    def of(cls, x: Value) -> View:
        channels, height, width = x.shape[1:]
        return cls(x, (Axis.whole(channels), Axis.whole(height), Axis.whole(width)))

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.x.shape[0], *(axis.size for axis in self.axes))

    @property
    def padded(self) -> bool:
        """Whether some of it is fill."""
        return any(axis.low > 0 or axis.high < axis.size for axis in self.axes)

    def window(self) -> Window:
        """What the copying kernel needs to know."""
        batch, channels, height, width = self.x.shape
        return Window(batch, (channels, height, width), self.axes, self.fill)

    def replaced(self, axis: int, new: Axis) -> View:
        """With another slice of channels (0), rows (1) or columns (2)."""
        axes = list(self.axes)
        axes[axis] = new
        return dataclasses.replace(self, axes=(axes[0], axes[1], axes[2]))

    def as_padding(self) -> Padding | None:
        """The spatial zero padding this view amounts to, if it is nothing else (a layer can then pad by itself)."""
        channels, rows, columns = self.axes
        if self.fill != 0 or channels != Axis.whole(self.x.shape[1]):
            return None
        sides = []
        for axis, size in zip((rows, columns), self.x.shape[2:], strict=True):
            before, after = -axis.start, axis.size + axis.start - size
            if axis.step != 1 or before < 0 or after < 0 or (axis.low, axis.high) != (before, before + size):
                return None
            sides.append((before, after))
        (top, bottom), (left, right) = sides
        return Padding(top, left, bottom, right)
