"""A whole network in integers: its steps in order, on disk (``integer.json`` and ``integer.safetensors``), and run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anncvt.errors import AnncvtError
from anncvt.files import atomic_path, write_text
from anncvt.runtime.integer import ACCUMULATING, OPS, Array, Epilogue, Grid, Step, Window, execute

FORMAT = 1
DESCRIPTION, ARRAYS = "integer.json", "integer.safetensors"
#: The network's input among the names of the tensors.
INPUT = "input"
ACCUMULATOR_BITS = 32


@dataclass(frozen=True)
class IntegerNetwork:
    """Pixels to integer logits. The last step's output are the logits, ``[N, classes, 1, 1]`` int32.

    ``table`` turns pixels into integers on ``input_grid``: ``q[n, c, y, x] = table[c, pixel[n, c, y, x]]``.
    """

    steps: tuple[Step, ...]
    input_shape: tuple[int, int, int]
    input_grid: Grid
    table: Array  # [C, 256] uint8
    settings: dict[str, Any]  # bits, groups, range, ... it was made with

    def enter(self, pixels: Array) -> Array:
        """``[N, C, H, W]`` uint8 pixels as the network's integers, uint8.

        Raises:
            AnncvtError: not the network's input size, or not uint8.
        """
        if pixels.dtype != np.uint8 or pixels.shape[1:] != self.input_shape:
            raise AnncvtError(
                f"the integer network takes uint8 pixels [N, {', '.join(map(str, self.input_shape))}], "
                f"got {pixels.dtype} {list(pixels.shape)}",
                fix="open the images at the network's input size",
            )
        return np.stack([self.table[c][pixels[:, c]] for c in range(self.input_shape[0])], 1)

    def step(self, name: str) -> Step:
        """The step of that name."""
        return next(step for step in self.steps if step.name == name)

    def grid(self, name: str) -> Grid:
        """That of a tensor."""
        return self.input_grid if name == INPUT else self.step(name).grid

    def last_readers(self) -> dict[str, list[str]]:
        """After which step which tensors are not needed any more."""
        last: dict[str, str] = {}
        for step in self.steps:
            for source in sources(step):
                last[source] = step.name
        spent: dict[str, list[str]] = {}
        for source, reader in last.items():
            spent.setdefault(reader, []).append(source)
        return spent


#: A step's integers: its name, its output and (where it has one) its accumulator.
Watcher = Callable[[Step, Any, Any], None]


def sources(step: Step) -> tuple[str, ...]:
    """The tensors a step reads."""
    return (*step.inputs, *(() if step.residual is None else (step.residual,)))


def run(network: IntegerNetwork, pixels: Array, watch: Watcher | None = None) -> Array:
    """The reference execution: ``[N, C, H, W]`` uint8 pixels -> ``[N, classes]`` int32 logits, in numpy.

    Args:
        watch: called after each step with the step, its output and its accumulators (or None).

    Raises:
        AnncvtError: ``pixels`` are not the network's.
    """
    values: dict[str, Array] = {INPUT: network.enter(pixels)}
    spent = network.last_readers()
    for step in network.steps:
        residual = None if step.residual is None else values[step.residual]
        values[step.name], accumulators = execute(step, [values[name] for name in step.inputs], residual)
        if watch is not None:
            watch(step, values[step.name], accumulators)
        for name in spent.get(step.name, ()):
            del values[name]
    return values[network.steps[-1].name].reshape(len(pixels), -1)


def accumulator_range(network: IntegerNetwork, step: Step) -> tuple[Array, Array]:
    """The least and the greatest accumulator each output channel can reach, whatever the input: ``[O]`` int64 each.

    Exact for an adder: a tap ``|x - w|`` is at most ``max(w, top - w)`` with x in 0..top. Partial sums stay within
    the range too, in any order of the taps, once it is extended to contain 0.
    """
    tops = [network.grid(name).top for name in step.inputs]
    if step.op == "adder":
        assert step.weight is not None and step.filter_group is not None
        top = np.asarray(tops)[step.filter_group].reshape(-1, 1, 1, 1)
        weight = step.weight.astype(np.int64)
        return -np.maximum(weight, top - weight).sum((1, 2, 3)), np.zeros(len(weight), np.int64)
    channels = step.shape[0]
    if step.op == "convolution":
        assert step.weight is not None
        weight, zero = step.weight.astype(np.int64), step.pad_values[0]
        ends = np.stack([-zero * weight, (tops[0] - zero) * weight])
        return ends.min(0).sum((1, 2, 3)), ends.max(0).sum((1, 2, 3))
    taps = step.kernel[0] * step.kernel[1] if step.op == "sum_pool" else 1
    return np.zeros(channels, np.int64), np.full(channels, taps * tops[0], np.int64)


def accumulator_bits(network: IntegerNetwork, step: Step) -> int:
    """The width of a two's complement accumulator that cannot overflow, proven from the weights and the grids."""
    low, high = accumulator_range(network, step)
    return max(signed_bits(int(low.min())), signed_bits(int(high.max())))


def signed_bits(number: int) -> int:
    """Bits of the shortest two's complement form of ``number``."""
    return (number if number >= 0 else -number - 1).bit_length() + 1


