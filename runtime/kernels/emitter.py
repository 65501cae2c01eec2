"""Kernel calls in a Relax function: one PrimFunc per distinct kernel, one constant per distinct array."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
from tvm import relax, tirx

from anncvt.runtime.geometry import Padding
from anncvt.runtime.kernels import elementwise, fixed_point, inference, layout, pooling
from anncvt.runtime.kernels.deployment import Deployment
from anncvt.runtime.kernels.fusion import Combination, Convolution, Pending, Value, View
from anncvt.runtime.kernels.layer import LANES, Layer, blocks


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

    @property
    def fixed(self) -> bool:
        """Whether any layer so far is computed in 16-bit fixed point."""
        return any(isinstance(key, Layer) and key.mode == "fixed" for key in self._kernels)

    def emit(self, expression: Any) -> Any:
        """Bind ``expression`` to a variable."""
        return self.builder.emit(expression)

    def constant(self, array: np.ndarray) -> Any:
        """``array`` as a constant of the module; equal arrays are stored once."""
        array = np.ascontiguousarray(array)
        key = (array.shape, str(array.dtype), hashlib.blake2b(array.tobytes()).digest())
        if key not in self._constants:
            self._constants[key] = relax.const(array, str(array.dtype))  # without, int64 would become int32
        return self._constants[key]

    def call(
        self,
        key: Hashable,
        make: Callable[[], tirx.PrimFunc],
        arguments: list[Any],
        shape: tuple[int, ...],
        dtype: str = "float32",
    ) -> Any:
        """Bind the result of a kernel, which ``make`` builds where there is none of that ``key`` yet."""
        if key not in self._kernels:
            self._kernels[key] = self.builder.add_func(make(), "kernel")
        return self.emit(relax.call_tir(self._kernels[key], relax.Tuple(arguments), relax.TensorType(shape, dtype)))

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
        dtype, key = value.dtype, (name, value.shape, value.dtype)
        expression = self.call(key, lambda: make(value.shape, dtype), [value.expr], shape, dtype)
        return Value(expression, value.shape, to, dtype)

    def pending(self, pending: Pending) -> Value:
        """Compute a layer or elementwise chain."""
        if isinstance(pending.source, Convolution):
            return self._layer(pending, pending.source)
        return self._elementwise(pending, pending.source)

    def view(self, view: View) -> Value:
        """Copy the window a view describes."""
        spec, dtype, shape = view.window(), view.x.dtype, layout.blocked_shape(view.shape)
        expression = self.call((spec, dtype), lambda: layout.window(spec, dtype), [view.x.expr], shape, dtype)
        return Value(expression, view.shape, True, dtype)

    def pool(self, spec: pooling.Pool, x: Value, shape: tuple[int, ...]) -> Value:
        """Pool blocked ``x``; ``shape`` is torch's shape of the result."""
        dtype = x.dtype
        expression = self.call((spec, dtype), lambda: pooling.build(spec, dtype), [x.expr], spec.out_shape, dtype)
        return Value(expression, shape, True, dtype)

    def concatenate(self, parts: list[Value]) -> Value:
        """Blocked values joined along the channels."""
        batch, _, *size = parts[0].shape
        channels = tuple(part.shape[1] for part in parts)
        tall, wide = (*size, 1, 1)[:2]
        shape, dtype = (batch, sum(channels), *size), parts[0].dtype
        expression = self.call(
            ("concatenate", batch, channels, tall, wide, dtype),
            lambda: layout.concatenate(batch, channels, (tall, wide), dtype),
            [part.expr for part in parts],
            layout.blocked_shape(shape),
            dtype,
        )
        return Value(expression, shape, True, dtype)

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
        target = self.target
        if target.fixed and fixed_point.suitable(layer, source.weight, target.architecture, target.features):
            layer = dataclasses.replace(layer, mode="fixed")
        pack = fixed_point.pack if layer.mode == "fixed" else inference.pack
        packed = pack(layer, source.weight, pending.scale, pending.shift)
        arguments = [x.expr, *(self.constant(array) for array in packed)]
        arguments += self._residual(pending)
        kernel = self.call(layer, lambda: self._kernel(layer), arguments, layer.out_shape)
        return Value(kernel, pending.shape, True)

    def _mode(self, mode: str) -> str:
        """Arm has an absolute difference of floats, and LLVM makes two instructions of a maximum there."""
        return "abs" if mode == "max" and self.target.architecture == "aarch64" else mode

    def _kernel(self, layer: Layer) -> tirx.PrimFunc:
        if layer.mode == "fixed":
            return fixed_point.generate(layer, self.target.architecture, self.target.features)
        return inference.build(layer, self.target.cut(layer), self.target.assembly)

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
        return Value(self.call(spec, lambda: elementwise.build(spec), arguments, spec.shape), pending.shape, True)

    def _residual(self, pending: Pending) -> list[Any]:
        return [] if pending.residual is None else [self.blocked(pending.residual).expr]


def linear_as_convolution(x: Value, weight: np.ndarray) -> Convolution:
    """``x[N, F] @ weight[O, F].T`` as a 1x1 convolution on one pixel."""
    return Convolution(x, weight[:, :, None, None], "conv", (1, 1), Padding(0, 0, 0, 0), (1, 1), 1)
