"""Blocking arithmetic of the kernels, against brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anncvt.runtime.kernels.spec import Axis, divisor, lanes_for, row_block, tile

sizes = st.integers(1, 40)


@given(sizes, st.integers(1, 5), st.integers(1, 4), st.integers(0, 5), st.integers(1, 4))
def test_axis_meets_exactly_the_right_outputs(size, kernel, stride, before, dilation):
    axis = Axis.of(size, kernel, stride, before, dilation)
    for position in range(size):
        a, r = divmod(position, stride)
        met = {(axis.first[r] + t * axis.step, a + axis.offset[r] - t * axis.back) for t in range(axis.count[r])}
        expected = {
            (k, (position + before - k * dilation) // stride)
            for k in range(kernel)
            if (position + before - k * dilation) % stride == 0
        }
        assert met == expected
        assert all(a + axis.low <= output <= a + axis.high for _, output in met)
        assert a < axis.blocks


@given(sizes, sizes)
def test_divisor_is_the_largest(size, limit):
    d = divisor(size, limit)
    assert size % d == 0
    assert d <= limit
    assert not any(size % other == 0 for other in range(d + 1, min(size, limit) + 1))


@given(sizes, st.integers(1, 16))
def test_tiles_have_enough_sums_to_hide_latency(size, limit):
    assert min(size, limit, 4) <= tile(size, limit) <= min(size, limit)


@pytest.mark.parametrize(
    ("size", "limit", "best"), [(7, 5, 4), (14, 5, 5), (32, 5, 4), (7, 16, 7), (28, 16, 14), (17, 16, 9)]
)
def test_tiles_waste_little(size, limit, best):
    assert tile(size, limit) == best


@given(st.integers(1, 500), st.integers(0, 1 << 20))
def test_row_blocks_fit_the_cache_and_leave_work_to_share(rows, width):
    block = row_block(rows, width)
    assert 1 <= block <= rows
    assert block == 1 or block * width <= 192 << 10
    assert rows < 16 or -(-rows // block) >= 4


@given(st.integers(1, 300), st.sampled_from([4, 8, 16]))
def test_lanes_do_not_mostly_compute_padding(channels, widest):
    lanes = lanes_for(channels, widest)
    assert lanes in (4, 8, 16)
    assert lanes <= widest
    padded = -(-channels // lanes) * lanes
    assert lanes == 4 or padded <= 1.25 * -(-channels // (lanes // 2)) * (lanes // 2)
