import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anncvt.errors import AnncvtError
from anncvt.passes.ranges import METHODS, choose_grid, grid_over, lost_entropy, lost_output, on_grid, squared_error
from anncvt.runtime.integer import Window


def laplace(count=20_000):
    torch.manual_seed(0)
    return torch.distributions.Laplace(0.0, 1.0).sample((count,))


@given(st.floats(-100, 0), st.floats(0, 100), st.sampled_from([4, 6, 8]), st.booleans())
def test_a_grid_covers_its_range_and_has_zero_on_it(low, high, bits, power_of_two):
    grid = grid_over(low, high, bits, power_of_two=power_of_two)
    assert 0 <= grid.zero <= grid.top
    if low < high:
        assert grid.low <= low + grid.scale / 2 * 1.001 and grid.high >= high - grid.scale / 2 * 1.001
    if power_of_two:
        assert torch.frexp(torch.tensor(grid.scale, dtype=torch.float64)).mantissa == 0.5


@pytest.mark.parametrize("method", METHODS)
def test_what_is_never_negative_wastes_no_integers(method):
    grid = choose_grid(laplace().relu(), 8, method)
    assert grid.zero == 0 and grid.high > 3


def test_an_outlier_does_not_widen_the_range():
    values = torch.cat([laplace(), torch.tensor([1e3])])
    assert choose_grid(values, 4, "percentile").high < 20
    assert choose_grid(values[:-1], 4, "mse").high < float(values[:-1].max())


def test_least_squared_error_is_least():
    values = laplace()
    best = squared_error(values, choose_grid(values, 4, "mse"))
    for share in (0.3, 0.5, 0.8, 1.0):
        other = grid_over(share * float(values.min()), share * float(values.max()), 4)
        assert best <= squared_error(values, other) * 1.02


def test_entropy_loses_nothing_where_every_value_has_its_integer():
    values = torch.arange(16).repeat(100).float()
    assert lost_entropy(values.double(), grid_over(0, 15, 4)) < 1e-6
    assert lost_entropy(values.double(), grid_over(0, 7, 4)) > 0.1


def test_entropy_clips_a_long_tail_and_keeps_the_bulk():
    grid = choose_grid(laplace(), 4, "entropy")
    assert 2 < grid.high < float(laplace().max())


@pytest.mark.parametrize("method", METHODS)
def test_constants_get_a_grid_that_holds_them(method):
    for value in (0.0, 2.5, -2.5):
        grid = choose_grid(torch.full((100,), value), 8, method)
        assert abs(float(on_grid(torch.tensor(value), grid)) - value) <= grid.scale / 2 * 1.001


def test_lost_output_is_nothing_on_the_grid_and_more_on_a_coarser_one():
    torch.manual_seed(0)
    fine = grid_over(-2, 2, 8)
    x, w = on_grid(torch.randn(2, 3, 6, 6), fine), on_grid(torch.randn(4, 3, 3, 3), fine)
    window = Window(padding=(1, 1, 1, 1))
    lost = [lost_output(x, w, window, grid_over(-2, 2, bits)) for bits in (8, 4, 2)]
    assert lost[0] < 1e-6 < lost[1] < lost[2] < 1


def test_an_unknown_method_is_told():
    with pytest.raises(AnncvtError, match="median"):
        choose_grid(torch.ones(3), 8, "median")
