"""What arithmetic costs in silicon.

Energy per operation at 45 nm, 0.9 V: M. Horowitz, "Computing's Energy Problem (and what we can do about it)", ISSCC
2014, figure 1.1.9. It is about hardware made for the operation; processors with multipliers save nothing.
"""

from __future__ import annotations

#: Picojoules of one multiplication and one addition.
PICOJOULES = {
    "float32": (3.7, 0.9),
    "float16": (1.1, 0.4),
    "int32": (3.1, 0.1),
    "int8": (0.2, 0.03),
}


def energy(adds: int, muls: int, kind: str = "float32") -> float:
    """Joules of so many additions and multiplications, without memory accesses."""
    mul, add = PICOJOULES[kind]
    return (muls * mul + adds * add) * 1e-12