def total_bits(network: IntegerNetwork, step: Step) -> int:
    """The width of the sum in the epilogue, before the shift, that cannot overflow."""
    assert step.epilogue is not None
    low, high = accumulator_range(network, step)
    m, b = step.epilogue.multiplier.astype(object), step.epilogue.bias.astype(object)
    rest = 0 if step.residual is None else step.epilogue.residual_multiplier * network.grid(step.residual).top
    half = 1 << (step.epilogue.shift - 1)
    ends = [end.astype(object) * m + b for end in (low, high)]
    least = min(int(np.minimum(*ends).min()), 0) + min(rest, 0)
    most = max(int(np.maximum(*ends).max()), 0) + max(rest, 0) + half
    return max(signed_bits(least), signed_bits(most))


def verify(network: IntegerNetwork) -> None:
    """Prove that nothing overflows: accumulators in int32, epilogues in int64.

    Raises:
        AnncvtError: a layer is too wide for that.
    """
    for step in network.steps:
        if step.op in ACCUMULATING:
            bits = accumulator_bits(network, step)
            if bits > ACCUMULATOR_BITS or total_bits(network, step) > 64:
                raise AnncvtError(
                    f"its accumulator can take {bits} bits, 32 are there",
                    where=step.name,
                    fix="quantize to fewer bits (--bits)",
                )


def describe(network: IntegerNetwork) -> dict[str, Any]:
    """Everything but the arrays, as JSON."""
    return {
        "format": FORMAT,
        "settings": network.settings,
        "input": {"shape": list(network.input_shape), "grid": dataclasses.asdict(network.input_grid)},
        "steps": [_describe(step) for step in network.steps],
    }


def arrays(network: IntegerNetwork) -> dict[str, Array]:
    """Every array by name: ``table``, ``NAME/weight``, ``/filter_group``, ``/clamp``, ``/multiplier``, ``/bias``."""
    found = {"table": network.table}
    for step in network.steps:
        parts = {"weight": step.weight, "filter_group": step.filter_group, "clamp": step.clamp}
        if step.epilogue is not None:
            parts |= {"multiplier": step.epilogue.multiplier, "bias": step.epilogue.bias}
        found |= {f"{step.name}/{part}": value for part, value in parts.items() if value is not None}
    return found


def digest(network: IntegerNetwork) -> str:
    """SHA-256 of what the network computes, whatever it was made with."""
    described = {**describe(network), "settings": None}
    found = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, value in sorted(arrays(network).items()):
        found.update(name.encode())
        found.update(np.ascontiguousarray(value).tobytes())
    return found.hexdigest()


def save(network: IntegerNetwork, folder: str | Path) -> None:
    """Write ``integer.safetensors``, then ``integer.json``, atomically each."""
    from safetensors.numpy import save_file

    with atomic_path(Path(folder) / ARRAYS) as temporary:
        save_file({name: np.ascontiguousarray(value) for name, value in arrays(network).items()}, temporary)
    write_text(Path(folder) / DESCRIPTION, json.dumps(describe(network), indent=1) + "\n")


def exists(folder: str | Path) -> bool:
    """Whether ``folder`` holds an integer network."""
    return (Path(folder) / DESCRIPTION).is_file()


def load(folder: str | Path) -> IntegerNetwork:
    """The inverse of :func:`save`.

    Raises:
        AnncvtError: there is none, it is damaged, or it is of a newer version.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    file = Path(folder) / DESCRIPTION
    if not file.is_file():
        raise AnncvtError(
            "there is no integer network", where=str(folder), fix="make one: `anncvt quantize DIR --calibrate DATA`"
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["format"] > FORMAT:
            raise AnncvtError("written by a newer anncvt", where=str(file), fix="upgrade anncvt")
        table = load_file(Path(folder) / ARRAYS)
        shape, grid = data["input"]["shape"], data["input"]["grid"]
        steps = tuple(_step(row, table) for row in data["steps"])
        return IntegerNetwork(steps, tuple(shape), Grid(**grid), table["table"], data["settings"])
    except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise AnncvtError(f"damaged: {error!r}", where=str(file), fix="quantize again") from error


def _describe(step: Step) -> dict[str, Any]:
    row = {
        "name": step.name,
        "op": step.op,
        "inputs": list(step.inputs),
        "residual": step.residual,
        "shape": list(step.shape),
        "grid": dataclasses.asdict(step.grid),
        "window": dataclasses.asdict(step.window),
        "kernel": list(step.kernel),
        "pad_values": list(step.pad_values),
        "channels": list(step.channels),
    }
    if step.epilogue is not None:
        names = ("shift", "low", "high", "residual_multiplier")
        row["epilogue"] = {name: getattr(step.epilogue, name) for name in names}
    return row


def _step(row: dict[str, Any], table: dict[str, Array]) -> Step:
    name = row["name"]
    if row["op"] not in OPS:
        raise ValueError(f"no such operation: {row['op']}")
    window: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row["window"].items()}
    epilogue = None
    if "epilogue" in row:
        epilogue = Epilogue(table[f"{name}/multiplier"], table[f"{name}/bias"], **row["epilogue"])
    return Step(
        name,
        row["op"],
        tuple(row["inputs"]),
        tuple(row["shape"]),
        Grid(**row["grid"]),
        Window(**window),
        tuple(row["kernel"]),
        table.get(f"{name}/weight"),
        table.get(f"{name}/filter_group"),
        tuple(row["pad_values"]),
        epilogue,
        row["residual"],
        tuple(row["channels"]),
        table.get(f"{name}/clamp"),
    )
