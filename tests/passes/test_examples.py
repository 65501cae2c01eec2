"""A window of inputs gives the window of outputs, whatever the geometry; what is held out is not trained on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anncvt.nn import AdderConv1d, AdderConv2d, AdderLinear
from anncvt.passes.examples import HELD_OUT, WINDOW, batches, collect


@settings(max_examples=25, deadline=None)
@given(
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    side=st.integers(9, 24),
    seed=st.integers(0, 99),
)
def test_windows_of_inputs_give_windows_of_outputs(kernel, stride, padding, dilation, side, seed):
    generator = torch.Generator().manual_seed(seed)
    # float64 has no compiled kernels, of which every example would need two
    adder = AdderConv2d(3, 4, kernel, stride, padding, dilation).double()
    x = torch.randn(5, 3, side, side + 2, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        y = adder(x)
        train, _ = collect(adder, [(x, y, y + 1)], len(x), 1 << 30, generator)
        got = adder.response(train.inputs, is_padded=True)
    assert got.shape[2] <= WINDOW and got.shape[3] <= WINDOW
    torch.testing.assert_close(got, train.targets, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(train.residual, train.targets + 1)


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_other_paddings_and_one_dimension(mode):
    adder = AdderConv1d(2, 3, 3, padding=1, padding_mode=mode)
    x = torch.randn(4, 2, 20)
    with torch.no_grad():
        train, _ = collect(adder, [(x, adder(x), None)], 4, 1 << 30, torch.Generator())
        torch.testing.assert_close(adder.response(train.inputs, is_padded=True), train.targets)
    assert train.residual is None


@pytest.mark.parametrize("shape", [(6, 5), (6, 7, 5), (6, 2, 3, 5)])
def test_tokens_of_a_linear_layer_are_rows(shape):
    adder, x = AdderLinear(5, 4), torch.randn(shape)
    with torch.no_grad():
        train, _ = collect(adder, [(x, adder(x), adder(x))], len(x), 1 << 30, torch.Generator())
        assert train.inputs.shape[1:] == (5,)
        torch.testing.assert_close(adder.response(train.inputs, is_padded=True), train.targets)
    torch.testing.assert_close(train.residual, train.targets)


def test_memory_bounds_the_windows_and_every_image_has_some():
    adder = AdderConv2d(8, 8, 1)
    x = torch.arange(2 * HELD_OUT).float().view(-1, 1, 1, 1).expand(-1, 8, 64, 64).contiguous()
    sizes = []
    for memory in (1 << 18, 1 << 22):
        train, test = collect(adder, x_chunks(x), len(x), memory, torch.Generator().manual_seed(0))
        seen, judged = set(train.inputs[:, 0, 0, 0].tolist()), set(test.inputs[:, 0, 0, 0].tolist())
        assert seen | judged == set(map(float, range(2 * HELD_OUT))) and not seen & judged
        sizes.append(sum(t.numel() * 4 for part in (train, test) for t in (part.inputs, part.targets)))
        assert sizes[-1] <= memory
    assert sizes[1] > 4 * sizes[0]


def x_chunks(x):
    return [(part, part, None) for part in x.split(10)]


def test_batches_are_of_one_size_and_show_everything():
    adder = AdderConv2d(1, 1, 1)
    x = torch.arange(10.0).view(-1, 1, 1, 1)
    train, test = collect(adder, [(x, x, None)], 10, 1 << 20, torch.Generator())
    assert len(test) == len(train) == 10  # too few images to hold any out
    stream = batches(train, 5, torch.Generator().manual_seed(0))
    seen = [next(stream).inputs.flatten().tolist() for _ in range(2)]
    assert sorted(seen[0] + seen[1]) == list(map(float, range(10)))
    assert len(next(batches(train, 99, torch.Generator())).inputs) == 10
