"""Everything a report tells about a program folder, as plain data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from anncvt.data import Images
from anncvt.energy import HOROWITZ_45NM, EnergyTable
from anncvt.errors import AnncvtError
from anncvt.files import write_text
from anncvt.inspection import IMAGES, inspect
from anncvt.layer_costs import costs
from anncvt.measure import DataChoice, chosen
from anncvt.program import Program
from anncvt.progress import SILENT, Progress
from anncvt.report import summary
from anncvt.runtime import integer_network

#: What the last `bench` of a folder found.
BENCH = "bench.json"


def gather(
    program: Program,
    data: DataChoice | None = None,
    *,
    table: EnergyTable = HOROWITZ_45NM,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """A :func:`anncvt.report.summary` with more:

    - "name": of the model, without folders;
    - "plan": as JSON, or None;
    - "layers": of :func:`anncvt.inspection.inspect`, without activations where no images can be read;
    - "costs": of :func:`anncvt.layer_costs.costs`, or None without a plan;
    - "bench": what the last `anncvt bench` of the folder found, or None.

    Args:
        data: images to look at; default: those of the conversion.
    """
    layers: dict[str, Any] = {"layers": [], "overall": {}, "images": 0}
    if program.student is not None:
        layers = inspect(program, _images(program, data, progress), progress=progress)
    bits, accumulators = 8, {}
    if program.folder is not None and integer_network.exists(program.folder):
        network = integer_network.load(program.folder)
        bits = network.settings["bits"]
        accumulators = {
            step.name: integer_network.accumulator_bits(network, step) for step in network.steps if step.op == "adder"
        }
    return {
        **summary(program),
        "name": program.source.name,
        "plan": None if program.plan is None else program.plan.to_json(),
        "layers": layers,
        "costs": None if program.plan is None else costs(program, bits=bits, accumulators=accumulators, table=table),
        "bench": _kept(program),
    }


def keep_bench(program: Program, result: dict[str, Any]) -> None:
    """Leave what `bench` found in the folder, for reports."""
    if program.folder is not None:
        write_text(Path(program.folder) / BENCH, json.dumps(result, indent=1) + "\n")


def _kept(program: Program) -> dict[str, Any] | None:
    file = None if program.folder is None else Path(program.folder) / BENCH
    if file is None or not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if found["rows"] else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AnncvtError(f"damaged: {error!r}", where=str(file), fix="run `anncvt bench` again") from error


def _images(program: Program, data: DataChoice | None, progress: Progress) -> Images | None:
    try:
        choice = chosen(program, data)
        return choice.open("test", program.preprocess, at_most=IMAGES, labelled=False, progress=progress)
    except AnncvtError as error:
        if data is not None and data.spec is not None:
            raise
        progress.note(f"no activations will be shown: {error}")
        return None
