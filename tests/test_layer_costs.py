import math

import pytest
from networks import Residual

from anncvt.energy import EnergyTable
from anncvt.layer_costs import NETWORKS, costs, layer_costs
from anncvt.loading import load
from anncvt.passes.choice import Choice
from anncvt.passes.plan import plan

FLAT = EnergyTable(
    "flat",
    "nobody",
    {"add": {8: 1.0}, "multiply": {8: 100.0}, "shift": {8: 10_000.0}},
    {"add": {32: 2.0}, "multiply": {32: 200.0}},
    {"weights": 3.0, "activations": 5.0},
)


@pytest.fixture(scope="module")
def program():
    return plan(load(Residual(), input_size=8))


def test_taps_are_those_of_the_plan(program):
    totals = program.plan.totals()
    found = costs(program)["networks"]
    outputs = sum(math.prod(layer.out_shape[1:]) for layer in program.plan.layers) + 5
    swapped = sum(math.prod(layer.out_shape[1:]) for layer in program.plan.swapped)
    assert found["cnn-fp32"]["multiplies"] == totals["macs"]
    assert found["cnn-fp32"]["adds"] == totals["macs"] + outputs
    assert found["adders-fp32"]["multiplies"] == totals["muls"] + swapped
    assert found["adders-fp32"]["adds"] == totals["adds"] + outputs
    for name in ("cnn-int8", "adders-int"):
        assert found[name]["shifts"] == outputs
    assert found["adders-int"]["multiplies"] == totals["muls"] + outputs
    assert found["cnn-fp32"]["shifts"] == 0


def test_bytes_are_those_of_the_tensors(program):
    found = costs(program)["networks"]
    weights = sum(p.numel() for n, p in program.teacher.named_parameters() if p.dim() > 1)
    assert found["cnn-fp32"]["weight_bytes"] == 4 * weights
    assert found["adders-int"]["weight_bytes"] == weights
    four = costs(program, bits=4)["networks"]["adders-int"]["weight_bytes"]
    swapped = sum(program.teacher.get_submodule(layer.name).weight.numel() for layer in program.plan.swapped)
    assert four == weights - swapped / 2


def test_energy_is_counts_times_table(program):
    for name in NETWORKS:
        rows = layer_costs(program, name, 8, {})
        total = costs(program, table=FLAT)["networks"][name]
        floating = name.endswith("fp32")
        unit = {"add": 2, "multiply": 200} if floating else {"add": 1, "multiply": 100, "shift": 10_000}
        expected = sum(row.count(operation) * pj for row in rows for operation, pj in unit.items())
        assert total["compute_uj"] == pytest.approx(expected / 1e6)
        moved = sum(3 * row.weight_bytes + 5 * row.activation_bytes for row in rows)
        assert total["memory_uj"] == pytest.approx(moved / 1e6)


def test_accumulators_are_as_wide_as_proven(program):
    wide = {"conv1": 17}
    rows = {row.name: row for row in layer_costs(program, "adders-int", 8, wide)}
    assert rows["conv1"].operations[1].bits == 17
    assert rows["conv2"].operations[1].bits == 9 + math.ceil(math.log2(8 * 9))
    assert rows["stem"].kind == "convolution" and rows["conv2"].kind == "adder"
    assert rows["Linear layers"].kind == "linear"


def test_the_citation_comes_along(program):
    assert "Horowitz" in costs(program)["table"]["citation"]
    assert costs(program, table=FLAT)["table"] == {"name": "flat", "citation": "nobody"}


def test_copies_of_an_input_take_their_additions_and_weights(program):
    plain = {row.name: row for row in layer_costs(program, "adders-fp32", 8, {})}
    double = plan(load(Residual(), input_size=8), Choice.of(copies={"conv1": 2}))
    assert costs(double)["networks"]["cnn-fp32"]["adds"] == costs(program)["networks"]["cnn-fp32"]["adds"]
    for row in layer_costs(double, "adders-fp32", 8, {}):
        macs = next(layer.macs for layer in double.plan.layers if layer.copies == 2) if row.name == "conv1" else 0
        assert row.count("add") == plain[row.name].count("add") + 2 * macs
        assert row.weight_bytes == (2 if macs else 1) * plain[row.name].weight_bytes
