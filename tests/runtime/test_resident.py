import numpy as np

from anncvt.runtime.resident import peak_of


def test_the_peak_of_work_counts_even_what_is_freed_again():
    def work():
        temporary = np.ones(40_000_000, np.uint8)
        return temporary.sum()

    result, peak = peak_of(work)
    assert result == 40_000_000
    assert peak is None or 38e6 <= peak < 80e6


def test_work_before_does_not_count():
    peak_of(lambda: np.ones(60_000_000, np.uint8).sum())
    _, peak = peak_of(lambda: np.ones(10_000_000, np.uint8).sum())
    assert peak is None or 8e6 <= peak < 40e6
