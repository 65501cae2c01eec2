"""The float64 reference against the formulas written out, entry by entry."""

from __future__ import annotations

import itertools

import pytest
import torch
from parity import Case

from anncvt.runtime import reference

CASE = Case(channels=2, outputs=2, groups=2, size=(4, 5), kernel=(2, 3), stride=(2, 1), padding=(1, 0, 0, 2))


def entries(x, weight):
    """Every tap of CASE: (output index, input index or None for padding, weight index)."""
    top, left = CASE.padding[:2]
    for n, o, i, j in itertools.product(range(x.shape[0]), range(4), *map(range, CASE._output())):
        for c, a, b in itertools.product(range(2), range(2), range(3)):
            row, column = i * 2 + a - top, j + b - left
            inside = 0 <= row < 4 and 0 <= column < 5
            yield (n, o, i, j), (n, o // 2 * 2 + c, row, column) if inside else None, (o, c, a, b)


def test_forward_counts_padded_taps():
    x, weight, _ = CASE.tensors()
    y = torch.zeros(2, 4, *CASE._output(), dtype=torch.float64)
    for out, inp, tap in entries(x, weight):
        y[out] -= abs((x[inp].double() if inp else 0.0) - weight[tap].double())
    torch.testing.assert_close(reference.forward(x, weight, *CASE.arguments()), y)


@pytest.mark.parametrize("gradient", ["full", "exact"])
def test_gradients_are_the_papers(gradient):
    x, weight, grad = CASE.tensors("grid")
    dx, dw = torch.zeros_like(x, dtype=torch.float64), torch.zeros_like(weight, dtype=torch.float64)
    for out, inp, tap in entries(x, weight):
        difference = (x[inp].double() if inp else torch.tensor(0.0).double()) - weight[tap].double()
        g = grad[out].double()
        dw[tap] += g * (difference if gradient == "full" else difference.sign())
        if inp:
            dx[inp] += g * -(difference.clamp(-1, 1) if gradient == "full" else difference.sign())
    actual = reference.backward(grad, x, weight, *CASE.arguments(), gradient)
    torch.testing.assert_close(actual[0], dx)
    torch.testing.assert_close(actual[1], dw)


def test_exact_gradient_is_that_of_autograd():
    x, weight, grad = (t.double() for t in CASE.tensors())
    x.requires_grad_(), weight.requires_grad_()
    y = reference.forward(x, weight, *CASE.arguments())
    expected = torch.autograd.grad(y, (x, weight), grad)
    actual = reference.backward(grad, x.detach(), weight.detach(), *CASE.arguments(), "exact")
    torch.testing.assert_close(actual, expected)
