import click
import pytest

from anncvt.options import Bytes, Duration, Numbers, Setting, Size


@pytest.mark.parametrize(
    ("kind", "value", "meant"),
    [
        (Size(), "32", (32,)),
        (Size(), "3x32x48", (3, 32, 48)),
        (Size(), "3,32,48", (3, 32, 48)),
        (Size(), [32, 48], (32, 48)),
        (Size(), 32, (32,)),
        (Numbers(), "0.5,0.25", (0.5, 0.25)),
        (Numbers(), 0.5, (0.5,)),
        (Numbers(), [1, 2], (1.0, 2.0)),
        (Bytes(), "500M", 500 << 20),
        (Bytes(), "1.5GiB", 3 << 29),
        (Bytes(), "8gb", 8 << 30),
        (Duration(), "90", 90),
        (Duration(), "90s", 90),
        (Duration(), "1.5m", 90),
        (Duration(), 90, 90),
        (Duration(), "2h", 7200),
        (Setting(), "n=3", ("n", 3)),
        (Setting(), "act=relu", ("act", "relu")),
        (Setting(), ("n", 3), ("n", 3)),
    ],
)
def test_values(kind, value, meant):
    assert kind.convert(value, None, None) == meant


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Size(), "big"),
        (Size(), "3x"),
        (Size(), "0"),
        (Size(), ""),
        (Numbers(), "a"),
        (Numbers(), ","),
        (Bytes(), "0G"),
        (Bytes(), "8"),
        (Bytes(), "plenty"),
        (Duration(), "0"),
        (Duration(), "5 days"),
        (Duration(), "-1"),
        (Setting(), "n"),
        (Setting(), "=3"),
    ],
)
def test_nonsense_is_refused(kind, value):
    with pytest.raises(click.BadParameter):
        kind.convert(value, None, None)
