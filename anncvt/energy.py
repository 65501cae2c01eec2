"""Energy of single operations in a given technology: what the costs of a network are counted with.

The default is M. Horowitz, Computing's Energy Problem (and what we can do about it), ISSCC 2014: 45 nm, 0.9 V.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anncvt.errors import AnncvtError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Widths in bits -> picojoules.
Curve = Mapping[int, float]

OPERATIONS = ("add", "multiply", "shift")


@dataclass(frozen=True)
class EnergyTable:
    """Picojoules of an operation by kind of number and width, and of moving a byte."""

    name: str
    citation: str
    integer: Mapping[str, Curve]  # add, multiply, shift
    floating: Mapping[str, Curve]  # add, multiply
    memory: Mapping[str, float] = field(default_factory=dict)  # weights, activations: picojoules a byte

    def picojoules(self, operation: str, bits: int, *, floating: bool = False) -> float:
        """One operation of so many bits. Between the table's widths (and beyond) a power law is drawn through the two
        nearest, so that 8 bits at 0.2 and 32 at 3.1 give 16 about 0.79.

        Raises:
            AnncvtError: the table does not have the operation.
        """
        curve = (self.floating if floating else self.integer).get(operation)
        if not curve:
            kind = "floating" if floating else "integer"
            raise AnncvtError(
                f"the table has no {operation} of {kind} numbers",
                where=self.name,
                fix=f"add a table [{kind}.{operation}] of bits = picojoules",
            )
        if bits in curve:
            return curve[bits]
        if len(curve) == 1:
            return next(iter(curve.values()))
        (a, low), (b, high) = sorted(sorted(curve.items()), key=lambda point: abs(math.log(point[0] / bits)))[:2]
        return low * (bits / a) ** (math.log(high / low) / math.log(b / a))

    def joules(self, adds: int, multiplications: int) -> float:
        """Of so many additions and multiplications of 32-bit floats, without memory."""
        terms = (("add", adds), ("multiply", multiplications))
        return sum(count * self.picojoules(name, 32, floating=True) for name, count in terms) * 1e-12


#: Memory: 64 bits from a cache of 1 MB cost 100 pJ, from DRAM 1.3 nJ (the lower end).
HOROWITZ_45NM = EnergyTable(
    "45 nm, 0.9 V",
    "M. Horowitz, Computing's Energy Problem (and what we can do about it), ISSCC 2014; "
    "shifts: H. You et al., ShiftAddNet, NeurIPS 2020, table 1",
    integer={
        "add": {8: 0.03, 32: 0.1},
        "multiply": {8: 0.2, 32: 3.1},
        "shift": {8: 0.024, 16: 0.057, 32: 0.13},
    },
    floating={"add": {16: 0.4, 32: 0.9}, "multiply": {16: 1.1, 32: 3.7}},
    memory={"weights": 1300 / 8, "activations": 100 / 8},
)


def load_table(path: str | Path) -> EnergyTable:
    """An energy table from a TOML file.

    ::

        name = "7 nm"
        citation = "where the numbers are from"
        [integer.add]        # bits = picojoules
        8 = 0.007
        32 = 0.03
        [integer.multiply]
        8 = 0.07
        [integer.shift]
        32 = 0.01
        [floating.add]
        32 = 0.38
        [floating.multiply]
        32 = 1.31
        [memory]             # picojoules a byte
        weights = 100.0
        activations = 5.0

    Raises:
        AnncvtError: not readable, not TOML, or not such a table.
    """
    fix = "see docs/energy.md for an example"
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        table = EnergyTable(
            str(data.pop("name")),
            str(data.pop("citation")),
            _curves(data.pop("integer"), OPERATIONS),
            _curves(data.pop("floating"), OPERATIONS[:2]),
            {name: _positive(value) for name, value in data.pop("memory").items()},
        )
    except OSError as error:
        raise AnncvtError(f"cannot be read: {error.strerror or error}", where=str(path), fix=fix) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise AnncvtError(f"not TOML: {error}", where=str(path), fix=fix) from error
    except KeyError as error:
        raise AnncvtError(f"{error.args[0]} is missing", where=str(path), fix=fix) from error
    except (AttributeError, TypeError, ValueError) as error:
        raise AnncvtError(f"not an energy table: {error}", where=str(path), fix=fix) from error
    if data or set(table.memory) != {"weights", "activations"}:
        odd = ", ".join(data) or "[memory], which takes weights and activations"
        raise AnncvtError(f"not an energy table: what is {odd}?", where=str(path), fix=fix)
    return table


def _curves(tables: dict[str, Any], names: tuple[str, ...]) -> dict[str, dict[int, float]]:
    unknown = set(tables) - set(names)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))} is none of {', '.join(names)}")
    curves = {name: {int(b): _positive(pj) for b, pj in tables[name].items()} for name in names}
    if any(bits < 1 for curve in curves.values() for bits in curve):
        raise ValueError("widths are positive numbers of bits")
    return curves


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{value} is not a positive number of picojoules")
    return number
