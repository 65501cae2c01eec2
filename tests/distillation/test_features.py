import pytest
import torch

from anncvt.distillation.features import FeatureLoss


def _features(scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(8, channels, 5, 5, generator=generator) for channels in (4, 6)]


@pytest.mark.parametrize("kind", ["kernel", "mse"])
def test_equal_features_cost_nothing_and_different_ones_do(kind):
    loss = FeatureLoss([4, 6], kind)
    same, other = _features(), [feature.flip(0) for feature in _features()]
    assert loss(same, same).item() < 1e-6
    assert loss(same, other).item() > 0.5


def test_raw_sums_of_any_size_stay_finite():
    loss = FeatureLoss([4, 6])
    value = loss(_features(1e5), _features(1e-4))
    assert torch.isfinite(value)


def test_gradients_reach_the_student_the_maps_and_sigma_but_not_the_teacher():
    loss = FeatureLoss([4, 6])
    adders = [feature.requires_grad_() for feature in _features()]
    convolutions = [feature.flip(0).requires_grad_() for feature in _features()]
    loss(adders, convolutions).backward()
    assert all(feature.grad.abs().sum() > 0 for feature in adders)
    assert all(feature.grad is None for feature in convolutions)
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in loss.parameters())


def test_the_kernel_is_the_one_of_the_paper():
    """exp(u / (2 sigma^2)) of the standardised raw output, standardised again."""
    loss = FeatureLoss([4])
    with torch.no_grad():
        loss.log_sigma_adder.fill_(0.3)
        loss.log_sigma_conv.fill_(-0.2)
    a, c = _features()[0], _features()[0].flip(0)

    def standardise(x):
        return (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()

    sigma_a, sigma_c = torch.tensor(0.3).exp(), torch.tensor(-0.2).exp()
    g = standardise(torch.exp(standardise(a) / (2 * sigma_a**2)))
    h = standardise(torch.exp(standardise(c) / (2 * sigma_c**2)))
    torch.testing.assert_close(loss([a], [c]), (g - h).square().mean())


def test_large_batches_are_sampled():
    """Only every n-th image is compared, so the others get no gradient and cost nothing."""
    loss = FeatureLoss([1])
    adder = torch.randn(8, 1, 32, 64, requires_grad=True)
    loss([adder], [torch.randn(8, 1, 32, 64)]).backward()
    reached = adder.grad.abs().sum((1, 2, 3)) > 0
    assert reached.tolist() == [True, False, False, False, True, False, False, False]
