"""Integer kernels against int64, bit for bit: geometry, groups, ragged channels, every instruction form."""

import dataclasses

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from integers import Case, blocked, case, layers  # noqa: E402
from tvm import tirx  # noqa: E402

from anncvt.runtime import processor  # noqa: E402
from anncvt.runtime.geometry import Padding  # noqa: E402
from anncvt.runtime.kernels.deployment import Deployment  # noqa: E402
from anncvt.runtime.kernels.integer_forms import PLAIN, Form, choose, repeat  # noqa: E402
from anncvt.runtime.kernels.integer_layer import IntegerLayer  # noqa: E402
from anncvt.runtime.kernels.integer_plan import Plan  # noqa: E402
from anncvt.runtime.kernels.integer_tiling import IntegerTiling, panels_of  # noqa: E402

HERE = Deployment.parse("cpu")
X86 = pytest.mark.skipif(processor.architecture() != "x86_64", reason="x86 instructions")
SLOW_COMPILER = settings(deadline=None, suppress_health_check=list(HealthCheck))


def run(plan: Plan, given: Case, target: object = HERE.target) -> np.ndarray:
    """All lanes of the result, ``[N, C, H, W]``."""
    layer = plan.layer
    module = tvm.IRModule({"kernel": plan.build().with_attr("global_symbol", "kernel")})
    library = tvm.compile(module, target)
    arguments = [blocked(given.x) if layer.blocked else given.x, *plan.pack(given.weight, given.zero, given.end)]
    if given.residual is not None:
        arguments.append(blocked(given.residual))
    y = tvm.runtime.tensor(np.full((len(given.x), *layer.out_shape), 99, layer.result))
    library["kernel"](*(tvm.runtime.tensor(a) for a in arguments), y)
    n, count, height, width, lanes = y.numpy().shape
    return y.numpy().transpose(0, 1, 4, 2, 3).reshape(n, count * lanes, height, width)


def assert_exact(plan: Plan, given: Case, target: object = HERE.target) -> None:
    got, count = run(plan, given, target), plan.layer.out_channels
    np.testing.assert_array_equal(got[:, :count], given.expected)
    assert not got[:, count:].any(), "lanes beyond the last channel must be zero"


