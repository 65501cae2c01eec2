"""The CUDA kernels against float64: the source that nvcc gets, run on the CPU, with the launcher that GPUs get."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import Case, cases

pytest.importorskip("tvm")

import cuda_emulator
from cuda_emulator import COMPILER, Emulator

from anncvt.runtime import reference
from anncvt.runtime.epilogue import Epilogue
from anncvt.runtime.kernels.cuda import launch, variant

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ compiles the kernels for the CPU")

KINDS = {
    "vectors": Case(channels=16, outputs=16, size=(9, 10)),
    "odd channels": Case(channels=5, outputs=7),
    "odd outputs alone": Case(channels=8, outputs=6),
    "more than a tile": Case(channels=20, outputs=36, size=(13, 12)),
    "stride 2": Case(channels=16, outputs=16, size=(8, 8), stride=(2, 2)),
    "stride beyond the kernel": Case(channels=4, size=(9, 9), kernel=(1, 2), stride=(3, 3), padding=(0, 0)),
    "four paddings": Case(padding=(2, 0, 1, 3), stride=(2, 1)),
    "dilated": Case(size=(9, 9), dilation=(2, 3), padding=(2, 3), stride=(2, 2)),
    "groups": Case(channels=8, outputs=4, groups=3),
    "few channels in groups": Case(channels=4, outputs=4, groups=2, kernel=(3, 2)),
    "depthwise": Case(channels=1, outputs=1, groups=20, stride=(2, 2), size=(9, 9)),
    "odd depthwise": Case(channels=1, outputs=1, groups=7, dilation=(2, 1)),
    "depthwise with multiplier": Case(channels=1, outputs=2, groups=6),
    "one pixel": Case(channels=8, outputs=16, size=(1, 1), kernel=(1, 1), padding=(0, 0)),
    "padding beyond the image": Case(size=(2, 2), padding=(4, 4)),
}


@pytest.fixture
def emulate(monkeypatch) -> Callable[..., Emulator]:
    """Make an :class:`Emulator` and put it in the driver's place. Of tiles there are only the smallest."""
    monkeypatch.setattr(variant, "TILES", {kind: tiles[-1:] for kind, tiles in variant.TILES.items()})

    def place(*arguments: object, **more: object) -> Emulator:
        emulator = Emulator(*arguments, **more)
        monkeypatch.setattr(launch, "driver", emulator)
        launch._room_of.cache_clear()
        return emulator

    yield place
    launch._room_of.cache_clear()


def results(case: Case, values: str = "normal", dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    x, weight, grad = case.tensors(values)
    x, grad, config = x.to(dtype), grad.to(dtype), case.arguments()
    return {
        "forward": launch.forward(x, weight, *config),
        "full": launch.input_gradient(grad, x, weight, *config, "full"),
        "exact": launch.input_gradient(grad, x, weight, *config, "exact"),
        "weights": launch.exact_weight_gradient(grad, x, weight, *config),
    }


def assert_right(case: Case, values: str = "normal", dtype: torch.dtype = torch.float32, tolerance=2e-6) -> None:
    x, weight, grad = case.tensors(values)
    x, grad, config = x.to(dtype), grad.to(dtype), case.arguments()
    exact, weights = reference.backward(grad, x, weight, *config, "exact")
    expected = {
        "forward": reference.forward(x, weight, *config),
        "full": reference.backward(grad, x, weight, *config, "full")[0],
        "exact": exact,
        "weights": weights,
    }
    for name, actual in results(case, values, dtype).items():
        wanted = expected[name]
        assert actual.dtype == (torch.float32 if name == "weights" else dtype)
        # of the largest entry; a half is rounded once
        limit = (2e-6 if name == "weights" else tolerance) * max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=limit, msg=lambda m, n=name: f"{n}\n{m}")


def epilogue_of(y: torch.Tensor, dtype: torch.dtype, *, added: bool = True, low=0.0, high=6.0) -> Epilogue:
    """One that moves the results ``y`` into the range of the limits, and beyond them on both sides."""
    random = torch.Generator().manual_seed(1)
    over = (0, 2, 3)
    scale = torch.rand(y.shape[1], generator=random) * 4 / (y.std(over, correction=0) + 1).float() * 2
    shift = 3 - scale * y.mean(over).float()
    residual = torch.randn(y.shape, generator=random).to(dtype) if added else None
    return Epilogue(scale, shift, residual, low, high)


