"""Adder layers in 16-bit fixed point against the float64 reference: geometry, ranges, special values, networks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

tvm = pytest.importorskip("tvm")

from test_inference import blocked, layers, plain, run  # noqa: E402
from test_instructions import ONE, assembly, counts  # noqa: E402

from anncvt.nn import AdderConv2d  # noqa: E402
from anncvt.runtime import processor, reference  # noqa: E402
from anncvt.runtime.kernels import fixed_point  # noqa: E402
from anncvt.runtime.kernels.deployment import Deployment  # noqa: E402
from anncvt.runtime.kernels.layer import Layer  # noqa: E402
from anncvt.runtime.kernels.network import export, lower  # noqa: E402
from anncvt.runtime.kernels.tiling import Tiling, tiling  # noqa: E402

X86 = "x86_64"
#: The instruction sets with a form of their own, and which of them this processor has.
FORMS = {"avx2": ("avx2",), "avx512": ("avx2", "avx512bw"), "vnni": ("avx2", "avx512bw", "avx512vnni")}
HERE = [name for name, features in FORMS.items() if set(features) <= (processor.features() or frozenset())]
needs_form = pytest.mark.skipif(not HERE, reason="needs AVX2")


def run_layer(layer: Layer, form: str, x: np.ndarray, w: np.ndarray, cut: Tiling | None = None) -> np.ndarray:
    """``-sum |x-w|`` by the kernel, all lanes; ``layer`` has no activation."""
    chosen = fixed_point.form_of(X86, FORMS[form])
    constants = fixed_point.pack(layer, w, np.ones(layer.out_channels), np.zeros(layer.out_channels))
    residual = [np.zeros(layer.out_shape, np.float32)] if layer.residual else []
    function = fixed_point.build(layer, cut or tiling(layer, chosen.registers, vectors=chosen.vectors), chosen)
    return plain(run(function, blocked(x), *constants, *residual, out=layer.out_shape))


def expected(layer: Layer, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    a, b = torch.from_numpy(x).double(), torch.from_numpy(w).double()
    return reference.forward(a, b, layer.stride, layer.padding, layer.dilation, layer.groups).numpy()


def random(layer: Layer, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    x = spread * generator.standard_normal((layer.batch, layer.in_channels, *layer.size))
    w = generator.standard_normal((layer.out_channels, layer.in_channels // layer.groups, *layer.kernel))
    return x.astype(np.float32), w.astype(np.float32)


def step(w: np.ndarray) -> float:
    """The distance of two integers in the units of the weights."""
    return (max(w.max(), 0) - min(w.min(), 0)) / (2 * fixed_point.HALF)


def assert_close(layer: Layer, got: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    """Both operands are rounded: a tap is wrong by a step at most, and sums by much less, as errors are random."""
    error = np.abs(got[:, : layer.out_channels] - expected(layer, x, w))
    floats = 1e-6 * np.abs(expected(layer, x, w)).max()
    assert error.max() <= 3 * step(w) * w[0].size ** 0.5 + floats
    assert not got[:, layer.out_channels :].any(), "lanes beyond the last channel must be zero"


@needs_form
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(layers(), st.sampled_from(HERE))
def test_any_geometry_equals_reference(layer: Layer, form: str) -> None:
    layer = replace(layer, mode="fixed", blocked=True, activation=())
    if layer.per_lane:
        layer = replace(layer, groups=1)
    x, w = random(layer)
    assert_close(layer, run_layer(layer, form, x, w), x, w)


@needs_form
@pytest.mark.parametrize("form", HERE)
@pytest.mark.parametrize(
    "cut", [Tiling(2, 3, 1, 5, 3, vectors=2), Tiling(6, 1, 2, 2, 3), Tiling(3, 2, 3, 2, 3, vectors=2)]
)
def test_every_tiling(form: str, cut: Tiling) -> None:
    layer = Layer("fixed", 2, 40, (6, 13), 48, (3, 3), (1, 2), ONE)
    x, w = random(layer)
    assert_close(layer, run_layer(layer, form, x, w, cut), x, w)


@needs_form
@pytest.mark.parametrize("form", HERE)
@pytest.mark.parametrize("offset", [0.0, 3.0, -3.0])
def test_values_far_outside_the_range_of_the_weights(form: str, offset: float) -> None:
    """Weights may also lie on one side of zero; the padding is zero nevertheless."""
    layer = Layer("fixed", 1, 32, (7, 7), 32, (3, 3), padding=ONE)
    x, w = random(layer, spread=1e3)
    w += np.float32(offset)
    assert_close(layer, run_layer(layer, form, x, w), x, w)


@needs_form
def test_values_that_are_none_and_infinities_stay_what_they_are() -> None:
    layer = Layer("fixed", 1, 16, (4, 4), 16, (1, 1))
    x, w = random(layer)
    x[0, 3, 1, 1], x[0, 5, 2, 2], x[0, 5, 3, 3] = np.nan, np.inf, -np.inf
    got = run_layer(layer, HERE[0], x, w)
    assert np.isnan(got[..., 1, 1]).all()
    assert (got[..., 2, 2] == -np.inf).all() and (got[..., 3, 3] == -np.inf).all()
    assert np.isfinite(got).sum() == 16 * 13


@needs_form
def test_equal_operands_are_nothing() -> None:
    layer = Layer("fixed", 1, 16, (1, 1), 16, (1, 1))
    _, w = random(layer)
    got = run_layer(layer, HERE[0], w[:1], w)
    assert abs(got[0, 0, 0, 0]) <= 16 * step(w)


def suits(layer: Layer, w: np.ndarray, features: tuple[str, ...] = FORMS["vnni"], architecture: str = X86) -> bool:
    return fixed_point.suitable(layer, w, architecture, features)


def test_what_is_left_in_floats() -> None:
    dense = Layer("max", 1, 32, (7, 7), 32, (3, 3))
    _, w = random(dense)
    assert suits(dense, w) and suits(dense, w, FORMS["avx2"])
    assert not suits(dense, w, ("sse4.2",)) and not suits(dense, w, ("neon",), "aarch64")
    assert not suits(replace(dense, mode="conv"), w) and not suits(replace(dense, blocked=False), w)
    assert not suits(replace(dense, groups=32), w[:, :1]), "depthwise"
    outlier = w.copy()
    outlier[0, 0, 0, 0] = 1e3
    assert not suits(dense, outlier), "one weight stretches the range"
    assert not suits(dense, np.zeros_like(w)), "there is no range"


@pytest.mark.parametrize(
    ("target", "unasked", "asked"),
    [
        ("avx512", True, True),
        ("llvm -mcpu=znver4", True, True),
        ("llvm -mcpu=skylake-avx512", True, True),
        ("avx2", False, True),
        ("llvm -mcpu=x86-64", False, False),
        ("llvm -mtriple=aarch64-linux-gnu -mcpu=neoverse-n1", False, False),
    ],
)
def test_choice(target: str, unasked: bool, asked: bool) -> None:
    """Nobody has to ask for it with AVX-512; AVX2 gains too little."""
    deployment = Deployment.parse(target)
    found = [fixed_point.chosen(fixed, deployment.architecture, deployment.features) for fixed in (None, True, False)]
    assert found == [unasked, asked, False]


@pytest.mark.parametrize(
    ("target", "pair"),
    [
        ("avx2", ("vpmaxsw %ymm", "vpmaddwd %ymm")),
        ("avx512", ("vpmaxsw %zmm", "vpmaddwd %zmm")),
        ("llvm -mcpu=znver4", ("vpmaxsw %zmm", "vpdpwssd %zmm")),
    ],
)
def test_instructions(target: str, pair: tuple[str, str]) -> None:
    deployment = Deployment.parse(target)
    layer = Layer("fixed", 1, 64, (14, 14), 64, (3, 3), padding=ONE)
    text = assembly(fixed_point.generate(layer, deployment.architecture, deployment.features), deployment)
    assert min(counts(text, *pair)) >= 8 * 8, "a register tile, of eight pairs of channels"


@needs_form
def test_networks() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        AdderConv2d(32, 48, 3, padding=1),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        AdderConv2d(48, 48, 3, stride=2, groups=3),
        nn.BatchNorm2d(48),
        nn.Flatten(),
    )
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        network(torch.randn(16, 3, 9, 9))
        reference = network.eval().double()(x.double())
    network.float()
    results = []
    for fixed in (False, True):
        deployment = replace(Deployment.parse("cpu"), fixed=fixed)
        module, _, found = lower({"main": export(network, x.shape)}, deployment)
        assert ("int16" in module.script()) == found == fixed
        machine = tvm.relax.VirtualMachine(tvm.compile(module, deployment.target), tvm.cpu())
        results.append(torch.from_numpy(machine["main"](tvm.runtime.tensor(x.numpy())).numpy()).double())
    errors = [float((result - reference).abs().max() / reference.abs().max()) for result in results]
    assert errors[0] < 1e-5 and errors[1] < 3e-4