def in_plain(form: Form) -> Form:
    """``form`` with its instructions replaced by what they mean, lane by lane."""
    together = form.together or form.group

    def step(sums, x, w):
        for c in range(form.group):
            own = [c // together * together * form.lanes + lane * together + c % together for lane in range(form.lanes)]
            pixel = tirx.Broadcast(tirx.Shuffle([x], [c]), form.lanes)
            factor = tirx.Shuffle([w], own) if form.lanes > 1 else w
            if form.maxima:
                term = 2 * tirx.max(factor, pixel).astype(sums.ty.dtype)
            elif form.weight == "uint8":
                term = tirx.max(factor, pixel) - tirx.min(factor, pixel)
            else:
                term = pixel.astype(sums.ty.dtype) * factor.astype(sums.ty.dtype)
            sums = sums + term.astype(sums.ty.dtype)
        return sums

    def quads(sums, x):
        for k in range(4):
            sums = sums + tirx.Shuffle([x], [4 * lane + k for lane in range(form.lanes)]).astype(sums.ty.dtype)
        return sums

    return dataclasses.replace(form, step=step, alternate=None, quads=form.quads and quads, packs=False, pairs=None)


@settings(parent=SLOW_COMPILER, max_examples=12)
@given(layers(), st.integers(1, 3), st.sampled_from([0, 7, 255]), st.sampled_from([0, 3]))
def test_every_geometry(layer: IntegerLayer, batch: int, zero: int, low: int) -> None:
    given_case = case(layer, batch=batch, zero=zero, low=low)
    assert_exact(Plan.of(given_case.layer, HERE), given_case)


#: Instruction sets without a machine here are replaced by their meaning: layout, sums and constants stay the same.
FORMS = {
    "avx512": ("x86_64", ("avx2", "avx512bw")),
    "vnni": ("x86_64", ("avx2", "avx512bw", "avx512vnni")),
    "dotprod": ("aarch64", ("neon", "dotprod")),
    "neon": ("aarch64", ("neon",)),
}
CHANNELS = {
    "dense": (40, 72, 1),
    "copies": (40, 72, 1),
    "doubling": (40, 72, 1),
    "grouped": (64, 32, 2),
    "small groups": (12, 18, 3),
}


@pytest.mark.parametrize(
    ("name", "mode", "kind"),
    [
        *((name, "adder", kind) for name in FORMS for kind in ("dense", "copies", "doubling")),
        ("vnni", "conv", "dense"),
        *(("vnni", "adder", kind) for kind in ("grouped", "small groups")),
        ("vnni", "conv", "small groups"),
    ],
)
def test_every_form_in_plain_arithmetic(name: str, mode: str, kind: str) -> None:
    channels, out, groups = CHANNELS[kind]
    window = {"stride": (2, 1), "padding": Padding(1, 0, 1, 2), "groups": groups}
    copies = {"copies": {"copies": 2}, "doubling": {"copies": 7, "doubling": True}}.get(kind, {})
    layer = IntegerLayer(mode, channels, (5, 4), out, (3, 2), **window, **copies, residual=True)
    assert_exact(Plan.with_form(layer, in_plain(choose(mode, *FORMS[name]))), case(layer))


@X86
@pytest.mark.parametrize("totals", ["short", "long"])
@pytest.mark.parametrize("mode", ["adder", "conv"])
@pytest.mark.parametrize("level", ["x86-64", "x86-64-v3", "x86-64-v4", "cascadelake"])
def test_x86_instructions(level: str, mode: str, totals: str) -> None:
    deployment = Deployment.parse(f"llvm -mcpu={level}")
    if processor.missing(list(deployment.features)):
        pytest.skip(f"this processor is no {level}")
    layer = IntegerLayer(mode, 40, (9, 9), 48, (3, 3), padding=Padding(1, 1, 1, 1), residual=True, totals=totals)
    assert_exact(Plan.of(layer, deployment), case(layer, values="extreme"), deployment.target)


@X86
@pytest.mark.parametrize("values", ["all", "extreme"])
@pytest.mark.parametrize("level", ["x86-64", "x86-64-v3", "x86-64-v4", "cascadelake", "znver4"])
@pytest.mark.parametrize("doubling", [False, True])
def test_narrow_sums(level: str, values: str, doubling: bool) -> None:
    """With 128 taps the least of the sums, and the largest, are those of the extreme values."""
    deployment = Deployment.parse(f"llvm -mcpu={level}")
    if processor.missing(list(deployment.features)):
        pytest.skip(f"this processor is no {level}")
    copies = {"copies": 3, "doubling": True} if doubling else {}
    layer = IntegerLayer(
        "adder", 128 // 3 if doubling else 128, (4, 9), 48, (1, 1), residual=True, totals="short", **copies
    )
    given_case = case(layer, values=values)
    assert given_case.layer.narrow
    assert_exact(Plan.of(given_case.layer, deployment), given_case, deployment.target)


@pytest.mark.parametrize("mode", ["adder", "conv"])
@pytest.mark.parametrize("result", ["int32", "uint8"])
@pytest.mark.parametrize("groups", [1, 32])
def test_extreme_values(mode: str, result: str, groups: int) -> None:
    layer = IntegerLayer(mode, 32, (8, 8), 32, (3, 3), padding=Padding(1, 1, 1, 1), groups=groups, result=result)
    for zero in (0, 255):
        assert_exact(Plan.of(layer, HERE), case(layer, values="extreme", zero=zero))


@pytest.mark.parametrize("form", [choose("adder", HERE.architecture, HERE.features), None])
def test_largest_sums(form: Form | None) -> None:
    """2^22 taps of 255: the sum, and twice the sum of maxima, are within one percent of the bound of int32."""
    form = form or in_plain(choose("adder", *FORMS["vnni"]))
    layer = IntegerLayer("adder", 1 << 16, (8, 8), 2, (8, 8), result="int32")
    x = np.full((1, *layer.in_shape), 255, np.uint8)
    weight = np.zeros((2, 1 << 16, 8, 8), np.uint8)
    weight[1] = 255
    plan = Plan.with_form(layer, form)
    module = tvm.IRModule({"kernel": plan.build().with_attr("global_symbol", "kernel")})
    y = tvm.runtime.tensor(np.zeros((1, *layer.out_shape), np.int32))
    arguments = (x, *plan.pack(weight, 0, None))
    tvm.compile(module, HERE.target)["kernel"](*(tvm.runtime.tensor(a) for a in arguments), y)
    assert y.numpy().reshape(-1)[:3].tolist() == [-255 * (1 << 22), 0, 0]


def test_depthwise_beyond_16_bits() -> None:
    layer = IntegerLayer("adder", 16, (17, 17), 16, (17, 17), groups=16, result="int32")
    given = case(layer, values="extreme")
    given.x[:], given.weight[:] = 255, 0
    got = run(Plan.of(layer, HERE), given)
    assert (got == -255 * 17 * 17).all()


@settings(parent=SLOW_COMPILER, max_examples=4)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2))
def test_every_tiling(rows: int, panels: int, height: int, width: int, vectors: int) -> None:
    layer = IntegerLayer("adder", 32, (9, 7), 40, (3, 3), padding=Padding(1, 1, 1, 1), residual=True)
    form = PLAIN["adder"]
    cut = IntegerTiling(rows, min(panels, panels_of(layer, form, vectors)), height, width, vectors)
    assert_exact(Plan(layer, form, cut), case(layer))


def test_repeat_keeps_the_kind() -> None:
    assert repeat(tirx.Broadcast(tirx.const(1, "uint8"), 8), 4).ty.dtype == "uint8x32"
    assert repeat(tirx.const(-1, "int16"), 2).ty.dtype == "int16x2"