def fused_reference(y: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """In float64, from the reference's ``y``."""
    scale, shift = (line.double().view(-1, 1, 1) for line in epilogue.lines.values())
    total = y * scale + shift + (0 if epilogue.residual is None else epilogue.residual.double())
    return total.clamp(epilogue.low, epilogue.high)


def assert_fused_right(case: Case, dtype: torch.dtype = torch.float32, tolerance=4e-6, **options) -> None:
    x, weight, _ = case.tensors()
    x, config = x.to(dtype), case.arguments()
    y = reference.forward(x, weight, *config)
    epilogue = epilogue_of(y, dtype, **options)
    actual, wanted = launch.fused_forward(x, weight, *config, epilogue), fused_reference(y, epilogue)
    assert actual.dtype == dtype
    # In units of what is added up, of which little may be left.
    size = max(1.0, (y * epilogue.scale.double().view(-1, 1, 1)).abs().max().item())
    torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_epilogue_of_each_kind(emulate, kind, added):
    emulated = emulate()
    assert_fused_right(KINDS[kind], added=added)
    assert sum(emulated.launched.values()) == 1


@pytest.mark.parametrize("kind", ["vectors", "odd channels", "groups", "depthwise"])
@pytest.mark.parametrize(("low", "high"), [(-math.inf, math.inf), (0.0, math.inf), (-1.5, 2.5)])
def test_limits_of_an_epilogue(emulate, kind, low, high):
    emulate()
    assert_fused_right(KINDS[kind], low=low, high=high)


@pytest.mark.parametrize("kind", ["vectors", "odd channels", "depthwise"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_epilogue_of_half_types_is_computed_in_float32(emulate, kind, dtype):
    """Rounded once, at the end: a sum of hundreds of distances, rounded before, would be off by more."""
    emulate()
    assert_fused_right(KINDS[kind], dtype, tolerance=torch.finfo(dtype).eps / 2 + 4e-6)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), places=st.sampled_from([1, 3, 40]), backwards=st.booleans(), added=st.booleans())
def test_an_epilogue_of_any_geometry(emulate, case, places, backwards, added):
    emulate(places, backwards)
    assert_fused_right(case, added=added)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [16, 14])
def test_an_epilogue_of_shared_taps_waits_for_their_sum(emulate, outputs, dtype):
    shared = emulate(8)
    case = Case(batch=1, channels=64, outputs=outputs, size=(4, 4))
    assert_fused_right(case, dtype, tolerance=max(4e-6, torch.finfo(dtype).eps))
    vector, name = 4 if outputs == 16 else 1, str(dtype).removeprefix("torch.")
    assert shared.launched == {
        f"forward_{name}_float32_{vector}_128x16": 1,
        f"finish_float32_{name}_{vector}_256x1": 1,
    }


def test_an_epilogue_keeps_what_is_no_number(emulate):
    emulate()
    case = KINDS["vectors"]
    x, weight, _ = case.tensors()
    x[1, 2, 5, 4] = float("nan")
    y = reference.forward(x, weight, *case.arguments())
    epilogue = epilogue_of(y.nan_to_num(-100.0), x.dtype)
    expected = fused_reference(y, epilogue)
    assert expected.isnan().any()
    actual = launch.fused_forward(x, weight, *case.arguments(), epilogue)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("values", ["normal", "grid"])
@pytest.mark.parametrize("kind", KINDS)
def test_parity_of_each_kind(emulate, kind, values):
    emulate()
    assert_right(KINDS[kind], values)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), places=st.sampled_from([1, 3, 40]), backwards=st.booleans())
def test_parity_of_any_geometry(emulate, case, places, backwards):
    emulate(places, backwards)
    assert_right(case)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), places=st.sampled_from([1, 3, 40]), backwards=st.booleans())
def test_parity_of_many_geometries(emulate, case, places, backwards):
    emulate(places, backwards)
    assert_right(case, "grid")


@pytest.mark.parametrize("kind", ["vectors", "odd channels", "depthwise"])
def test_the_order_of_threads_does_not_matter(emulate, kind):
    """Threads run from barrier to barrier in either order: one that read what another writes would see it or not."""
    emulate()
    there = results(KINDS[kind])
    emulate(backwards=True)
    back = results(KINDS[kind])
    for name in there:
        assert torch.equal(there[name], back[name]), name


