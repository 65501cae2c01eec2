"""Kernels are compiled to the instructions they are written for, on processors that need not be here."""

import re

import pytest

pytest.importorskip("tvm")

import tvm
from torch import Tensor, nn

from anncvt.nn import AdderConv2d
from anncvt.runtime.geometry import Padding
from anncvt.runtime.kernels import inference
from anncvt.runtime.kernels.deployment import Deployment
from anncvt.runtime.kernels.integer_layer import IntegerLayer
from anncvt.runtime.kernels.integer_plan import Plan
from anncvt.runtime.kernels.layer import Layer
from anncvt.runtime.kernels.network import export, lower
from anncvt.runtime.kernels.tiling import tiling

X86, ARM = "llvm -mtriple=x86_64-linux-gnu -mcpu=", "llvm -mtriple=aarch64-linux-gnu -mcpu="
ONE = Padding(1, 1, 1, 1)


def assembly(function: tvm.tirx.PrimFunc, deployment: Deployment) -> str:
    module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
    return str(tvm.compile(module, deployment.target).mod.inspect_source("asm"))


def counts(text: str, *patterns: str) -> list[int]:
    """How many instructions match each of ``patterns`` (name and, after a space, some of the operands)."""
    shaped = [pattern.replace(" ", r"\s.*") for pattern in patterns]
    return [len(re.findall(rf"^\s+{pattern}", text, re.MULTILINE)) for pattern in shaped]


@pytest.mark.parametrize(
    ("target", "mode", "pair"),
    [
        (X86 + "x86-64", "adder", ("psadbw %xmm", "paddq %xmm")),
        (X86 + "x86-64-v3", "adder", ("vpsadbw %ymm", "vpaddq %ymm")),
        (X86 + "x86-64-v4", "adder", ("vpsadbw %zmm", "vpaddq %zmm")),
        (X86 + "cascadelake", "adder", ("vpmaxub %zmm", "vpdpbusd %zmm")),
        (ARM + "cortex-a72", "adder", ("uabal v", "uabdl v")),
        (ARM + "neoverse-n1", "adder", ("uabd v", "udot v")),
        (X86 + "x86-64", "conv", ("pmaddwd %xmm", "paddd %xmm")),
        (X86 + "x86-64-v3", "conv", ("vpmaddwd %ymm", "vpaddd %ymm")),
        (X86 + "x86-64-v4", "conv", ("vpmaddwd %zmm", "vpaddd %zmm")),
        (X86 + "cascadelake", "conv", ("vpdpbusd %zmm", "vpdpbusd %zmm")),
        (ARM + "cortex-a72", "conv", (r"smlal v\d+\.4s", "ld1r v")),
    ],
)
def test_integer_kernels(target: str, mode: str, pair: tuple[str, str]) -> None:
    deployment = Deployment.parse(target)
    plan = Plan.of(IntegerLayer(mode, 64, (14, 14), 64, (3, 3), padding=ONE), deployment)
    steps = plan.cut.height * plan.cut.width * plan.cut.vectors
    first, second = counts(assembly(plan.build(), deployment), *pair)
    assert first >= steps and second >= min(steps, 4), "at least one register tile of them"


@pytest.mark.parametrize(
    ("level", "mode", "instruction"),
    [
        ("x86-64", "adder", "psadbw"),
        ("x86-64-v3", "adder", "vpsadbw"),
        ("x86-64-v3", "conv", "vpmaddwd"),
        ("x86-64-v4", "adder", "vpsadbw"),
        ("x86-64-v4", "conv", "vpmaddwd"),
        ("cascadelake", "adder", "vpdpbusd"),
        ("cascadelake", "conv", "vpdpbusd"),
    ],
)
def test_sums_stay_in_registers(level: str, mode: str, instruction: str) -> None:
    """No vector is written to memory between the steps of an inner loop."""
    deployment = Deployment.parse(X86 + level)
    plan = Plan.of(IntegerLayer(mode, 128, (28, 28), 128, (3, 3), padding=ONE), deployment)
    loops = re.split(r"^\.LBB\w+:", assembly(plan.build(), deployment), flags=re.MULTILINE)
    inner = [loop for loop in loops if loop.count(instruction) >= 2 * plan.cut.width * plan.cut.vectors]
    assert inner
    for loop in inner:
        steps = loop[loop.index(instruction) : loop.rindex(instruction)]
        assert not re.search(r"mov\w+\s+%[xyz]mm\d+, [^%\n]*\(", steps)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def test_networks_take_the_absolute_difference_on_arm() -> None:
    deployment = Deployment.parse(ARM + "cortex-a72")
    module, *_ = lower({"main": export(nn.Sequential(AdderConv2d(32, 32, 3), Mean()), (1, 32, 6, 6))}, deployment)
    kernels = [function for _, function in module.functions_items() if isinstance(function, tvm.tirx.PrimFunc)]
    found = [counts(assembly(kernel, deployment), "fabd v")[0] for kernel in kernels]
    assert max(found) >= 4 * deployment.accumulators


@pytest.mark.parametrize(
    ("mode", "instructions"), [("max", ("fmla v",)), ("abs", ("fabd v", "fadd v")), ("conv", ("fmla v",))]
)
@pytest.mark.parametrize("cpu", ["cortex-a72", "neoverse-n1"])
def test_float_kernels_on_arm(cpu: str, mode: str, instructions: tuple[str, ...]) -> None:
    deployment = Deployment.parse(ARM + cpu)
    layer = Layer(mode, 1, 32, (14, 14), 32, (3, 3), padding=ONE)
    text = assembly(inference.build(layer, tiling(layer, deployment.accumulators)), deployment)
    assert all(count >= 4 * deployment.accumulators for count in counts(text, *instructions))
