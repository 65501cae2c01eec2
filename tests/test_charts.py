import re
from xml.etree import ElementTree

import torch

from anncvt.charts import WIDTH, Bar, bars, histogram, steps
from anncvt.distributions import distribution


def parsed(drawing):
    return ElementTree.fromstring(drawing)


def test_bars_are_as_long_as_their_values():
    rows = [Bar("a<b", ((2.0, "cnn"), (1.0, "memory")), "3"), Bar("c", ((1.5, "adder"),), "1.5")]
    found = [float(rect.get("width")) for rect in parsed(bars(rows, "t & u")).iter("rect")]
    assert found[0] == 2 * found[1] and abs(found[2] - found[0] * 0.75) < 0.11
    assert sum(found[:2]) < WIDTH


def test_bars_of_nothing():
    assert parsed(bars([Bar("a", ((0.0, "cnn"),), "0")], "t")).find(".//{*}rect").get("width") == "0.0"


def test_histogram_shows_the_better_fit_thicker():
    torch.manual_seed(0)
    found = distribution(torch.distributions.Laplace(0.0, 1.0).sample((10_000,))).to_json()
    lines = {line.get("class") for line in parsed(histogram(found, "w", "adder")).iter("polyline")}
    assert lines == {"gaussian", "laplace better"}


def test_histogram_stays_inside():
    spike = distribution(torch.cat([torch.zeros(999), torch.ones(1)])).to_json()
    drawing = histogram(spike, "spike", "cnn")
    assert all(float(y) >= 0 for y in re.findall(r',(-?[\d.]+)[ "]', drawing))


def test_steps_place_higher_values_higher():
    drawing = parsed(steps([("CNN", "cnn", [90.0, None, 88.0])], ["a", "b", "c"], "t"))
    first, second = (float(circle.get("cy")) for circle in drawing.iter("circle"))
    assert first < second and len(list(drawing.iter("circle"))) == 2
    parsed(steps([("CNN", "cnn", [50.0])], ["only"], "t"))
