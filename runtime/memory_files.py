"""Arrays of integers as files that hardware tools and C compilers read."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

#: Hexadecimal digits of each type, two's complement.
DIGITS = {"uint8": 2, "int8": 2, "int32": 8, "int64": 16}


def hex_lines(values: np.ndarray) -> str:
    """One number a line in two's complement, for ``$readmemh`` and ``fscanf``; row-major."""
    return "\n".join(_digits(values)) + "\n"


def coe(values: np.ndarray) -> str:
    """The memory initialisation file of AMD (Xilinx) tools."""
    numbers = ",\n".join(_digits(values))
    return f"memory_initialization_radix=16;\nmemory_initialization_vector=\n{numbers};\n"


def c_array(name: str, values: np.ndarray) -> str:
    """``static const TYPE NAME[N] = {...};`` with one row of numbers for each of the first dimension."""
    dtype = values.dtype.name
    form = "INT64_C({})" if dtype == "int64" else "{}"
    rows = values.reshape(len(values), -1) if values.ndim > 1 else values.reshape(1, -1)
    lines = ",\n".join("    " + ", ".join(form.format(int(v)) for v in row) for row in rows)
    return f"static const {dtype}_t {name}[{values.size}] = {{\n{lines}\n}};\n"


def file_name(index: int, name: str) -> str:
    """A step's name for files: ordered, without characters that file systems or shells dislike."""
    return f"{index:03d}_{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}"


def c_name(index: int, name: str) -> str:
    """A step's name as a C identifier."""
    return f"layer_{index:03d}_{re.sub(r'[^A-Za-z0-9_]', '_', name)}"


def write(path: Path, text: str) -> None:
    """Write ``text``; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii", newline="\n")


def _digits(values: np.ndarray) -> list[str]:
    digits = DIGITS[values.dtype.name]
    unsigned = np.ascontiguousarray(values).view(f"uint{8 * values.dtype.itemsize}").ravel()
    return [f"{int(value):0{digits}x}" for value in unsigned]
