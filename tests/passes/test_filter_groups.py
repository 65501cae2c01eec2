import torch
from hypothesis import example, given
from hypothesis import strategies as st

from anncvt.passes.filter_groups import filter_groups


def test_filters_of_like_size_come_together():
    size = torch.tensor([1.0, 10.0, 1.1, 5.0, 9.5, 5.2])
    weight = size[:, None] * torch.tensor([[0.5, -1.0]])
    assert filter_groups(weight, 3).tolist() == [0, 2, 0, 1, 2, 1]


@example([0.0, 0.0, 0.0, 0.0, 1.0, 3.0, 1e-30], 4)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=20), st.integers(1, 6))
def test_groups_are_intervals_and_none_is_empty(sizes, groups):
    weight = torch.tensor(sizes).view(-1, 1, 1, 1)
    found = filter_groups(weight, groups)
    assert found.unique().tolist() == list(range(int(found.max()) + 1)) and int(found.max()) < groups
    order = weight.flatten().argsort()
    assert bool((found[order].diff() >= 0).all())
