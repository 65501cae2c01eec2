import pytest
import torch
from networks import Mobile, Residual
from torch import nn

from anncvt.copies import copied
from anncvt.errors import AnncvtError
from anncvt.loading import load
from anncvt.passes import verify
from anncvt.passes.plan import plan
from anncvt.passes.rewrite import rewrite


@pytest.fixture
def program():
    return rewrite(plan(load(Residual(), input_size=8)))


def test_what_rewrite_makes_passes(program):
    verify.rewritten(program, program.student)
    verify.graphs(program.student)
    verify.finite(program.student)


def replace_kept(student):
    student.stem = nn.Sequential(student.stem)


def change_kept_weights(student):
    with torch.no_grad():
        student.stem.weight[0, 0, 0, 0] += 1e-3


def change_kept_statistics(student):
    student.bn1.running_mean += 1


def change_head(student):
    student.head.bias = nn.Parameter(student.head.bias + 1)


def leave_a_convolution(student):
    student.conv2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False)


def lose_channels(student):
    student.head = nn.Linear(8, 3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (replace_kept, "stem was a Conv2d and is a Sequential"),
        (change_kept_weights, "stem.weight is lost or changed"),
        (change_kept_statistics, "bn1.running_mean is lost or changed"),
        (change_head, "head.bias is lost or changed"),
        (leave_a_convolution, "conv2 is a Conv2d, no adder"),
        (lose_channels, "outputs are"),
    ],
)
def test_damage_is_found_and_named(program, damage, message):
    student = copied(program.student)
    damage(student)
    with pytest.raises(AnncvtError, match=message):
        verify.rewritten(program, student)


def test_a_lost_bias_is_found():
    program = rewrite(plan(load(Mobile(), input_size=16)))
    student = copied(program.student)
    student.expand.bias = None
    with pytest.raises(AnncvtError, match=r"expand\.bias is lost"):
        verify.rewritten(program, student)


def test_numbers_that_are_none(program):
    with torch.no_grad():
        program.student.conv1.weight[0] = float("nan")
    with pytest.raises(AnncvtError, match=r"conv1\.weight holds NaN"):
        verify.finite(program.student)


def test_trouble_in_training():
    assert verify.trouble_in_training(Residual(), (3, 8, 8)) is None
    network = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.Linear(4, 2))
    assert "Linear" in verify.trouble_in_training(network, (3, 9, 9)) or "mat1" in verify.trouble_in_training(
        network, (3, 9, 9)
    )
