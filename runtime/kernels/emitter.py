"""Kernel calls in a Relax function: one PrimFunc per distinct kernel, one constant per distinct array."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
from tvm import relax, tirx

from anncvt.runtime.geometry import Padding
from anncvt.runtime.kernels import elementwise, inference, layout, pooling
from anncvt.runtime.kernels.deployment import Deployment
from anncvt.runtime.kernels.fusion import Combination, Convolution, Pending, Value, View
from anncvt.runtime.kernels.layer import LANES, Layer, blocks
from anncvt.runtime.kernels.tiling import tiling


class Emitter:
    """Emits into the function that ``builder`` is building; several functions may share one emitter.

    Args:
        builder: the module's ``BlockBuilder``.
        target: what the kernels are for.
    """

    def __init__(self, builder: relax.BlockBuilder, target: Deployment) -> None:
        self.builder, self.target = builder, target
        self._kernels: dict[Hashable, Any] = {}
        self._constants: dict[Hashable, Any] = {}

    def emit(self, expression: Any) -> Any:
        """Bind ``expression`` to a variable."""
        return self.builder.emit(expression)

    def constant(self, array: np.ndarray) -> Any:
        """``array`` as a constant of the module; equal arrays are stored once."""
        array = np.ascontiguousarray(array)
        key = (array.shape, str(array.dtype), hashlib.blake2b(array.tobytes()).digest())
        if key not in self._constants:
            self._constants[key] = relax.const(array)
        return self._constants[key]

    def blocked(self, value: Value) -> Value:
        """``value`` (rank 2 or 4) in blocked layout."""
        if value.blocked:
            return value
        return self._convert("block", layout.block, value, layout.blocked_shape(value.shape), True)

    def plain(self, value: Value) -> Value:
        """``value`` in torch's layout."""
        if not value.blocked:
            return value
        return self._convert("unblock", layout.unblock, value, value.shape, False)

    def _convert(self, name: str, make: Callable[..., Any], value: Value, shape: tuple[int, ...], to: bool) -> Value:
        expression = self._call((name, value.shape), lambda: make(value.shape), [value.expr], shape)
        return Value(expression, value.shape, to)

    def pending(self, pending: Pending) -> Value:
        """Compute a layer or elementwise chain."""
        if isinstance(pending.source, Convolution):
            return self._layer(pending, pending.source)
        return self._elementwise(pending, pending.source)

    def view(self, view: View) -> Value:
        """Copy the window a view describes."""
        spec = view.window()
        expression = self._call(spec, lambda: layout.window(spec), [view.x.expr], layout.blocked_shape(view.shape))
        return Value(expression, view.shape, True)

    def pool(self, spec: pooling.Pool, x: Value, shape: tuple[int, ...]) -> Value:
        """Pool blocked ``x``; ``shape`` is torch's shape of the result."""
        return Value(self._call(spec, lambda: pooling.build(spec), [x.expr], spec.out_shape), shape, True)

    def concatenate(self, parts: list[Value]) -> Value:
        """Blocked values joined along the channels."""
        batch, _, *size = parts[0].shape
        channels = tuple(part.shape[1] for part in parts)
        tall, wide = (*size, 1, 1)[:2]
        shape = (batch, sum(channels), *size)
        expression = self._call(
            ("concatenate", batch, channels, tall, wide),
            lambda: layout.concatenate(batch, channels, (tall, wide)),
            [part.expr for part in parts],
            layout.blocked_shape(shape),
        )
        return Value(expression, shape, True)

    def _layer(self, pending: Pending, source: Convolution) -> Value:
        direct = not source.x.blocked and source.x.shape[1] < LANES and source.groups == 1 and len(source.x.shape) == 4
        x = source.x if direct else self.blocked(source.x)
        batch, channels, height, width = (*x.shape, 1, 1)[:4]
        out, _, *kernel = source.weight.shape
        layer = Layer(
            self._mode(source.mode),
            batch,
            channels,
            (height, width),
            out,
            (kernel[0], kernel[1]),
            source.stride,
            source.padding,
            source.dilation,
            source.groups,
            pending.activation,
            pending.residual is not None,
            not direct,
        )
        packed = inference.pack(layer, source.weight, pending.scale, pending.shift)
        arguments = [x.expr, *(self.constant(array) for array in packed)]
        arguments += self._residual(pending)
        kernel = self._call(layer, lambda: self._kernel(layer), arguments, layer.out_shape)
        return Value(kernel, pending.shape, True)

    def _mode(self, mode: str) -> str:
        """Arm has an absolute difference of floats, and LLVM makes two instructions of a maximum there."""
        return "abs" if mode == "max" and self.target.architecture == "aarch64" else mode

    def _kernel(self, layer: Layer) -> tirx.PrimFunc:
        return inference.build(layer, tiling(layer, self.target.accumulators), self.target.assembly)

    def _elementwise(self, pending: Pending, source: Combination) -> Value:
        x = self.blocked(source.x)
        if not source.combine and pending.open and not pending.affine:
            return x
        batch, channels, height, width = (*pending.shape, 1, 1)[:4]
        arguments, pixels = [x.expr], 0
        if source.other is not None:
            other = self.blocked(source.other)
            tall, wide = (*other.shape, 1, 1)[2:4]
            arguments, pixels = [x.expr, other.expr], tall * wide
        spec = elementwise.Elementwise(
            batch,
            channels,
            (height, width),
            source.combine,
            pixels,
            pending.affine,
            pending.residual is not None,
            pending.activation,
        )
        if pending.affine:
            for values in (pending.scale, pending.shift):
                lanes = np.zeros(blocks(channels) * LANES, np.float32)
                lanes[:channels] = values
                arguments.append(self.constant(lanes.reshape(-1, LANES)))
        arguments += self._residual(pending)
        return Value(self._call(spec, lambda: elementwise.build(spec), arguments, spec.shape), pending.shape, True)

    def _residual(self, pending: Pending) -> list[Any]:
        return [] if pending.residual is None else [self.blocked(pending.residual).expr]

    def _call(self, key: Hashable, make: Callable[[], tirx.PrimFunc], arguments: list[Any], shape: Any) -> Any:
        if key not in self._kernels:
            self._kernels[key] = self.builder.add_func(make(), "kernel")
        returned = relax.TensorType(shape, "float32")
        return self.emit(relax.call_tir(self._kernels[key], relax.Tuple(arguments), returned))


def linear_as_convolution(x: Value, weight: np.ndarray) -> Convolution:
    """``x[N, F] @ weight[O, F].T`` as a 1x1 convolution on one pixel."""
    return Convolution(x, weight[:, :, None, None], "conv", (1, 1), Padding(0, 0, 0, 0), (1, 1), 1)
