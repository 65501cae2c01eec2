"""The pure torch implementation, which runs where no compiled kernels do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from parity import Case, assert_parity, cases, op

from anncvt.runtime import fallback, kernels


@pytest.fixture(autouse=True)
def torch_only(monkeypatch):
    monkeypatch.setenv("ANNCVT_KERNELS", "torch")
    monkeypatch.setattr(kernels, "compiled", None)  # called, it would raise
    assert not kernels.usable(torch.zeros(1))


@pytest.mark.parametrize("values", ["normal", "grid"])
@pytest.mark.parametrize(
    "case",
    [
        Case(channels=5, outputs=7, stride=(2, 1), padding=(1, 0, 2, 1)),
        Case(channels=2, outputs=3, groups=3, dilation=(2, 1), layout="nhwc"),
        Case(batch=0),
    ],
)
def test_parity(case, values):
    assert_parity(op, case, values=values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype):
    assert_parity(op, Case(), dtype=dtype, tolerance=torch.finfo(dtype).eps * 4)


def test_memory_stays_at_the_size_of_the_output():
    """All differences at once would be 600 MB here; the padded input is 0.3 MB."""
    x, weight = torch.randn(4, 16, 32, 32), torch.randn(16, 16, 3, 3)
    with torch.profiler.profile(profile_memory=True) as profile:
        fallback.forward(x, weight, (1, 1), (1, 1), (1, 1), 1)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 2 * 4 * 16 * 34 * 34 * 4


@settings(max_examples=20, deadline=None, derandomize=True)
@given(cases())
@pytest.mark.slow
def test_parity_of_any_geometry(case):
    assert_parity(op, case)
