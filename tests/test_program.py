import dataclasses

import pytest
from torch import nn

from anncvt.program import STAGES, LayerPlan, Plan, Preprocess, Program, Source


def layer(name: str, action: str, macs: int) -> LayerPlan:
    swapped = action == "swap"
    return LayerPlan(
        name, "Conv2d", action, "", (1, 3, 8, 8), (1, 4, 8, 8), (3, 3), (1, 1), 1, macs, 2 * macs if swapped else macs,
        0 if swapped else macs,
    )  # fmt: skip


def test_totals_cover_the_whole_network():
    totals = Plan((layer("a", "keep", 100), layer("b", "swap", 300)), other_macs=100).totals()
    assert totals == {
        "convolutions": 2,
        "linears": 0,
        "swapped": 1,
        "swapped_linears": 0,
        "macs": 500,
        "swapped_macs": 300,
        "swapped_share": 0.6,
        "adds": 100 + 600 + 100,
        "muls": 100 + 100,
        "cnn_joules": pytest.approx(500 * (3.7 + 0.9) * 1e-12),
        "joules": pytest.approx((800 * 0.9 + 200 * 3.7) * 1e-12),
    }
    assert Plan(()).totals()["swapped_share"] == 0


@pytest.fixture
def program():
    return Program(Source("net.pth"), Preprocess((3, 8, 8), (0.0,) * 3, (1.0,) * 3), nn.Identity())


def test_the_stage_is_the_furthest_one_reached(program):
    assert program.stage == "loaded"
    for stage in STAGES:
        program.record(stage, 0.1, {})
        assert program.stage == stage
    program.record("planned", 0.1, {})
    program.record("exported", 0.1, {})
    assert program.stage == STAGES[-1]


def test_records_say_what_it_takes_to_repeat_them(program):
    program.record("calibrated", 1.23456, {"r2": 0.5}, seed=7)
    record = dataclasses.asdict(program.history[-1])
    assert record["seconds"] == 1.235 and record["seed"] == 7 and record["metrics"] == {"r2": 0.5}
    assert {"python", "torch", "anncvt"} <= set(record["versions"])
