import math

import pytest
import torch

from anncvt.distributions import BINS, distribution, standardised


def sample(name, count=50_000):
    torch.manual_seed(0)
    maker = {"gaussian": torch.distributions.Normal, "laplace": torch.distributions.Laplace}[name]
    return maker(3.0, 2.0).sample((count,))


@pytest.mark.parametrize("name", ["gaussian", "laplace"])
def test_what_fits_is_told(name):
    found = distribution(sample(name))
    other = {"gaussian": found.laplace, "laplace": found.gaussian}[name]
    assert getattr(found, name) > other + 0.03
    assert found.median == pytest.approx(3, abs=0.05)
    if name == "laplace":
        assert found.spread == pytest.approx(2, rel=0.02)
    else:
        assert found.deviation == pytest.approx(2, rel=0.02)


def test_likelihoods_are_those_of_the_fitted_distributions():
    x = sample("laplace", 2000).double()
    found = distribution(x)
    gaussian = torch.distributions.Normal(found.mean, found.deviation).log_prob(x).mean()
    laplace = torch.distributions.Laplace(found.median, found.spread).log_prob(x).mean()
    assert found.gaussian == pytest.approx(float(gaussian)) and found.laplace == pytest.approx(float(laplace))


def test_the_density_integrates_to_one():
    found = distribution(sample("laplace"))
    assert len(found.density) == BINS
    assert math.isclose(sum(found.density) * (found.high - found.low) / BINS, 1)


def test_constants_have_none():
    assert distribution(torch.ones(5)) is None and distribution(torch.zeros(0)) is None


def test_standardising_puts_layers_on_one_scale():
    found = standardised([sample("gaussian") * 100, sample("gaussian"), torch.ones(3)])
    assert len(found) == 100_000
    assert float(found.mean()) == pytest.approx(0, abs=1e-6) and float(found.std()) == pytest.approx(1, abs=1e-3)
