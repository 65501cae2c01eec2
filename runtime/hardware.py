"""What a chip designer takes home: an integer network as files, with golden vectors and programs that check them.

manifest.json      every file with its sha256, every step with its geometry, grids and proven widths
SEMANTICS.md       what the integers mean: padding, order of weights, rounding, tiles
network.txt        the steps as plain numbers, what reference.c reads
network.npz        every array
table.hex          pixels to integers
layers/            weights, multipliers, biases of each step: .hex and .coe
golden/            inputs, accumulators and outputs of every step for some images: .hex, and golden.npz
network.h          the arrays and geometry as C
reference.c        C99, no dependencies: runs the network and compares every layer
verilog/           one adder layer as hardware with a testbench
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anncvt.errors import AnncvtError
from anncvt.files import atomic_folder
from anncvt.program import versions
from anncvt.progress import SILENT, Progress
from anncvt.runtime import integer_network
from anncvt.runtime.integer import Array, Step
from anncvt.runtime.integer_network import INPUT, IntegerNetwork
from anncvt.runtime.memory_files import c_array, c_name, coe, file_name, hex_lines, write

FORMAT = 1
MANIFEST = "manifest.json"
CHIP = Path(__file__).parent / "chip"
#: The arrays of a step that have files of their own.
PARTS = ("weight", "filter_group", "multiplier", "bias")


@dataclass(frozen=True)
class Golden:
    """What a step computed for one image, without the batch dimension."""

    output: Array
    accumulators: Array | None


def export(
    network: IntegerNetwork,
    path: str | Path,
    pixels: Array,
    *,
    about: dict[str, Any] | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Write the package to the folder ``path``, which appears complete or not at all.

    Args:
        pixels: ``[N, C, H, W]`` uint8, the images of the golden vectors.
        about: what the network is, for the manifest.

    Raises:
        AnncvtError: no images, ``path`` is something else, or it cannot be written.
    """
    if len(pixels) == 0:
        raise AnncvtError("no images for golden vectors", fix="name data with at least one image")
    target = Path(path)
    names = {step.name: file_name(at, step.name) for at, step in enumerate(network.steps)}
    with atomic_folder(target, MANIFEST) as folder, progress.task("writing the package", len(pixels) + 2) as task:
        goldens = []
        for at, image in enumerate(pixels):
            goldens.append(_golden(network, image))
            _write_golden(folder / "golden" / f"{at:03d}", image, goldens[-1], names)
            task.advance()
        _write_npz(folder / "golden" / "golden.npz", dict(_golden_arrays(pixels, goldens)))
        _write_network(folder, network, names, len(pixels))
        task.advance()
        _write_verilog(folder, network, names)
        manifest = {"format": FORMAT, **(about or {}), "images": len(pixels), "versions": versions()}
        manifest |= {
            **integer_network.describe(network),
            "steps": [_row(network, step, names) for step in network.steps],
        }
        manifest["files"] = _checksums(folder)
        write(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=True) + "\n")
        task.advance()
    return target


def _golden(network: IntegerNetwork, image: Array) -> dict[str, Golden]:
    found: dict[str, Golden] = {}

    def keep(step: Step, output: Array, accumulators: Array | None) -> None:
        found[step.name] = Golden(output[0], None if accumulators is None else accumulators[0])

    integer_network.run(network, image[None], keep)
    return {INPUT: Golden(network.enter(image[None])[0], None), **found}


def _write_golden(folder: Path, image: Array, golden: dict[str, Golden], names: dict[str, str]) -> None:
    write(folder / "pixels.hex", hex_lines(image))
    write(folder / "input.hex", hex_lines(golden[INPUT].output))
    for name, file in names.items():
        write(folder / f"{file}.output.hex", hex_lines(golden[name].output))
        accumulators = golden[name].accumulators
        if accumulators is not None:
            write(folder / f"{file}.accumulator.hex", hex_lines(accumulators))


def _golden_arrays(pixels: Array, goldens: list[dict[str, Golden]]) -> Iterator[tuple[str, Array]]:
    yield "pixels", pixels
    for name, first in goldens[0].items():
        yield f"{name}/output", np.stack([golden[name].output for golden in goldens])
        if first.accumulators is not None:
            yield f"{name}/accumulators", np.stack([golden[name].accumulators for golden in goldens])  # type: ignore[misc]


def _write_npz(path: Path, arrays: dict[str, Array]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in arrays.items():
            # A fixed date: the same network gives the same bytes.
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, value, allow_pickle=False)


def _write_network(folder: Path, network: IntegerNetwork, names: dict[str, str], images: int) -> None:
    arrays = integer_network.arrays(network)
    _write_npz(folder / "network.npz", arrays)
    write(folder / "table.hex", hex_lines(network.table))
    for step in network.steps:
        for part in PARTS:
            values = arrays.get(f"{step.name}/{part}")
            if values is not None:
                write(folder / "layers" / f"{names[step.name]}.{part}.hex", hex_lines(values))
                write(folder / "layers" / f"{names[step.name]}.{part}.coe", coe(values))
    write(folder / "network.txt", _as_numbers(network, names, images))
    write(folder / "network.h", _header(network))
    for name in ("reference.c", "SEMANTICS.md"):
        write(folder / name, (CHIP / name).read_text(encoding="ascii"))