def test_a_missing_barrier_is_found(emulate, monkeypatch):
    """What the tests above rely on. Each barrier of a dx is left out once: the loop's, and those around its sums."""
    whole, left_out = cuda_emulator.source, 0

    def without(chosen: variant.Variant) -> str:
        parts = whole(chosen).split("__syncthreads();")
        assert len(parts) == 4
        parts[left_out : left_out + 2] = ["".join(parts[left_out : left_out + 2])]
        return "__syncthreads();".join(parts)

    monkeypatch.setattr(cuda_emulator, "source", without)
    emulate()
    x, weight, grad = KINDS["vectors"].tensors()
    for left_out in range(3):  # noqa: B007 (``without`` reads it)
        cuda_emulator.compiled.cache_clear()
        with pytest.raises(AssertionError, match="met by several threads between two barriers"):
            launch.input_gradient(grad, x, weight, *KINDS["vectors"].arguments(), "full")
    cuda_emulator.compiled.cache_clear()


def test_few_channels_of_several_taps_share_a_step(emulate, monkeypatch):
    """A step is 16 channels wide: 6 taps of 4 channels are 2 steps, and not one for each tap."""
    emulated, steps = emulate(), []

    def launched(chosen, grid, tensors, numbers):
        steps.append(numbers["steps"])
        emulated.launch(chosen, grid, tensors, numbers)

    monkeypatch.setattr(launch, "driver", SimpleNamespace(launch=launched, multiprocessors=emulated.multiprocessors))
    x, weight, _ = KINDS["few channels in groups"].tensors()
    launch.forward(x, weight, *KINDS["few channels in groups"].arguments())
    assert steps == [2]


def test_blocks_share_the_taps_of_small_maps(emulate):
    case = Case(batch=1, channels=64, outputs=16, size=(4, 4))
    shared = emulate(8)
    assert_right(case)
    grids = shared.grids
    assert grids["forward_float32_float32_4_128x16"] == {(1, 1, 4)}
    assert grids["dw_float32_float32_4_16x16"] == {(36, 1, 1)}, "one step of pixels cannot be shared"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_summed_in_float32(emulate, dtype):
    emulate()
    assert_right(KINDS["vectors"], dtype=dtype, tolerance=torch.finfo(dtype).eps)


def test_infinities_and_nans_propagate(emulate):
    emulate()
    case = KINDS["vectors"]
    x, weight, _ = case.tensors()
    x[0, 1, 2, 2], x[1, 2, 5, 4] = float("inf"), float("nan")
    weight[3, 0, 1, 1] = -float("inf")
    actual = launch.forward(x, weight, *case.arguments())
    expected = reference.forward(x, weight, *case.arguments())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("magnitude", [1e-15, 1e12])
