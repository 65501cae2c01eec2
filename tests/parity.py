"""The one comparison of an implementation of the op with its float64 reference: forward and both gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from anncvt.runtime import reference
from anncvt.runtime.geometry import output_size

Implementation = Callable[..., Tensor]
"""``(x, weight, stride, padding, dilation, groups, gradient) -> y``, differentiable."""


@dataclass(frozen=True)
class Case:
    """One geometry. ``channels`` and ``outputs`` are per group."""

    batch: int = 2
    channels: int = 3
    outputs: int = 4
    groups: int = 1
    size: tuple[int, int] = (7, 6)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, ...] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    layout: str = "nchw"

    def arguments(self) -> tuple[list[int], list[int], list[int], int]:
        """Stride, padding, dilation, groups as the op takes them."""
        return list(self.stride), list(self.padding), list(self.dilation), self.groups

    def tensors(self, values: str = "normal", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """``x``, ``weight`` and a gradient of the output.

        ``"normal"``: Gaussian; ``"grid"``: few distinct values, so that many ``x == w``, zeros among them.
        """
        shapes = (
            (self.batch, self.channels * self.groups, *self.size),
            (self.outputs * self.groups, self.channels, *self.kernel),
            (self.batch, self.outputs * self.groups, *self._output()),
        )
        generator = torch.Generator().manual_seed(0)
        x, weight, grad = (_values(values, shape, generator).to(dtype) for shape in shapes)
        return _laid_out(x, self.layout), weight, _laid_out(grad, self.layout)

    def _output(self) -> tuple[int, int]:
        return output_size(self.size, self.kernel, self.stride, self.padding, self.dilation)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Geometries of every kind, the output at least one pixel."""

    def pair(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.tuples(st.integers(low, high), st.integers(low, high))

    kernel, dilation = draw(pair(1, 4)), draw(pair(1, 3))
    padding = draw(st.one_of(pair(0, 2), st.tuples(*[st.integers(0, 2)] * 4)))
    smallest = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    extra = draw(pair(0, 9))
    return Case(
        batch=draw(st.integers(1, 3)),
        channels=draw(st.sampled_from([1, 2, 5, 8, 16, 17, 32])),
        outputs=draw(st.sampled_from([1, 2, 5, 8, 16, 20, 32])),
        groups=draw(st.sampled_from([1, 1, 2, 3, 16])),
        size=(smallest[0] + extra[0], smallest[1] + extra[1]),
        kernel=kernel,
        stride=draw(pair(1, 3)),
        padding=padding,
        dilation=dilation,
        layout=draw(st.sampled_from(["nchw", "nhwc", "strided"])),
    )


def assert_parity(
    implementation: Implementation,
    case: Case,
    *,
    values: str = "normal",
    dtype: torch.dtype = torch.float32,
    tolerance: float = 2e-6,
) -> None:
    """Forward, and input and weight gradients of both kinds, agree with float64.

    ``tolerance`` is relative to the largest entry of each result.
    """
    x, weight, grad = case.tensors(values, dtype)
    expected = reference.forward(x, weight, *case.arguments())
    for gradient in ("full", "exact"):
        a, b = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = implementation(a, b, *case.arguments(), gradient)
        assert y.dtype == dtype
        _assert_close(y, expected, tolerance, f"{gradient}: forward")
        dx, dw = torch.autograd.grad(y, (a, b), grad)
        assert dx.dtype == dw.dtype == dtype
        expected_dx, expected_dw = reference.backward(grad, x, weight, *case.arguments(), gradient)
        _assert_close(dx, expected_dx, tolerance, f"{gradient}: input gradient")
        _assert_close(dw, expected_dw, tolerance, f"{gradient}: weight gradient")


def op(*arguments: Any) -> Tensor:
    """The registered op, with whatever kernels it picks."""
    import anncvt.runtime.op  # noqa: F401  (registers it)

    return torch.ops.anncvt.adder2d(*arguments)


def _assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape, what
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.double(), expected, rtol=0, atol=tolerance * scale, msg=lambda text: f"{what}\n{text}"
    )


def _values(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if kind == "grid":
        return torch.randint(-3, 4, shape, generator=generator) / 2
    return torch.randn(shape, generator=generator)


def _laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "nhwc":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    return x
