import json
import re
from html.parser import HTMLParser

import pytest
import torch
from click.testing import CliRunner

import anncvt
from anncvt import api
from anncvt.cli import cli
from anncvt.errors import AnncvtError
from anncvt.facts import gather
from anncvt.inspection import inspect
from anncvt.measure import DataChoice
from anncvt.page import page

VOID = {"meta", "br", "link", "img"}


class Balanced(HTMLParser):
    """Every tag is closed, and nothing is loaded."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attributes):
        assert not {"src", "href", "onclick"} & {name for name, _ in attributes}, (tag, attributes)
        assert tag not in ("script", "link", "img", "iframe")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(text):
    parser = Balanced()
    parser.feed(text)
    assert not parser.open
    return " ".join(parser.text)


def test_a_report_has_every_part(converted):
    anncvt.quantize(converted, DataChoice("digits", limit=32), bits=6)
    api.bench(converted, repeats=1, seconds=1)
    facts = api.report(converted)
    text = (converted / "report.html").read_text()
    shown = read(text)
    for part in ("Accuracy", "Layers against the CNN", "Distributions", "Operations and energy", "Latency", "Plan"):
        assert part in shown
    assert "6-bit integers" in shown and "Horowitz" in shown and "saves no energy" in shown
    assert "prefers-color-scheme: dark" in text and not re.search(r"https?://", text)
    assert len(text) < 2_000_000
    layers = {row["name"]: row for row in facts["layers"]["layers"]}
    assert set(layers) == {layer.name for layer in anncvt.load(converted).plan.swapped}
    assert all(row["r2"] <= 1 and row["error"] >= 0 for row in layers.values())


def test_the_best_epoch_of_a_distillation_is_no_measurement_of_its_own(converted):
    anncvt.distill(converted, epochs=1, data=DataChoice("digits", limit=64), batch_size=32)
    program = anncvt.load(converted)
    distilled = next(record for record in program.history if record.stage == "distilled")
    assert "best" in distilled.metrics
    distilled.metrics["images"] = 50_000  # more to train on than to measure on
    assert "Accuracy" in read(page(gather(program)))


def test_a_report_of_little(converted):
    """No bench, no integers, no images, and a name that is not HTML."""
    program = anncvt.load(converted)
    program.history = [record for record in program.history if record.stage not in ("data", "evaluated")]
    program.source = type(program.source)("folder/<b>net.pth", program.source.arch)
    notes = []

    class Notes:
        note = notes.append
        task = anncvt.progress.SILENT.task

    facts = gather(program, progress=Notes())
    shown = read(page(facts))
    assert "<b>net.pth" in shown and "folder/" not in shown and notes
    assert "Latency" not in shown and "Layers against" not in shown and "8-bit integers" in shown


def test_an_unconverted_program_has_a_page(converted):
    program = anncvt.load(converted)
    program.student, program.plan = None, None
    assert "History" in read(page(gather(program)))


def test_layers_are_measured_where_they_are(converted):
    """A student that is its teacher explains everything."""
    program = anncvt.load(converted)
    images = DataChoice("digits", limit=16).open("test", program.preprocess)
    found = inspect(program, images)
    assert found["images"] == 16 and set(found["overall"]) == {
        "adder weights", "CNN weights", "adder outputs", "CNN outputs"
    }  # fmt: skip
    first = program.plan.swapped[0]
    with torch.no_grad():
        program.student.get_submodule(first.bn).bias.add_(100)
    worse = inspect(program, images)
    assert worse["layers"][0]["r2"] < found["layers"][0]["r2"] - 1
    assert worse["layers"][0]["error"] == pytest.approx(100, rel=0.2)


def test_the_verb(converted, tmp_path):
    table = tmp_path / "t.toml"
    table.write_text(
        'name = "mine"\ncitation = "memo"\n[integer.add]\n8 = 1\n[integer.multiply]\n8 = 1\n[integer.shift]\n8 = 1\n'
        "[floating.add]\n32 = 1\n[floating.multiply]\n32 = 1\n[memory]\nweights = 1\nactivations = 1\n"
    )
    out = tmp_path / "page.html"
    arguments = ["report", str(converted), "-o", str(out), "--energy-table", str(table)]
    shown = CliRunner().invoke(cli, arguments)
    assert shown.exit_code == 0 and "R^2" in shown.output and "mine: memo" in shown.output
    assert "memo" in read(out.read_text())
    facts = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    assert facts["costs"]["table"]["name"] == "mine" and facts["path"] == str(out)
    table.write_text("name = 3")
    assert CliRunner().invoke(cli, arguments).exit_code == 1


def test_damaged_bench_results_are_told(converted):
    (converted / "bench.json").write_text("{}")
    with pytest.raises(AnncvtError, match="damaged"):
        gather(anncvt.load(converted))
