"""Inference kernels against the float64 reference: geometry, groups, epilogues, tiles."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

tvm = pytest.importorskip("tvm")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from anncvt.runtime import processor, reference  # noqa: E402
from anncvt.runtime.geometry import NO_PADDING, Padding  # noqa: E402
from anncvt.runtime.kernels import elementwise, inference, layout, pooling  # noqa: E402
from anncvt.runtime.kernels.deployment import Deployment  # noqa: E402
from anncvt.runtime.kernels.layer import LANES, Layer, blocks  # noqa: E402
from anncvt.runtime.kernels.target import host  # noqa: E402
from anncvt.runtime.kernels.tiling import Tiling, tiling  # noqa: E402


def blocked(x: np.ndarray) -> np.ndarray:
    n, c, h, w = x.shape
    full = np.zeros((n, blocks(c) * LANES, h, w), np.float32)
    full[:, :c] = x
    return np.ascontiguousarray(full.reshape(n, -1, LANES, h, w).transpose(0, 1, 3, 4, 2))


def plain(y: np.ndarray) -> np.ndarray:
    """All lanes, those beyond the last channel included."""
    n, b, h, w, lanes = y.shape
    return y.transpose(0, 1, 4, 2, 3).reshape(n, b * lanes, h, w)


def run(function, *arrays: np.ndarray, out: tuple[int, ...]) -> np.ndarray:
    module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
    library = tvm.compile(module, host().target())
    y = tvm.runtime.tensor(np.full(out, np.nan, np.float32))
    library["kernel"](*(tvm.runtime.tensor(array) for array in arrays), y)
    return y.numpy()


#: Whether the innermost loops are assembly, where this processor can run it.
ASSEMBLY = [False, True] if {"avx2", "fma"} <= (processor.features() or frozenset()) else [False]


def run_layer(layer: Layer, cut: Tiling | None, assembly: bool) -> tuple[np.ndarray, np.ndarray]:
    """Result of the kernel (all lanes) and of the reference."""
    random = np.random.default_rng(0)
    x = random.standard_normal((layer.batch, layer.in_channels, *layer.size)).astype(np.float32)
    w = random.standard_normal((layer.out_channels, layer.in_channels // layer.groups, *layer.kernel)).astype(
        np.float32
    )
    scale, shift = random.standard_normal((2, layer.out_channels))
    residual = random.standard_normal((layer.batch, layer.out_channels, *layer.out_size)).astype(np.float32)
    constants = inference.pack(layer, w, scale, shift)
    extra = [blocked(residual)] if layer.residual else []
    function = inference.build(layer, cut or tiling(layer, 5 if assembly else 16, linear=True), assembly)
    got = run(function, blocked(x) if layer.blocked else x, *constants, *extra, out=layer.out_shape)

    a, b = torch.from_numpy(x).double(), torch.from_numpy(w).double()
    pad = layer.padding
    if layer.mode == "conv":
        padded = F.pad(a, (pad.left, pad.right, pad.top, pad.bottom))
        y = F.conv2d(padded, b, stride=layer.stride, dilation=layer.dilation, groups=layer.groups)
    else:
        y = reference.forward(a, b, layer.stride, pad, layer.dilation, layer.groups)
    y = y * torch.from_numpy(scale).view(-1, 1, 1) + torch.from_numpy(shift).view(-1, 1, 1)
    if layer.residual:
        y = y + torch.from_numpy(residual)
    if layer.activation:
        y = {"relu": F.relu, "clamp": F.relu6, "sigmoid": torch.sigmoid}[layer.activation[0]](y)
    return plain(got), y.numpy()


def assert_layer(layer: Layer, cut: Tiling | None = None, assembly: bool = False) -> None:
    got, expected = run_layer(layer, cut, assembly)
    count = layer.out_channels
    assert np.abs(got[:, :count] - expected).max() <= 2e-6 * np.abs(expected).max() + 1e-6
    assert not got[:, count:].any(), "lanes beyond the last channel must be zero"


@st.composite
def layers(draw) -> Layer:
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels, outputs = (draw(st.sampled_from([1, 5, 16, 20])) * groups for _ in range(2))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    return Layer(
        draw(st.sampled_from(["max", "abs", "conv"])),
        draw(st.integers(1, 2)),
        channels,
        (reach[0] + draw(st.integers(0, 9)), reach[1] + draw(st.integers(0, 9))),
        outputs,
        kernel,
        draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        Padding(*(draw(st.integers(0, 2)) for _ in range(4))),
        dilation,
        groups,
        draw(st.sampled_from([(), ("relu",), ("clamp", 0.0, 6.0), ("sigmoid",)])),
        draw(st.booleans()),
        groups > 1 or draw(st.booleans()),
    )


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(layers(), st.sampled_from(ASSEMBLY))
def test_any_geometry_equals_reference(layer: Layer, assembly: bool) -> None:
    assert_layer(layer, assembly=assembly)


@pytest.mark.parametrize("assembly", ASSEMBLY)
@pytest.mark.parametrize("mode", ["max", "conv"])
@pytest.mark.parametrize(
    "cut",
    [
        Tiling(3, 2, 1, 5, 1),
        Tiling(6, 1, 2, 2, 3),
        Tiling(2, 3, 1, 3, 2, linear=True),
        Tiling(3, 2, 1, 5, 3, linear=True),
    ],
)
@pytest.mark.parametrize("dilation", [1, 2])
def test_cuts_in_one_and_several_passes(mode: str, cut: Tiling, dilation: int, assembly: bool) -> None:
    window = {"stride": (1, 2), "padding": Padding(2, 1, 0, 2), "dilation": (1, dilation)}
    assert_layer(Layer(mode, 2, 40, (6, 13), 48, (3, 3), **window, activation=("relu",)), cut, assembly)


@pytest.mark.parametrize("mode", ["max", "conv"])
@pytest.mark.parametrize(
    ("channels", "outputs", "groups"),
    [(32, 64, 2), (40, 40, 40), (24, 48, 24), (24, 36, 6)],
    ids=["blocks of 16", "depthwise", "depthwise times two", "small groups"],
)
def test_groups(mode: str, channels: int, outputs: int, groups: int) -> None:
    assert_layer(Layer(mode, 1, channels, (9, 8), outputs, (3, 3), (2, 1), Padding(1, 1, 1, 1), groups=groups))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(7, 2, 1, 13), (3, 1, 1, 5), (7, 2, 3, 4), (5, 2, 2, 7)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_every_cut_computes_every_pixel(sizes: tuple[int, ...], kernel: int, depth: int) -> None:
    side = kernel // 2
    cut = Tiling(sizes[0], sizes[1], sizes[2], min(sizes[3], 7) if kernel > 1 else sizes[3], depth)
    cut = cut if kernel > 1 else replace(cut, height=1)
    layer = Layer("max", 1, 48, (7, 7), 32, (kernel, kernel), padding=Padding(side, side, side, side), residual=True)
    for assembly in ASSEMBLY:
        if not assembly or cut.height * cut.width <= 5:
            assert_layer(layer, cut, assembly)


def test_padding_counts_as_zero_pixels() -> None:
    layer = Layer("max", 1, 16, (1, 1), 16, (3, 3), padding=Padding(1, 1, 1, 1))
    w = np.ones((16, 16, 3, 3), np.float32)
    constants = inference.pack(layer, w, np.ones(16), np.zeros(16))
    got = run(
        inference.build(layer, tiling(layer, 16)), np.ones(layer.in_shape, np.float32), *constants, out=layer.out_shape
    )
    assert (got == -8 * 16).all()  # eight padded taps of |0 - 1| per channel, one of |1 - 1|


def test_abs_is_exact_where_max_cancels() -> None:
    values = np.full((1, 16, 1, 1), 2.0**20, np.float32)
    w = values[0][None].repeat(16, 0).reshape(16, 16, 1, 1) + np.float32(0.125)
    layer = Layer("abs", 1, 16, (1, 1), 16, (1, 1))
    constants = inference.pack(layer, w, np.ones(16), np.zeros(16))
    got = run(inference.build(layer, tiling(layer, 16)), blocked(values), *constants, out=layer.out_shape)
    assert (got == -16 * 0.125).all()


def test_tiles_go_on_in_the_next_line_where_lines_are_short() -> None:
    def chosen(side: int, linear: bool) -> Tiling:
        return tiling(Layer("max", 1, 512, (side, side), 512, (3, 3), padding=Padding(1, 1, 1, 1)), 5, linear)

    assert chosen(7, True).linear and not chosen(7, False).linear and not chosen(28, True).linear
    for target in ("avx512", "avx2"):
        layer = Layer("max", 1, 512, (7, 7), 512, (3, 3), padding=Padding(1, 1, 1, 1))
        assert Deployment.parse(target).cut(layer).linear


@pytest.mark.parametrize("accumulators", [3, 5, 16])
def test_tiling_fits_registers(accumulators: int) -> None:
    for size, kernel in [((56, 56), 3), ((7, 7), 1), ((17, 19), 3), ((1, 1), 1), ((149, 149), 3)]:
        pad = kernel // 2
        cut = tiling(Layer("max", 1, 64, size, 64, (kernel, kernel), padding=Padding(*[pad] * 4)), accumulators)
        assert 1 <= cut.height * cut.width <= accumulators
        assert 1 <= cut.rows <= size[0]
        assert 1 <= cut.out_blocks <= 4
        assert 1 <= cut.depth <= 4


def test_block_and_unblock_are_inverse() -> None:
    x = np.random.default_rng(0).standard_normal((2, 19, 3, 4)).astype(np.float32)
    there = run(layout.block(x.shape), x, out=layout.blocked_shape(x.shape))
    np.testing.assert_array_equal(there, blocked(x))
    np.testing.assert_array_equal(run(layout.unblock(x.shape), there, out=x.shape), x)


def test_concatenation_of_unaligned_channels() -> None:
    random = np.random.default_rng(0)
    parts = [random.standard_normal((2, c, 2, 3)).astype(np.float32) for c in (5, 30, 16, 1)]
    function = layout.concatenate(2, (5, 30, 16, 1), (2, 3))
    got = plain(run(function, *map(blocked, parts), out=layout.blocked_shape((2, 52, 2, 3))))
    np.testing.assert_array_equal(got[:, :52], np.concatenate(parts, 1))
    assert not got[:, 52:].any()


@pytest.mark.parametrize("start", [0, 16, 3])
def test_window_slices_strides_and_pads(start: int) -> None:
    x = np.random.default_rng(0).standard_normal((1, 40, 6, 7)).astype(np.float32)
    axes = (
        layout.Axis.whole(40).slice(start, 40, 1).pad(2, 3),
        layout.Axis.whole(6).slice(1, 6, 2),
        layout.Axis.whole(7).pad(1, 2).slice(0, 10, 2),
    )
    view = layout.Window(1, (40, 6, 7), axes, 0.5)
    expected = np.pad(x[:, start:, 1::2], ((0, 0), (2, 3), (0, 0), (1, 2)), constant_values=0.5)[..., ::2]
    got = plain(run(layout.window(view), blocked(x), out=layout.blocked_shape(view.shape)))
    assert view.shape == expected.shape
    np.testing.assert_array_equal(got[:, : expected.shape[1]], expected)
    assert not got[:, expected.shape[1] :].any()


@pytest.mark.parametrize(
    ("module", "spec"),
    [
        (
            torch.nn.MaxPool2d(3, 2, 1),
            {"mode": "max", "kernel": (3, 3), "stride": (2, 2), "padding": Padding(1, 1, 1, 1)},
        ),
        (
            torch.nn.MaxPool2d(2, 1, 1, dilation=2),
            {"mode": "max", "kernel": (2, 2), "padding": Padding(1, 1, 1, 1), "dilation": (2, 2)},
        ),
        (torch.nn.MaxPool2d(3, 2, ceil_mode=True), {"mode": "max", "kernel": (3, 3), "stride": (2, 2)}),
        (
            torch.nn.AvgPool2d(3, 2, 1),
            {"mode": "mean", "kernel": (3, 3), "stride": (2, 2), "padding": Padding(1, 1, 1, 1)},
        ),
        (
            torch.nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
            {
                "mode": "mean",
                "kernel": (3, 3),
                "stride": (2, 2),
                "padding": Padding(1, 1, 1, 1),
                "count_padding": False,
            },
        ),
        (torch.nn.AvgPool2d(2, divisor_override=3), {"mode": "mean", "kernel": (2, 2), "stride": (2, 2), "divisor": 3}),
        (torch.nn.AdaptiveAvgPool2d((3, 4)), {"mode": "mean"}),
        (torch.nn.AdaptiveAvgPool2d(1), {"mode": "mean"}),
    ],
    ids=lambda value: str(value) if isinstance(value, torch.nn.Module) else "",
)
def test_pooling_equals_torch(module: torch.nn.Module, spec: dict) -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 20, 8, 9)).astype(np.float32)) - 3
    expected = module(x).numpy()
    pool = pooling.Pool(batch=1, channels=20, size=(8, 9), out_size=expected.shape[2:], **spec)
    got = plain(run(pooling.build(pool), blocked(x.numpy()), out=pool.out_shape))
    np.testing.assert_allclose(got[:, :20], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "activation", ["sigmoid", "silu", "hardswish", "hardsigmoid", "tanh", "gelu", "elu", "leaky_relu"]
)
def test_activations_equal_torch(activation: str) -> None:
    x = np.linspace(-9, 9, 20 * 6, dtype=np.float32).reshape(1, 20, 2, 3)
    spec = elementwise.Elementwise(1, 20, (2, 3), affine=False, activation=(activation,))
    got = plain(run(elementwise.build(spec), blocked(x), out=spec.shape))
    expected = getattr(F, activation, torch.sigmoid)(torch.from_numpy(x).double()).numpy()
    np.testing.assert_allclose(got[:, :20], expected, rtol=2e-6, atol=3e-7)
    assert not got[:, 20:].any()


def test_gate_multiplies_every_pixel_of_a_channel() -> None:
    random = np.random.default_rng(0)
    x, gate = random.standard_normal((2, 20, 3, 3)), random.standard_normal((2, 20, 1, 1))
    spec = elementwise.Elementwise(2, 20, (3, 3), "mul", 1, affine=False)
    arrays = (blocked(x.astype(np.float32)), blocked(gate.astype(np.float32)))
    got = plain(run(elementwise.build(spec), *arrays, out=spec.shape))
    np.testing.assert_allclose(got[:, :20], x * gate, rtol=1e-5, atol=1e-6)


def test_no_padding_is_four_zeros() -> None:
    assert Layer("conv", 1, 16, (4, 4), 16, (1, 1)).padding == NO_PADDING == (0, 0, 0, 0)
