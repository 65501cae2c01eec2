"""Kernels on an emulated 64-bit Arm processor: integers bit for bit, floats against float64."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")

import torch
import torch.nn.functional as F
from emulated import deployment, needs_emulator, run
from integers import blocked, case

from anncvt.runtime import reference
from anncvt.runtime.geometry import Padding
from anncvt.runtime.kernels import inference
from anncvt.runtime.kernels.integer_layer import IntegerLayer
from anncvt.runtime.kernels.integer_plan import Plan
from anncvt.runtime.kernels.layer import Layer
from anncvt.runtime.kernels.tiling import tiling

pytestmark = [pytest.mark.slow, needs_emulator]
#: Without and with dot products of bytes.
CPUS = ["cortex-a72", "neoverse-n1"]
PADDING = Padding(1, 0, 1, 2)


def all_lanes(y: np.ndarray) -> np.ndarray:
    n, blocks, h, w, lanes = y.shape
    return y.transpose(0, 1, 4, 2, 3).reshape(n, blocks * lanes, h, w)


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("mode", ["adder", "conv"])
@pytest.mark.parametrize("groups", [1, 4, 20])
@pytest.mark.parametrize("values", ["all", "extreme"])
def test_integer_kernels(cpu: str, mode: str, groups: int, values: str, tmp_path: Path) -> None:
    layer = IntegerLayer(mode, 20, (7, 6), 20, (3, 3), (2, 1), PADDING, groups=groups, residual=True)
    given = case(layer, batch=2, values=values)
    assert given.residual is not None
    plan = Plan.of(layer, deployment(cpu))
    arguments = [blocked(given.x), *plan.pack(given.weight, given.zero, given.end), blocked(given.residual)]
    y = all_lanes(run(plan.build(), arguments, np.full((2, *layer.out_shape), 99, np.uint8), cpu, tmp_path))
    np.testing.assert_array_equal(y[:, :20], given.expected)
    assert not y[:, 20:].any()


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("mode", ["max", "abs", "conv"])
@pytest.mark.parametrize("groups", [1, 20])
def test_float_kernels(cpu: str, mode: str, groups: int, tmp_path: Path) -> None:
    layer = Layer(mode, 2, 20, (7, 6), 20, (3, 3), (2, 1), PADDING, groups=groups, activation=("relu",))
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 20, 7, 6)).astype(np.float32)
    weight = random.standard_normal((20, 20 // groups, 3, 3)).astype(np.float32)
    a, b = torch.from_numpy(x).double(), torch.from_numpy(weight).double()
    if mode == "conv":
        padded = F.pad(a, (PADDING.left, PADDING.right, PADDING.top, PADDING.bottom))
        expected = F.conv2d(padded, b, stride=layer.stride, groups=groups).numpy()
    else:
        expected = reference.forward(a, b, layer.stride, PADDING, layer.dilation, groups).numpy()
    scale, shift = random.standard_normal((2, 20))
    expected = np.maximum(expected * scale[:, None, None] + shift[:, None, None], 0)
    function = inference.build(layer, tiling(layer, deployment(cpu).accumulators))
    out = np.full(layer.out_shape, np.nan, np.float32)
    y = all_lanes(run(function, [blocked(x), *inference.pack(layer, weight, scale, shift)], out, cpu, tmp_path))
    assert np.abs(y[:, :20] - expected).max() <= 2e-6 * np.abs(expected).max() + 1e-6
    assert not y[:, 20:].any()
