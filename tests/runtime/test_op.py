"""The registered op: parity with float64 through autograd, registration, tracing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from parity import Case, assert_parity, cases, op

from anncvt.nn import AdderConv2d
from anncvt.runtime import reference

KINDS = {
    "plain": Case(),
    "vectors": Case(channels=16, outputs=32, size=(9, 10)),
    "odd channels": Case(channels=17, outputs=10),
    "stride 2": Case(channels=16, outputs=16, size=(8, 8), stride=(2, 2)),
    "stride beyond the kernel": Case(channels=4, size=(9, 9), kernel=(1, 2), stride=(3, 3), padding=(0, 0)),
    "four paddings": Case(padding=(2, 0, 1, 3), stride=(2, 1)),
    "dilated": Case(size=(9, 9), dilation=(2, 3), padding=(2, 3), stride=(2, 2)),
    "groups": Case(channels=6, outputs=4, groups=3),
    "depthwise": Case(channels=1, outputs=1, groups=20, stride=(2, 2), size=(9, 9)),
    "depthwise with multiplier": Case(channels=1, outputs=2, groups=6),
    "depthwise, wide": Case(channels=1, outputs=1, groups=17, size=(6, 33), kernel=(3, 5), padding=(2, 0, 1, 3)),
    "depthwise, dilated": Case(
        channels=1, outputs=1, groups=16, size=(9, 30), dilation=(2, 3), padding=(2, 4), stride=(2, 3)
    ),
    "depthwise, stride beyond the kernel": Case(
        channels=1, outputs=1, groups=16, size=(9, 23), kernel=(2, 1), stride=(3, 2), padding=(0, 0)
    ),
    "depthwise, padding beyond the image": Case(channels=1, outputs=1, groups=8, size=(2, 1), padding=(4, 4)),
    "one pixel": Case(channels=8, outputs=16, size=(1, 1), kernel=(1, 1), padding=(0, 0)),
    "many rows": Case(batch=1, channels=4, outputs=16, size=(37, 5)),
    "padding beyond the image": Case(size=(2, 2), padding=(4, 4)),
}


@pytest.mark.parametrize("values", ["normal", "grid"])
@pytest.mark.parametrize("kind", KINDS)
def test_parity_of_each_kind(kind, values):
    assert_parity(op, KINDS[kind], values=values)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(cases())
def test_parity_of_any_geometry(case):
    assert_parity(op, case)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(cases())
def test_parity_of_many_geometries(case):
    assert_parity(op, case, values="grid")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_accumulate_in_float32(dtype):
    # one rounding of the result: half a unit in the last place of the type
    assert_parity(op, KINDS["vectors"], dtype=dtype, tolerance=torch.finfo(dtype).eps)


def test_float64_keeps_its_precision():
    assert_parity(op, KINDS["groups"], dtype=torch.float64, tolerance=1e-14)


def test_autocast_like_mixture_of_types():
    x, weight, _ = Case().tensors()
    y = op(x.bfloat16(), weight, *Case().arguments())
    assert y.dtype == torch.bfloat16
    expected = reference.forward(x.bfloat16(), weight, *Case().arguments())
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("offset", "spread"),
    [(0, 1e-20), (0, 1e30), (1, 1e-6), (100, 1), (1e4, 1e-2), (-3e5, 0)],
)
def test_large_values_close_to_each_other_keep_their_digits(offset, spread):
    """``2*max(x,w) - x - w`` alone would lose everything at x = 1e4 and |x - w| = 1e-2."""
    case = replace(KINDS["vectors"], padding=(0, 0), layout="nhwc")
    x, weight, _ = (offset + spread * t for t in case.tensors())
    expected = reference.forward(x, weight, *case.arguments())
    torch.testing.assert_close(op(x, weight, *case.arguments()).double(), expected, rtol=3e-4, atol=0)


def test_one_outlier_does_not_spoil_the_image():
    case = KINDS["vectors"]
    x, weight, _ = case.tensors()
    x[0, 3, 0, 0] = 1e6
    expected = reference.forward(x, weight, *case.arguments())
    torch.testing.assert_close(op(x, weight, *case.arguments()).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["vectors", "depthwise", "groups"])
def test_infinities_and_nans_propagate(kind):
    case = KINDS[kind]
    x, weight, _ = case.tensors()
    x[0, 1, 2, 2], x[1, 2, 5, 4] = float("inf"), float("nan")
    weight[3, 0, 1, 1], weight[5, 0, 0, 2] = -float("inf"), float("nan")
    expected = reference.forward(x, weight, *case.arguments())
    assert expected.isinf().any()
    assert expected.isnan().any()
    actual = op(x, weight, *case.arguments()).double()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("magnitude", [1e-15, 1e4, 1e12])
def test_exact_gradients_of_tiny_and_huge_values(magnitude):
    case = KINDS["vectors"]
    x, weight, grad = case.tensors("grid")
    x, weight = magnitude * x, magnitude * weight
    actual = torch.ops.anncvt.adder2d_backward(grad, x, weight, *case.arguments(), "exact", True, True)
    for a, b in zip(actual, reference.backward(grad, x, weight, *case.arguments(), "exact"), strict=True):
        torch.testing.assert_close(a.double(), b)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_layout_is_kept(layout):
    case = replace(KINDS["vectors"], layout=layout)
    x, weight, grad = case.tensors()
    wanted = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    x.requires_grad_()
    y = op(x, weight, *case.arguments())
    assert y.is_contiguous(memory_format=wanted)
    assert torch.autograd.grad(y, x, grad)[0].is_contiguous(memory_format=wanted)


@pytest.mark.parametrize("gradient", ["full", "exact"])
def test_empty_batch(gradient):
    case = replace(KINDS["stride 2"], batch=0)
    x, weight, grad = case.tensors()
    x.requires_grad_(), weight.requires_grad_()
    y = op(x, weight, *case.arguments(), gradient)
    assert y.shape == grad.shape
    dx, dw = torch.autograd.grad(y, (x, weight), grad)
    assert dx.shape == x.shape
    assert torch.equal(dw, torch.zeros_like(weight))


def test_a_view_that_starts_between_cache_lines():
    case = KINDS["vectors"]
    x, weight, _ = case.tensors()
    shifted = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    torch.testing.assert_close(op(shifted, weight, *case.arguments()), op(x, weight, *case.arguments()))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("gradient", ["full", "exact"])
def test_opcheck(gradient, layout):
    case = replace(KINDS["stride 2"], layout=layout)
    x, weight, grad = case.tensors()
    arguments = (x.requires_grad_(), weight.requires_grad_(), *case.arguments(), gradient)
    torch.library.opcheck(torch.ops.anncvt.adder2d, arguments)
    detached = (grad, x.detach(), weight.detach(), *case.arguments(), gradient, True, True)
    torch.library.opcheck(torch.ops.anncvt.adder2d_backward, detached)


@pytest.mark.parametrize("gradient", ["full", "exact"])
def test_arguments_are_left_as_they_are(gradient):
    """A 1x1 weight of one vector is its own packed form."""
    case = Case(channels=16, outputs=16, kernel=(1, 1), padding=(0, 0), layout="nhwc")
    tensors = case.tensors()
    before = [t.clone() for t in tensors]
    x, weight, grad = tensors
    op(x, weight, *case.arguments())
    torch.ops.anncvt.adder2d_backward(grad, x, weight, *case.arguments(), gradient, True, True)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)


def test_only_the_needed_gradients():
    case = KINDS["plain"]
    x, weight, grad = case.tensors()
    y = op(x, weight.requires_grad_(), *case.arguments())
    (dw,) = torch.autograd.grad(y, weight, grad)
    assert dw.shape == weight.shape
    dx, dw = torch.ops.anncvt.adder2d_backward(grad, x, weight, *case.arguments(), "full", True, False)
    assert dx.shape == x.shape
    assert dw.numel() == 0


def test_vmap_over_the_input():
    case = KINDS["stride 2"]
    x, weight, _ = case.tensors()
    stack = torch.stack([x, x + 1, x - 2], 1)
    y = torch.vmap(lambda v: op(v, weight, *case.arguments()), in_dims=1)(stack)
    for i in range(3):
        torch.testing.assert_close(y[i], op(stack[:, i].contiguous(), weight, *case.arguments()))


def test_vmap_over_the_weights_is_refused():
    case = KINDS["plain"]
    x, weight, _ = case.tensors()
    with pytest.raises(NotImplementedError, match="vmap over the weights"):
        torch.vmap(lambda w: op(x, w, *case.arguments()))(weight[None])


def test_export_keeps_the_node_and_a_free_batch():
    module = AdderConv2d(3, 4, 3, padding=1).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
    assert [n.target for n in program.graph.nodes].count(torch.ops.anncvt.adder2d.default) == 1
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(program.module()(x), module(x))


def test_symbolic_trace_keeps_the_gradients():
    module = AdderConv2d(3, 4, 3, padding=1, bias=True, gradient="exact")
    traced = torch.fx.symbolic_trace(module)
    x = torch.randn(2, 3, 8, 8)
    a, b = (m(x) for m in (module, traced))
    assert torch.equal(a, b)
    expected, actual = (torch.autograd.grad(y.square().sum(), module.weight)[0] for y in (a, b))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8, 8)}, "got 3-d and 4-d"),
        ({"x": torch.zeros(1, 3, 8, 8, dtype=torch.int32)}, "floating point"),
        ({"x": torch.zeros(1, 5, 8, 8)}, "do not fit groups=1"),
        ({"groups": 3}, "do not fit groups=3"),
        ({"gradient": "signed"}, "must be one of"),
        ({"padding": [1, 1, 1]}, "2 .h, w. or 4"),
        ({"weight": torch.zeros(4, 3, 3, 3, device="meta")}, "x is on cpu, weight on meta"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {
        "x": torch.zeros(1, 3, 8, 8),
        "weight": torch.zeros(4, 3, 3, 3),
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "gradient": "full",
    }
    with pytest.raises(ValueError, match=message):
        op(*(arguments | change).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_sum_in_float32(dtype):
    x, weight = torch.randn(2, 64, 6, 6), torch.randn(8, 64, 3, 3)
    exact = torch.ops.anncvt.adder2d(x.to(dtype).float(), weight, [1, 1], [1, 1], [1, 1], 1)
    with torch.autocast("cpu", dtype):
        cast = torch.ops.anncvt.adder2d(x.to(dtype), weight, [1, 1], [1, 1], [1, 1], 1)
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, exact)


def fused_arguments(case: Case, *, added: bool = True) -> tuple:
    x, weight, grad = case.tensors()
    random = torch.Generator().manual_seed(2)
    outputs = len(weight)
    scale = torch.rand(outputs, generator=random) / 4
    return (
        x,
        weight,
        scale,
        3 + 20 * scale * torch.rand(outputs, generator=random),
        grad if added else None,
        *case.arguments(),
    )


@pytest.mark.parametrize("limits", [(None, None), (0.0, None), (0.0, 6.0)])
@pytest.mark.parametrize("kind", ["vectors", "plain", "stride 2", "groups", "depthwise"])
def test_the_fused_op(kind, limits):
    for layout, added in (("nchw", True), ("nhwc", False)):
        case = replace(KINDS[kind], layout=layout)
        x, weight, scale, shift, residual, *config = fused_arguments(case, added=added)
        y = reference.forward(x, weight, *config)
        expected = y * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1)
        expected = expected if residual is None else expected + residual.double()
        low, high = limits
        expected = expected.clamp(-math.inf if low is None else low, high)
        actual = torch.ops.anncvt.adder2d_fused(x, weight, scale, shift, residual, *config, *limits)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)
        assert actual.is_contiguous(memory_format=torch.channels_last if layout == "nhwc" else torch.contiguous_format)


@pytest.mark.parametrize("added", [False, True])
def test_opcheck_of_the_fused_op(added):
    torch.library.opcheck(torch.ops.anncvt.adder2d_fused, (*fused_arguments(KINDS["stride 2"], added=added), 0.0, 6.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fused_op_rounds_half_types_once(dtype):
    x, weight, scale, shift, residual, *config = fused_arguments(KINDS["vectors"])
    x, residual = x.to(dtype), residual.to(dtype)
    y = torch.ops.anncvt.adder2d_fused(x, weight, scale, shift, residual, *config)
    whole = torch.ops.anncvt.adder2d_fused(x.float(), weight, scale, shift, residual.float(), *config)
    assert torch.equal(y, whole.to(dtype))
    with torch.autocast("cpu", dtype):
        cast = torch.ops.anncvt.adder2d_fused(x, weight, scale, shift, residual, *config)
    torch.testing.assert_close(cast, whole)


def test_the_fused_op_has_no_gradient():
    arguments = fused_arguments(KINDS["plain"])
    y = torch.ops.anncvt.adder2d_fused(arguments[0].requires_grad_(), *arguments[1:])
    with pytest.raises(RuntimeError, match="adder2d_fused"):
        y.sum().backward()


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_tensors_on_several_devices(at):
    arguments = list(fused_arguments(KINDS["vectors"]))
    arguments[at] = arguments[at].to("meta")
    with pytest.raises(ValueError, match=r"adder2d.*x is on cpu, \w+ on meta"):
        torch.ops.anncvt.adder2d_fused(*arguments)


@pytest.mark.parametrize(
    ("at", "message"), [(2, r"scale must be \[32\], got \[3\]"), (3, "shift must be"), (4, "residual must be")]
)
def test_bad_arguments_of_the_fused_op(at, message):
    arguments = list(fused_arguments(KINDS["vectors"]))
    arguments[at] = torch.zeros(3)
    with pytest.raises(ValueError, match=message):
        torch.ops.anncvt.adder2d_fused(*arguments)
