import pytest

from anncvt.cost import PICOJOULES, energy


def test_energy_of_a_tap():
    """A convolution's tap is a multiplication and an addition, an adder's two additions."""
    assert energy(1, 1) == pytest.approx(4.6e-12) and energy(2, 0) == pytest.approx(1.8e-12)
    assert energy(10**9, 0, "int8") == pytest.approx(0.03e-3)


@pytest.mark.parametrize("kind", PICOJOULES)
def test_multiplications_cost_more(kind):
    assert energy(2, 0, kind) < energy(1, 1, kind)
