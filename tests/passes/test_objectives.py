import pytest
import torch
import torch.nn.functional as F

from anncvt.errors import AnncvtError
from anncvt.passes.objectives import backward, divergence, output_loss, unexplained


def test_divergence_is_the_temperature_scaled_kl():
    got, wanted = torch.randn(6, 5), torch.randn(6, 5)
    p, q = F.softmax(wanted / 3, 1), F.softmax(got / 3, 1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(divergence(got, wanted, 3.0), expected)
    assert float(divergence(wanted, wanted, 3.0)) == pytest.approx(0, abs=1e-6)


def test_divergence_averages_over_pixels():
    got, wanted = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    flat = divergence(got.movedim(1, 3).flatten(0, 2), wanted.movedim(1, 3).flatten(0, 2), 2.0)
    torch.testing.assert_close(divergence(got, wanted, 2.0), flat)


def test_unexplained_is_zero_for_equal_and_one_for_the_mean():
    wanted = torch.randn(1000)
    assert float(unexplained(wanted, wanted)) == 0
    assert float(unexplained(wanted.mean().expand(1000), wanted)) == pytest.approx(1, abs=0.01)


def test_the_loss_of_several_outputs_is_the_sum_over_those_that_can_be_compared():
    scores, single = torch.randn(2, 6, 5), torch.randn(2, 6)
    boxes = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4)
    mine = {"out": scores[0].requires_grad_(), "depth": single[0].requires_grad_(), "boxes": boxes[0], "best": 3}
    other = {"out": scores[1], "depth": single[1], "boxes": boxes[1], "best": 4}
    expected = divergence(scores[0], scores[1], 2.0) + unexplained(single[0], single[1])
    torch.testing.assert_close(output_loss(mine, other, 2.0), expected)
    assert not output_loss([boxes[0]], [boxes[1]], 2.0).requires_grad


@pytest.mark.parametrize("damage", [lambda x, y: x.mul_(2), lambda x, y: y.detach_()])
def test_a_network_that_lets_no_gradient_through_is_an_error(damage):
    x = torch.randn(3, requires_grad=True) * 1
    y = x.square()
    damage(x, y)
    with pytest.raises(AnncvtError, match="cannot be trained"):
        backward(y.sum())
    with pytest.raises(RuntimeError, match="scalar"):
        backward(torch.randn(3, requires_grad=True) * 1)
