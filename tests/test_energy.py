import pytest

from anncvt.energy import HOROWITZ_45NM, load_table
from anncvt.errors import AnncvtError

TABLE = """
name = "mine"
citation = "a memo"
[integer.add]
8 = 1
32 = 4
[integer.multiply]
8 = 2
[integer.shift]
32 = 0.5
[floating.add]
32 = 9
[floating.multiply]
32 = 37
[memory]
weights = 100
activations = 10
"""


def test_the_default_is_horowitz():
    assert HOROWITZ_45NM.picojoules("multiply", 32, floating=True) == 3.7
    assert HOROWITZ_45NM.picojoules("add", 32, floating=True) == 0.9
    assert HOROWITZ_45NM.picojoules("multiply", 8) == 0.2 and HOROWITZ_45NM.picojoules("add", 8) == 0.03
    assert "ISSCC 2014" in HOROWITZ_45NM.citation


def test_widths_in_between_follow_a_power_law():
    assert HOROWITZ_45NM.picojoules("multiply", 16) == pytest.approx((0.2 * 3.1) ** 0.5)
    widths = [HOROWITZ_45NM.picojoules("add", bits) for bits in (4, 8, 12, 20, 32, 40)]
    assert widths == sorted(widths)


def test_a_table_of_ones_own(tmp_path):
    (tmp_path / "t.toml").write_text(TABLE)
    table = load_table(tmp_path / "t.toml")
    assert (table.name, table.citation) == ("mine", "a memo")
    assert table.picojoules("add", 16) == pytest.approx(2) and table.picojoules("multiply", 16) == 2
    assert table.memory == {"weights": 100.0, "activations": 10.0}


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ('name = "mine"', "", "name is missing"),
        ("8 = 2", "8 = -2", "positive"),
        ("8 = 2", "eight = 2", "energy table"),
        ("[integer.multiply]", "[integer.divide]", "divide"),
        ("weights = 100", "", "memory"),
        ("[memory]", "[extra]\na = 1\n[memory]", "extra"),
        ("8 = 2", "8 = = 2", "not TOML"),
    ],
)
def test_what_is_wrong_with_a_table_is_told(tmp_path, before, after, told):
    file = tmp_path / "t.toml"
    file.write_text(TABLE.replace(before, after, 1))
    with pytest.raises(AnncvtError, match=told) as raised:
        load_table(file)
    assert str(file) in str(raised.value) and raised.value.fix
    with pytest.raises(AnncvtError, match="cannot be read"):
        load_table(tmp_path / "none.toml")


def test_energy_of_a_tap():
    """A convolution's tap is a multiplication and an addition, an adder's two additions."""
    assert HOROWITZ_45NM.joules(1, 1) == pytest.approx(4.6e-12)
    assert HOROWITZ_45NM.joules(2, 0) == pytest.approx(1.8e-12)
