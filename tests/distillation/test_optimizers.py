import pytest
import torch
from torch import nn

from anncvt.distillation.config import DistillConfig
from anncvt.distillation.optimizers import Descent


class Toy(nn.Module):
    """One adder weight (by declaration), one convolution's, one bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.adder = nn.Parameter(torch.randn(6, 4))
        self.conv = nn.Parameter(torch.randn(3, 6))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return x @ self.adder.T @ self.conv.T + self.bias


def moved(parts=1, scale=1.0, **settings):
    """How far each parameter of a toy goes in one step on eight inputs, in ``parts``."""
    toy, config = Toy(), DistillConfig(lr=0.1, momentum=0.0, **settings).settled()
    before = [parameter.detach().clone() for parameter in toy.parameters()]
    descent = Descent(toy.parameters(), [toy.adder], config.lr, config, torch.device("cpu"))
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    for part in x.chunk(parts):
        descent.backward(scale * toy(part).square().mean() / parts)
    descent.step(1.0)
    return [parameter.detach() - start for parameter, start in zip(toy.parameters(), before, strict=True)]


@pytest.mark.parametrize("settings", [{"parts": 4}, {"precision": "fp16"}, {"parts": 2, "precision": "fp16"}])
def test_parts_and_loss_scaling_change_nothing(settings):
    """The adaptive step sees gradients that are summed and unscaled."""
    for got, expected in zip(moved(weight_decay=0.0, **settings), moved(weight_decay=0.0), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


def test_the_step_of_an_adder_is_lr_times_eta_however_large_the_loss():
    for optimizer, eta in (("sgd", 0.3), ("adamw", 0.3)):
        for scale in (1e-3, 1e3):
            step = moved(scale=scale, optimizer=optimizer, eta=eta, weight_decay=0.0)[0]
            assert float(step.square().mean().sqrt()) == pytest.approx(0.1 * eta, rel=1e-3)


def test_only_what_is_no_adder_is_clipped_and_decays():
    adder, conv, bias = moved(clip_grad=1e-9, weight_decay=0.5, eta=0.3)
    toy = Toy()
    assert float(adder.square().mean().sqrt()) == pytest.approx(0.1 * 0.3, rel=1e-3)
    torch.testing.assert_close(conv, -0.1 * 0.5 * toy.conv.detach(), rtol=1e-3, atol=1e-6)
    assert float(bias.abs().max()) < 1e-8


def test_a_step_with_gradients_that_overflowed_is_left_out():
    toy, config = Toy(), DistillConfig(precision="fp16").settled()
    descent = Descent(toy.parameters(), [toy.adder], 0.1, config, torch.device("cpu"))
    start = [parameter.detach().clone() for parameter in toy.parameters()]
    descent.backward(toy(torch.full((2, 4), 1e30)).square().mean())
    descent.step(1.0)
    assert all(torch.equal(a, b) for a, b in zip(toy.parameters(), start, strict=True))
    descent.zero_grad()
    descent.backward(toy(torch.ones(2, 4)).square().mean())
    descent.step(1.0)
    assert not torch.equal(toy.adder, start[0])
