"""Integer layers called with arrays: numpy and torch, batches, what is refused, the kernels' cache."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tvm")

from integers import Case, case

from anncvt.errors import AnncvtError
from anncvt.runtime.geometry import Padding
from anncvt.runtime.kernels import cache, integer_launch
from anncvt.runtime.kernels.integer_launch import IntegerOperator, from_blocks, to_blocks
from anncvt.runtime.kernels.integer_layer import IntegerLayer
from anncvt.runtime.kernels.integer_pack import Requantisation

LAYER = IntegerLayer("adder", 20, (9, 8), 18, (3, 3), (2, 1), Padding(1, 0, 2, 1), residual=True)


def operator(given: Case) -> IntegerOperator:
    layer = given.layer
    return IntegerOperator(
        given.weight,
        mode=layer.mode,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        zero=given.zero,
        end=given.end,
    )


def test_full_range() -> None:
    given = case(dataclasses.replace(LAYER, clamped=False))
    np.testing.assert_array_equal(operator(given)(given.x, given.residual), given.expected)


@pytest.mark.parametrize("batch", [1, 3, 256])
def test_numpy_and_torch_for_any_batch_with_one_kernel(batch: int) -> None:
    given = case(LAYER, batch=batch)
    assert given.residual is not None
    layer, before = operator(given), cache.counts.copy()
    y = layer(given.x, given.residual)
    np.testing.assert_array_equal(y, given.expected)
    got = layer(torch.from_numpy(given.x), torch.from_numpy(given.residual))
    assert got.dtype == torch.uint8
    np.testing.assert_array_equal(got, given.expected)
    assert sum((cache.counts - before).values()) <= 1


@pytest.mark.parametrize("mode", ["adder", "conv"])
def test_sums_without_requantisation(mode: str) -> None:
    given = case(dataclasses.replace(LAYER, mode=mode, groups=2, result="int32", residual=False), batch=2)
    y = operator(given)(given.x)
    assert y.dtype == np.int32
    np.testing.assert_array_equal(y, given.expected)


def test_no_images() -> None:
    given = case(dataclasses.replace(LAYER, residual=False))
    assert operator(given)(given.x[:0]).shape == (0, 18, *LAYER.out_size)


def test_strided_and_unaligned_inputs() -> None:
    given = case(dataclasses.replace(LAYER, residual=False))
    wide = np.zeros((*given.x.shape[:-1], 2 * given.x.shape[-1]), np.uint8)
    wide[..., ::2] = given.x
    np.testing.assert_array_equal(operator(given)(wide[..., ::2]), given.expected)
    image = to_blocks(torch.from_numpy(given.x))
    shifted = torch.empty(image.numel() + 1, dtype=torch.uint8)[1:].view(image.shape).copy_(image)
    out = torch.empty(1 + 2 * 16 * LAYER.out_size[0] * LAYER.out_size[1], dtype=torch.uint8)[1:]
    y = operator(given).run(shifted, 20, out=out.view(1, *LAYER.out_shape))
    np.testing.assert_array_equal(from_blocks(y, 18), given.expected)
    assert y.data_ptr() == out.data_ptr()


def test_batches_beyond_the_index_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer_launch, "_MOST_ELEMENTS", 2 * LAYER.out_size[0] * LAYER.out_size[1] * 32)
    given = case(LAYER, batch=5)
    np.testing.assert_array_equal(operator(given)(given.x, given.residual), given.expected)


def test_kernels_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANNCVT_CACHE", str(tmp_path))
    given = case(dataclasses.replace(LAYER, residual=False, size=(5, 5)))
    before = cache.counts.copy()
    for _ in range(2):
        cache.clear()
        np.testing.assert_array_equal(operator(given)(given.x), given.expected)
    assert cache.counts - before == {"compiled": 1, "loaded": 1}


@pytest.mark.parametrize("change", [{"shift": 0}, {"shift": 32}, {"low": -1}, {"high": 256}, {"low": 9, "high": 8}])
def test_requantisation_out_of_range(change: dict) -> None:
    ones = np.ones(2, np.int32)
    with pytest.raises(AnncvtError, match="shift"):
        Requantisation(**{"multiplier": ones, "offset": ones.astype(np.int64), "shift": 8, **change})


def test_sums_that_may_not_fit_are_refused() -> None:
    with pytest.raises(AnncvtError, match="zero point 256"):
        IntegerOperator(np.zeros((1, 1, 1, 1), np.uint8), zero=256)
    with pytest.raises(AnncvtError, match="taps"):
        IntegerOperator(np.zeros((1, 1 << 16, 9, 8), np.uint8), end=None)
    end = Requantisation(np.full(1, 2**31 - 1, np.int32), np.full(1, 3 * 2**61, np.int64), 8)
    with pytest.raises(AnncvtError, match="int64"):
        IntegerOperator(np.zeros((1, 1 << 22, 1, 1), np.uint8), end=end)
