"""Kernels for the native library of onnxruntime: object files for several instruction sets, and the table of them in C.

The C sources beside the table (``runtime/ort``) choose among them at run time and know their interfaces; what they need
to know of one kernel is a row of the table (``struct Compiled`` in ``layer.h``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tvm
from tvm import tirx
from tvm.target import codegen

from anncvt.errors import AnncvtError
from anncvt.runtime.kernels import fixed_point, inference, integer_depthwise
from anncvt.runtime.kernels.deployment import Deployment
from anncvt.runtime.kernels.integer import cells_of
from anncvt.runtime.kernels.integer_layer import IntegerLayer
from anncvt.runtime.kernels.integer_plan import Plan
from anncvt.runtime.kernels.layer import LANES, Layer
from anncvt.runtime.processor import architecture

#: Kernels of one object file: large enough to share what a file costs, small enough to show progress.
CHUNK = 8


@dataclass(frozen=True)
class Level:
    """An instruction set with its number in ``compiled.c``; ``floats``: whether it has anything new for floats."""

    number: int
    name: str
    target: str
    floats: bool = True


_X86_64 = (
    Level(0, "x86-64", "llvm -mcpu=x86-64"),
    Level(1, "avx2", "avx2"),
    Level(2, "avx512", "avx512"),
    # fast-dpwssd: else LLVM makes two instructions of what multiplies pairs and adds.
    Level(3, "avx512vnni", "llvm -mcpu=x86-64-v4 -mattr=+avx512vnni,+fast-dpwssd", floats=False),
)
_OTHER = (Level(0, "cpu", "cpu"),)


def levels(target: str | None) -> tuple[Level, ...]:
    """The instruction sets to compile for.

    Args:
        target: None: all; ``"cpu"``: those that this machine would choose, tuned for it; or the name of one.

    Raises:
        AnncvtError: there is none of that name.
    """
    every = _X86_64 if architecture() == "x86_64" else _OTHER
    if target is None:
        return every
    if target == "cpu":
        return _best(every)
    chosen = tuple(level for level in every if level.name == target)
    if not chosen:
        names = ", ".join(level.name for level in every)
        raise AnncvtError(f"unknown target {target!r} of a library for onnxruntime", fix=f"use cpu, {names}, or none")
    return chosen


def _best(every: Sequence[Level]) -> tuple[Level, ...]:
    here = set(Deployment.parse("cpu").features)
    usable = [level for level in every if set(Deployment.parse(level.target).features) <= here]
    floats = [level for level in usable if level.floats]
    return tuple(map(_tuned, dict.fromkeys([floats[-1], usable[-1]])))


def _tuned(level: Level) -> Level:
    """``level`` with instructions in the order that suits this processor, and none that the level does not have."""
    here, there = (Deployment.parse(target).target for target in ("cpu", level.target))
    if here.attrs["mcpu"] == there.attrs["mcpu"]:
        return level
    own, wanted = (set(map(str, codegen.llvm_get_cpu_features(target))) for target in (here, there))
    attributes = [*map(str, there.attrs.get("mattr", ())), *(f"-{feature}" for feature in sorted(own - wanted))]
    return dataclasses.replace(level, target=f"llvm -mcpu={here.attrs['mcpu']} -mattr={','.join(attributes)}")


@dataclass(frozen=True)
class Kernel:
    """A layer of an instruction set, and the name of its function."""

    layer: Layer | IntegerLayer
    level: Level
    index: int

    @property
    def name(self) -> str:
        return f"anncvt_{self.index}_{self.level.number}"


def kernels(
    layers: Iterable[Layer | IntegerLayer], chosen: Sequence[Level], *, fixed: bool | None = None
) -> list[Kernel]:
    """What is to be compiled for ``layers`` (one image each), without repetitions.

    Args:
        fixed: layers of floats get a kernel in 16-bit fixed point besides, where there is one; whether it may be used
            depends on the weights. None: for instruction sets with AVX-512 (:func:`fixed_point.chosen`).

    Raises:
        AnncvtError: ``fixed``, and none of the instruction sets is faster in it.
    """
    distinct = list(dict.fromkeys(layers))
    found = [
        Kernel(layer, level, index)
        for level in chosen
        for index, layer in enumerate(distinct)
        if level.floats or isinstance(layer, IntegerLayer)
    ]
    return found + _in_fixed_point(distinct, chosen, fixed)


def _in_fixed_point(
    distinct: Sequence[Layer | IntegerLayer], chosen: Sequence[Level], fixed: bool | None
) -> list[Kernel]:
    parsed = {level: Deployment.parse(level.target) for level in chosen}
    deployments = {
        level: made for level, made in parsed.items() if fixed_point.chosen(fixed, made.architecture, made.features)
    }
    if fixed and not deployments:
        raise fixed_point.refusal(" and ".join(level.name for level in chosen))
    return [
        Kernel(dataclasses.replace(layer, mode="fixed"), level, index)
        for level, made in deployments.items()
        for index, layer in enumerate(distinct, start=len(distinct))
        if isinstance(layer, Layer) and fixed_point.possible(layer, made.architecture, made.features)
    ]


def compile_objects(wanted: Sequence[Kernel], folder: Path, advance: Callable[[int], None]) -> list[Path]:
    """Compile to object files in ``folder``; ``advance`` is told of every few kernels that are done."""
    files = []
    for level in dict.fromkeys(kernel.level for kernel in wanted):
        deployment = Deployment.parse(level.target)
        of_level = [kernel for kernel in wanted if kernel.level == level]
        for start in range(0, len(of_level), CHUNK):
            chunk = of_level[start : start + CHUNK]
            functions = {k.name: _function(k.layer, deployment).with_attr("global_symbol", k.name) for k in chunk}
            path = folder / f"kernels_{level.number}_{start}.o"
            tvm.compile(tvm.IRModule(functions), deployment.target).mod.write_to_file(str(path), "o")
            files.append(path)
            advance(len(chunk))
    return files


def _function(layer: Layer | IntegerLayer, deployment: Deployment) -> tirx.PrimFunc:
    if isinstance(layer, IntegerLayer):
        return Plan.of(layer, deployment).build()
    if layer.mode == "fixed":
        return fixed_point.generate(layer, deployment.architecture, deployment.features)
    return inference.build(_float_layer(layer, deployment), deployment.cut(layer), deployment.assembly)


def _float_layer(layer: Layer, deployment: Deployment) -> Layer:
    """Arm has an absolute difference of floats, and LLVM makes two instructions of a maximum there."""
    return dataclasses.replace(layer, mode="abs") if deployment.architecture == "aarch64" else layer


def table(wanted: Sequence[Kernel]) -> str:
    """The table of ``wanted`` as C source."""
    return "\n".join(_table(wanted)) + "\n"


def _table(wanted: Sequence[Kernel]) -> Iterator[str]:
    yield '#include "layer.h"'
    for kernel in wanted:
        yield f"int __tvm_ffi_{kernel.name}(void *, const void *, int32_t, void *);"
        if isinstance(kernel.layer, IntegerLayer):
            plan = Plan.of(kernel.layer, Deployment.parse(kernel.level.target))
            order = ", ".join(map(str, plan.form.order(plan.cut.vectors)))
            yield f"static const int16_t order_{kernel.name}[] = {{{order}}};"
    yield "const Compiled compiled_kernels[] = {"
    for kernel in wanted:
        yield f"  {{{_row(kernel)}, __tvm_ffi_{kernel.name}}},"
    yield "};"
    yield "const int compiled_count = sizeof compiled_kernels / sizeof *compiled_kernels;"


def _row(kernel: Kernel) -> str:
    deployment = Deployment.parse(kernel.level.target)
    layer = kernel.layer
    if isinstance(layer, IntegerLayer):
        kind = "INTEGER_ADDER" if layer.mode == "adder" else f"{'INTEGER' if layer.blocked else 'IMAGE'}_CONVOLUTION"
        head = f"{kind}, {kernel.level.number}, {_geometry(layer)}, {int(layer.blocked)}, 0, 0"
        end = f"{{{int(layer.result == 'uint8')}, {int(layer.residual)}, 0, 0, 0, 0}}"
        return f"{head}, {end}, {_panels(kernel.name, Plan.of(layer, deployment))}"
    kind, layer = ("FIXED" if layer.mode == "fixed" else "FLOAT"), _float_layer(layer, deployment)
    depth = layer.in_channels // layer.groups if layer.per_lane or not layer.blocked else LANES
    head = f"{kind}_ADDER, {kernel.level.number}, {_geometry(layer)}, {int(layer.blocked)}"
    return f"{head}, {int(layer.form == 'max')}, {depth}, {_epilogue(layer)}, {{0}}"


def _geometry(layer: Layer | IntegerLayer) -> str:
    """``struct Layer``."""
    lists = [layer.kernel, layer.stride, tuple(layer.padding), layer.dilation]
    kernel, *window = ("{" + ", ".join(map(str, values)) + "}" for values in lists)
    sizes = f"{layer.in_channels}, {layer.size[0]}, {layer.size[1]}, {layer.out_channels}"
    return f"{{{sizes}, {kernel}, {', '.join(window)}, {layer.groups}}}"


def _epilogue(layer: Layer) -> str:
    """``struct Epilogue``; only a fused layer has an activation."""
    if not layer.activation:
        return "{0, 0, 0, 0, 0, 0}"
    _, low, high = layer.activation
    return f"{{1, {int(layer.residual)}, {_float(low)}, {_float(high)}, 0, 0}}"


def _float(value: float) -> str:
    return f"{'-' if value < 0 else ''}INFINITY" if math.isinf(value) else f"{float(value).hex()}f"


def _panels(name: str, plan: Plan) -> str:
    """``struct Panels``."""
    layer, form, cut = plan.layer, plan.form, plan.cut
    cells = integer_depthwise.weight_cells(layer) if layer.depthwise else cells_of(layer, form)
    together = form.together or form.group
    panels = -(-(layer.out_channels if layer.depthwise else layer.filters) // (cut.vectors * form.lanes))
    size = np.dtype(form.weight).itemsize
    numbers = [panels, cut.vectors, form.lanes, form.group, together, cells.number, cells.size, cells.columns, size]
    flags = [int(form.maxima), int(form.source != "uint8"), ("short", "long").index(layer.totals)]
    return f"{{{', '.join(map(str, numbers + flags))}, order_{name}}}"
