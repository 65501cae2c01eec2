"""Inputs mixed of two images keep what norms and adders depend on."""

from __future__ import annotations

import torch

from anncvt.passes.fit_blocks import BlockFit
from anncvt.passes.mixing import BlockExamples, Mixer


def test_means_and_covariances_are_kept():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 3, generator=generator)
    x = torch.einsum("ncl,dc->ndl", torch.randn(4000, 3, 4, generator=generator), root) + torch.tensor(
        [[5.0], [-2], [0]]
    )
    mixer = Mixer(BlockExamples(x, 2 * x, x), torch.arange(len(x)))
    theirs, mine = mixer.mixed(torch.arange(len(x)), generator)
    columns, mixed = (t.transpose(0, 1).flatten(1) for t in (x, theirs))
    torch.testing.assert_close(mixed.mean(1), columns.mean(1), atol=0.1, rtol=0)
    torch.testing.assert_close(mixed.cov(), columns.cov(), atol=0.1, rtol=0.1)
    torch.testing.assert_close(mine, 2 * theirs)  # the same pairs, in the same proportions
    assert not torch.equal(theirs, x)


def test_nothing_is_below_zero_behind_a_relu():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 4, 4, generator=generator).relu()
    theirs, _ = Mixer(BlockExamples(x, x, x), torch.arange(64)).mixed(torch.arange(64), generator)
    assert theirs.min() >= 0


def test_images_held_out_are_not_mixed_in():
    x = torch.ones(8, 1, 2, 2)
    x[4:] = torch.nan
    theirs, mine = Mixer(BlockExamples(x, x, x), torch.arange(4)).mixed(torch.arange(4), torch.Generator())
    assert theirs.isfinite().all() and mine.isfinite().all()


def test_the_fewer_targets_the_more_is_mixed():
    how = BlockFit()
    assert how.mixed(targets=10**9, weights=10**5) == 0
    assert 0 < how.mixed(targets=10**6, weights=4 * 10**4) < how.mixed(targets=10**6, weights=10**5) <= how.most_mixed
