import itertools
import time

import pytest
import torch

from anncvt.passes.schedule import cosine, set_rates, steps_within


def test_cosine_warms_up_peaks_and_ends_near_zero():
    factors = [cosine(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[10] == pytest.approx(1)
    assert factors[-1] < 0.01
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_cosine_copes_with_few_steps(steps):
    assert all(0 < cosine(step, steps) <= 1 for step in range(steps))


def test_set_rates_keeps_the_groups_apart():
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 1.0}, {"params": [torch.zeros(1)], "lr": 0.1}])
    set_rates(optimizer, [1.0, 0.1], 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, pytest.approx(0.05)]


def test_steps_within_fits_the_time_and_has_a_floor():
    assert 15 <= steps_within(0.5, lambda: time.sleep(0.01)) <= 50
    assert steps_within(-1.0, lambda: None) == 10
