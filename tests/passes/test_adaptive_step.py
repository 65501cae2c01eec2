import math

import pytest
import torch
from torch import nn

from anncvt.passes.adaptive_step import adaptive_adder_step


def test_every_layer_takes_a_step_of_the_same_size():
    weights = [nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(10))]
    weights[0].grad, weights[1].grad = 1e-6 * torch.randn(4, 3), 1e6 * torch.randn(10)
    directions = [weight.grad / weight.grad.norm() for weight in weights]
    adaptive_adder_step(weights, eta=0.2)
    for weight, direction in zip(weights, directions, strict=True):
        assert float(weight.grad.norm()) == pytest.approx(0.2 * math.sqrt(weight.numel()), rel=1e-5)
        torch.testing.assert_close(weight.grad / weight.grad.norm(), direction)


def test_missing_and_zero_gradients_are_left_alone():
    idle, still = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    still.grad = torch.zeros(2)
    adaptive_adder_step([idle, still], eta=0.2)
    assert idle.grad is None
    assert torch.equal(still.grad, torch.zeros(2))