def test_exact_gradients_of_tiny_and_huge_values(emulate, magnitude):
    emulate()
    case = KINDS["vectors"]
    x, weight, grad = case.tensors("grid")
    x, weight, config = magnitude * x, magnitude * weight, case.arguments()
    expected_dx, expected_dw = reference.backward(grad, x, weight, *config, "exact")
    dx = launch.input_gradient(grad, x, weight, *config, "exact")
    torch.testing.assert_close(dx.double(), expected_dx, rtol=1e-5, atol=1e-5)
    dw = launch.exact_weight_gradient(grad, x, weight, *config)
    torch.testing.assert_close(dw.double(), expected_dw, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("places", [1, 40])
def test_integers_are_exact(emulate, kind, places):
    emulate(places)
    case = KINDS[kind]
    x, weight, _ = case.tensors()
    random = np.random.default_rng(0)
    a, w = (random.integers(0, 256, t.shape, np.uint8) for t in (x, weight))
    stride, padding, dilation, groups = case.arguments()
    top, left, bottom, right = (*padding, *padding) if len(padding) == 2 else padding
    padded = np.pad(a, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=200).astype(np.float64)
    expected = reference.forward(torch.from_numpy(padded), torch.from_numpy(w), stride, [0, 0], dilation, groups)
    given_ = (torch.from_numpy(a), torch.from_numpy(w), *case.arguments())
    assert torch.equal(launch.integer_forward(*given_, zero=200).double(), expected)


@pytest.mark.parametrize("limit", [2000, 2**31 - 1])
def test_batches_beyond_32_bit_indices_go_in_parts(emulate, monkeypatch, limit):
    monkeypatch.setattr(launch, "MOST_ELEMENTS", limit)
    emulated = emulate()
    case, pieces = replace(KINDS["vectors"], batch=3), 3 if limit == 2000 else 1
    assert_right(case)
    assert_fused_right(case)
    for kind in ("forward", "fused"):
        assert emulated.launched[f"{kind}_float32_float32_4_128x16"] == pieces


def test_an_image_beyond_32_bit_indices_is_refused(emulate, monkeypatch):
    monkeypatch.setattr(launch, "MOST_ELEMENTS", 1000)
    emulate()
    x, weight, _ = KINDS["vectors"].tensors()
    with pytest.raises(RuntimeError, match="images of 1000 values, not of 1440"):
        launch.forward(x, weight, *KINDS["vectors"].arguments())


def test_views_and_empty_batches(emulate):
    emulate()
    case = KINDS["vectors"]
    x, weight, _ = case.tensors()
    shifted = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    config = case.arguments()
    assert torch.equal(launch.forward(shifted, weight, *config), launch.forward(x, weight, *config))
    nothing = launch.forward(x[:0], weight, *config)
    assert nothing.shape == (0, 16, 9, 10)
    assert torch.equal(launch.exact_weight_gradient(nothing, x[:0], weight, *config), torch.zeros_like(weight))


EVERY = {each.name: each for each in variant.variants()}


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_every_kernel(emulate, monkeypatch, name):
    """Each compiled kernel, whatever the launcher would choose, on shapes that fill more than one of its tiles."""
    chosen = EVERY[name]
    tile = variant.TILES["forward"][-1] if chosen.kind == "finish" else chosen.tile
    monkeypatch.setattr(launch, "tile_for", lambda kind, columns: tile)
    parts = chosen.kind == "finish" or (chosen.out != chosen.dtype and chosen.kind in ("forward", "dx"))
    emulated = emulate(40 if parts else 1)
    wide = tile.columns + (4 if chosen.vector == 4 else 3)
    if chosen.kind.startswith("depthwise"):
        case = Case(batch=1, channels=1, outputs=1, groups=132 if chosen.vector == 4 else 33, size=(5, 6))
    else:
        summed = 132 if parts else wide if chosen.kind == "dw" else 20
        case = Case(batch=1, channels=summed - (chosen.vector == 1), outputs=wide, size=(11, 12))
        if chosen.kind == "dx":
            case = replace(case, channels=case.outputs, outputs=case.channels)
    if parts:
        case = replace(case, size=(3, 4))
    x, weight, grad = case.tensors()
    config = case.arguments()
    if chosen.kind == "integer":
        a, w = (t.mul(40).add(128).clamp(0, 255).to(torch.uint8) for t in (x, weight))
        expected = reference.forward(a.double(), w.double(), *config)
        if chosen.vector == 4:
            a, w = (torch.nn.functional.pad(t, (0, 0, 0, 0, 0, -case.channels % 16)) for t in (a, w))
        assert torch.equal(launch.integer_forward(a, w, *config).double(), expected)
    else:
        dtype = getattr(torch, chosen.out if chosen.kind == "finish" else chosen.dtype)
        x, grad = x.to(dtype), grad.to(dtype)
        slope, (dx, dw) = "exact", reference.backward(grad, x, weight, *config, "exact")
        y = reference.forward(x, weight, *config)
        epilogue = epilogue_of(y, dtype)
        fused = lambda: (launch.fused_forward(x, weight, *config, epilogue), fused_reference(y, epilogue))  # noqa: E731
        calls = {
            "forward": lambda: (launch.forward(x, weight, *config), y),
            "fused": fused,
            "finish": fused,
            "dx": lambda: (launch.input_gradient(grad, x, weight, *config, slope), dx),
            "dw": lambda: (launch.exact_weight_gradient(grad, x, weight, *config), dw),
        }
        actual, wanted = calls[chosen.kind.removeprefix("depthwise_")]()
        precision = 4e-6 if actual.dtype == torch.float32 else torch.finfo(dtype).eps
        limit = precision * max(1.0, wanted.abs().max().item())
        if chosen.kind in ("fused", "finish", "depthwise_fused"):  # in units of what is added up
            limit = precision * max(1.0, (y * epilogue.scale.double().view(-1, 1, 1)).abs().max().item())
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=limit)
    assert emulated.launched[name]
