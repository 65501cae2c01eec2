import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from anncvt.errors import AnncvtError
from anncvt.predict import predict
from anncvt.program import Preprocess, Program, Source


class Fixed(nn.Module):
    """The same scores for every image."""

    def __init__(self, *scores: float) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tensor([self.scores])


@pytest.fixture
def program():
    network = Fixed(1.0, 3.0, 2.0)
    return Program(Source("x"), Preprocess((3, 8, 8), (0.0,), (1.0,)), network, network, classes=["a", "b", "c"])


def test_classes_in_order_of_probability(program, picture):
    (found,) = predict(program, [picture], top=2)
    assert found["input"] == str(picture)
    assert [(row["class"], row["index"]) for row in found["top"]] == [("b", 1), ("c", 2)]
    expected = np.exp([3.0, 2.0]) / np.exp([1.0, 2.0, 3.0]).sum()
    assert [row["probability"] for row in found["top"]] == pytest.approx(expected)


def test_without_names_classes_are_numbers(program, picture):
    (found,) = predict(dataclasses.replace(program, classes=None), [picture])
    assert [row["class"] for row in found["top"]] == ["1", "2", "0"]


def test_refused(program, picture):
    with pytest.raises(AnncvtError, match="no such backend"):
        predict(program, [picture], backend="tensorrt")
    with pytest.raises(AnncvtError, match="no adder network"):
        predict(dataclasses.replace(program, student=None), [picture])


@pytest.mark.parametrize("options", [{"backend": "tvm"}, {"integers": True}])
def test_only_floats_in_torch_run_on_a_gpu(program, picture, options):
    with pytest.raises(AnncvtError, match="on the CPU, not on cuda"):
        predict(program, [picture], device="cuda", **options)