def _numbers(network: IntegerNetwork, step: Step) -> list[int]:
    """A step as plain numbers, in the order that reference.c reads: tensors by number, 0 being the input."""
    order = {INPUT: 0, **{other.name: at for at, other in enumerate(network.steps, 1)}}
    window, epilogue = step.window, step.epilogue
    tail = [0, 0, 0, 0]
    if epilogue is not None:
        tail = [epilogue.shift, epilogue.low, epilogue.high, epilogue.residual_multiplier]
    return [
        len(step.inputs),
        *(order[name] for name in step.inputs),
        *(step.pad_values or (0,) * len(step.inputs)),
        -1 if step.residual is None else order[step.residual],
        *step.shape,
        *window.stride,
        *window.padding,
        *window.dilation,
        window.groups,
        *step.kernel,
        step.channels[0],
        *tail,
    ]


def _as_numbers(network: IntegerNetwork, names: dict[str, str], images: int) -> str:
    shape = " ".join(map(str, network.input_shape))
    lines = ["anncvt-integer 1", f"{shape} {images} {len(network.steps)}"]
    lines += [
        f"step {names[step.name]} {step.op} {' '.join(map(str, _numbers(network, step)))}" for step in network.steps
    ]
    return "\n".join(lines) + "\n"


def _header(network: IntegerNetwork) -> str:
    parts = ["/* The arrays of the network; SEMANTICS.md says what they mean. */", "#include <stdint.h>", ""]
    parts.append(c_array("input_table", network.table))
    for at, step in enumerate(network.steps):
        name = c_name(at, step.name)
        c, h, w = step.shape
        parts.append(f"/* {step.op}, output {c}x{h}x{w} */")
        numbers = np.array(_numbers(network, step), np.int32)
        parts.append(c_array(f"{name}_geometry", numbers))
        for part in PARTS:
            values = getattr(step.epilogue if part in ("multiplier", "bias") else step, part, None)
            if values is not None:
                parts.append(c_array(f"{name}_{part}", values))
    return "\n".join(parts)


def _row(network: IntegerNetwork, step: Step, names: dict[str, str]) -> dict[str, Any]:
    """A step for the manifest: its description and what is proven about it."""
    described = next(row for row in integer_network.describe(network)["steps"] if row["name"] == step.name)
    row = {**described, "files": names[step.name]}
    if step.epilogue is not None:
        low, high = integer_network.accumulator_range(network, step)
        row |= {
            "accumulator_range": [int(low.min()), int(high.max())],
            "accumulator_bits": integer_network.accumulator_bits(network, step),
            "total_bits": integer_network.total_bits(network, step),
        }
    return row


def testbench_step(network: IntegerNetwork) -> Step | None:
    """The adder layer with the fewest taps that one-input, one-group hardware can run, or None."""
    fitting = [
        step for step in network.steps if step.op == "adder" and len(step.inputs) == 1 and step.window.groups == 1
    ]
    return min(fitting, key=_taps, default=None)


def _taps(step: Step) -> int:
    assert step.weight is not None
    return int(step.weight.size * step.shape[1] * step.shape[2])


def _write_verilog(folder: Path, network: IntegerNetwork, names: dict[str, str]) -> None:
    step = testbench_step(network)
    if step is None:
        return
    for name in ("adder_layer.v", "adder_layer_tb.v"):
        write(folder / "verilog" / name, (CHIP / name).read_text(encoding="ascii"))
    write(folder / "verilog" / "layer.vh", _layer(network, step, names))


def _layer(network: IntegerNetwork, step: Step, names: dict[str, str]) -> str:
    """Geometry and files of one layer as Verilog macros."""
    assert step.epilogue is not None and step.weight is not None
    source, epilogue, window = step.inputs[0], step.epilogue, step.window
    shape = network.input_shape if source == INPUT else network.step(source).shape
    numbers = {
        **dict(zip("CHW", shape, strict=True)),
        **dict(zip(("O", "OH", "OW"), step.shape, strict=True)),
        **dict(zip(("KH", "KW"), step.kernel, strict=True)),
        **dict(zip(("STRIDE_H", "STRIDE_W"), window.stride, strict=True)),
        **dict(zip(("TOP", "LEFT"), window.padding[:2], strict=True)),
        **dict(zip(("DILATION_H", "DILATION_W"), window.dilation, strict=True)),
        "PAD_VALUE": step.pad_values[0],
        "RESIDUAL": int(step.residual is not None),
        "RESIDUAL_MULTIPLIER": epilogue.residual_multiplier,
        "ACC_BITS": integer_network.accumulator_bits(network, step),
        "TOTAL_BITS": integer_network.total_bits(network, step),
        "SHIFT": epilogue.shift,
        "LOW": epilogue.low,
        "HIGH": epilogue.high,
    }

    def golden(tensor: str) -> str:
        return f"../golden/000/{'input' if tensor == INPUT else names[tensor] + '.output'}.hex"

    layer, first = f"../layers/{names[step.name]}", f"../golden/000/{names[step.name]}"
    files = {
        **{f"{part.upper()}_FILE": f"{layer}.{part}.hex" for part in ("weight", "multiplier", "bias")},
        "INPUT_FILE": golden(source),
        "RESIDUAL_FILE": golden(step.residual or source),
        "ACCUMULATOR_FILE": f"{first}.accumulator.hex",
        "OUTPUT_FILE": f"{first}.output.hex",
    }
    lines = [f"`define {name} {value}" for name, value in numbers.items()]
    lines += [f'`define {name} "{value}"' for name, value in files.items()]
    return f"// {step.name}\n" + "\n".join(lines) + "\n"


def _checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """sha256 and size of every file, by its path in the package."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            found[path.relative_to(folder).as_posix()] = {
                "sha256": hashlib.sha256(content).hexdigest(),
                "bytes": len(content),
            }
    return found
