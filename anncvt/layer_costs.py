"""Operations, bytes and energy of every layer: the CNN beside its adder network, in floats and in integers.

What is counted is what dedicated hardware would do. On a CPU or a GPU, which have multipliers and use them or not, an
adder network saves no energy, and nothing here says so.

One image passes. A convolution's tap is a multiplication and an addition; an adder's is a subtraction (with absolute
value) and an addition. Behind a layer, each output takes a multiplication and an addition for BatchNorm (which folds
into a convolution's weights, not into an adder's) or, in integers, a multiplication, an addition and a shift.
Weights are read once, a layer's input is read once and its output written once: the least traffic of a layer-by-layer
schedule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from anncvt.energy import HOROWITZ_45NM, EnergyTable
from anncvt.program import LayerPlan, Program

#: Of the multipliers and biases behind an accumulator in integers.
EPILOGUE_BITS = 32
NETWORKS = ("cnn-fp32", "adders-fp32", "cnn-int8", "adders-int")


@dataclass(frozen=True)
class Operations:
    """So many operations of one kind and width."""

    operation: str  # add, multiply, shift
    bits: int
    count: int
    floating: bool = False

    def picojoules(self, table: EnergyTable) -> float:
        return self.count * table.picojoules(self.operation, self.bits, floating=self.floating)


@dataclass(frozen=True)
class LayerCost:
    """One layer of one network, for one image."""

    name: str
    kind: str  # convolution, adder, linear
    operations: tuple[Operations, ...]
    weight_bytes: float
    activation_bytes: float

    def count(self, operation: str) -> int:
        """How many of that operation, of any width."""
        return sum(part.count for part in self.operations if part.operation == operation)

    def compute(self, table: EnergyTable) -> float:
        """Picojoules of arithmetic."""
        return sum(part.picojoules(table) for part in self.operations)

    def memory(self, table: EnergyTable) -> float:
        """Picojoules of moving weights and activations."""
        return self.weight_bytes * table.memory["weights"] + self.activation_bytes * table.memory["activations"]


def costs(
    program: Program,
    *,
    bits: int = 8,
    accumulators: Mapping[str, int] | None = None,
    table: EnergyTable = HOROWITZ_45NM,
) -> dict[str, Any]:
    """Every layer and the totals of the networks in :data:`NETWORKS`, as plain data.

    Args:
        program: planned.
        bits: of the adders' integers.
        accumulators: proven widths by layer; others get the bound for any weights.
        table: energies.

    Returns:
        ``{"table": {"name", "citation"}, "bits", "networks": {name: {"adds", "multiplies", "shifts", "weight_bytes",
        "activation_bytes", "compute_uj", "memory_uj", "layers": [...]}}}``, energies in microjoules an image.
    """
    networks = {}
    for name in NETWORKS:
        rows = layer_costs(program, name, bits, accumulators or {})
        networks[name] = _total(rows, table)
    return {"table": {"name": table.name, "citation": table.citation}, "bits": bits, "networks": networks}


def layer_costs(program: Program, network: str, bits: int, accumulators: Mapping[str, int]) -> list[LayerCost]:
    """The layers of one of :data:`NETWORKS`."""
    assert program.plan is not None
    linear = [m for m in program.teacher.modules() if isinstance(m, nn.Linear)]
    floating, adders = network.endswith("fp32"), network.startswith("adders")
    rows = []
    for layer in program.plan.layers:
        adder = adders and layer.swapped
        width = 32 if floating else bits if adder else 8
        accumulator = accumulators.get(layer.name) if adder else None
        rows.append(_layer(layer, adder, floating, width, accumulator))
    if program.plan.other_macs and linear:
        rows.append(_linear(program.plan.other_macs, linear, floating))
    return rows


def _layer(layer: LayerPlan, adder: bool, floating: bool, bits: int, accumulator: int | None) -> LayerCost:
    copies = layer.copies if adder else 1
    taps = copies * layer.taps
    outputs = math.prod(layer.out_shape[1:])
    accumulator = accumulator or (32 if floating else (bits + 1 if adder else 2 * bits) + _log2(taps))
    inner = "add" if adder else "multiply"
    operations = [
        Operations(inner, bits, copies * layer.macs, floating),
        Operations("add", accumulator, copies * layer.macs, floating),
        *_epilogue(outputs, adder and (layer.bn is not None or layer.insert_bn), floating),
    ]
    weights = layer.out_shape[1] * taps * bits / 8
    activations = (math.prod(layer.in_shape[1:]) * bits + outputs * (32 if floating else 8)) / 8
    return LayerCost(layer.name, "adder" if adder else "convolution", tuple(operations), weights, activations)


def _epilogue(outputs: int, scaled: bool, floating: bool) -> list[Operations]:
    """What follows the accumulators: in floats a bias, with a scale where BatchNorm cannot be folded."""
    if floating:
        scale = [Operations("multiply", 32, outputs, True)] if scaled else []
        return [*scale, Operations("add", 32, outputs, True)]
    return [Operations(operation, EPILOGUE_BITS, outputs) for operation in ("multiply", "add", "shift")]


def _linear(macs: int, modules: list[nn.Linear], floating: bool) -> LayerCost:
    """All Linear layers together: they are kept."""
    bits = 32 if floating else 8
    accumulator = 32 if floating else 16 + _log2(max(module.in_features for module in modules))
    outputs = sum(module.out_features for module in modules)
    operations = (
        Operations("multiply", bits, macs, floating),
        Operations("add", accumulator, macs, floating),
        *_epilogue(outputs, False, floating),
    )
    weights = sum(module.weight.numel() for module in modules) * bits / 8
    activations = sum(module.in_features * bits / 8 + module.out_features * 4 for module in modules)
    return LayerCost("Linear layers", "linear", operations, weights, activations)


def _log2(taps: int) -> int:
    return math.ceil(math.log2(taps)) if taps > 1 else 0


def _total(rows: list[LayerCost], table: EnergyTable) -> dict[str, Any]:
    layers = [
        {
            "name": row.name,
            "kind": row.kind,
            "operations": [asdict(part) for part in row.operations],
            "weight_bytes": row.weight_bytes,
            "activation_bytes": row.activation_bytes,
            "compute_uj": row.compute(table) / 1e6,
            "memory_uj": row.memory(table) / 1e6,
        }
        for row in rows
    ]
    return {
        "adds": sum(row.count("add") for row in rows),
        "multiplies": sum(row.count("multiply") for row in rows),
        "shifts": sum(row.count("shift") for row in rows),
        "weight_bytes": sum(row.weight_bytes for row in rows),
        "activation_bytes": sum(row.activation_bytes for row in rows),
        "compute_uj": sum(row["compute_uj"] for row in layers),
        "memory_uj": sum(row["memory_uj"] for row in layers),
        "layers": layers,
    }
