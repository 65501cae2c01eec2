"""The regression is the least of the error that it says it minimises, for every group, and dead channels do no harm."""

import pytest
import torch

from anncvt.passes.regression import PENALTIES, REMAINDERS, regressions


def _problem(groups=1, outputs=5, taps=6, places=400):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(groups, taps, taps, generator=generator)
    x = mixing @ torch.randn(groups, taps, places, generator=generator) + 2
    prior = torch.randn(groups, outputs, taps, generator=generator)
    z = 3 * prior @ x + torch.randn(groups, outputs, places, generator=generator) - 1
    return x, z, prior


@pytest.mark.parametrize("copies", [1, 2, 3, 4])
def test_each_is_the_least_of_its_own_error(copies):
    x, z, prior = _problem(groups=2)
    found = list(regressions(x, z, prior, copies))
    assert len(found) == len(PENALTIES)
    for weight, (shrink, pull) in zip(found, PENALTIES, strict=True):
        for group in range(2):
            a, b = (t[group].double() - t[group].double().mean(1, keepdim=True) for t in (x, z))
            deviation = a.square().mean(1).sqrt()
            like = prior[group].double() @ a
            scaled = prior[group].double() * ((like * b).mean(1) / like.square().mean(1))[:, None]
            rows = [
                a.T / a.shape[1] ** 0.5,
                torch.diag((shrink * REMAINDERS[copies - 1]) ** 0.5 * deviation),
                torch.diag(pull**0.5 * deviation),
            ]
            wanted = [b.T / a.shape[1] ** 0.5, torch.zeros(6, 5), pull**0.5 * deviation[:, None] * scaled.T]
            expected = torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted).double()).solution.T
            torch.testing.assert_close(weight[group].double(), expected, rtol=1e-4, atol=1e-4)


def test_what_arrives_with_errors_counts_less():
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(1, 2, 5000, generator=generator)
    prior = torch.ones(1, 1, 2)
    noisy = clean.clone()
    noisy[:, 1] += 2 * torch.randn(5000, generator=generator)
    weight = next(regressions(noisy, prior @ clean, prior, 4))
    assert 3 < float(weight[0, 0, 0] / weight[0, 0, 1]) < 7  # 5 by the variances


def test_channels_that_never_vary_do_no_harm():
    x, z, prior = _problem()
    x[:, 2] = 0
    for weight in regressions(x, z, prior, 1):
        assert weight.isfinite().all() and float(weight[0, :, 2].abs().max()) < 10 * float(weight.abs().max())
    for weight in regressions(torch.zeros_like(x), z, prior, 1):
        assert weight.isfinite().all()
