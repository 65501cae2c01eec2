"""anncvt turns a pretrained CNN into an adder neural network (``y = -sum |x - w|``) and ships it.

The names below are imported on first use: ``import anncvt`` alone costs nothing and imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from anncvt.runtime.threads import calm_openmp

if TYPE_CHECKING:
    from anncvt.api import (
        bench,
        check,
        compile,
        convert,
        distill,
        evaluate,
        export,
        export_hardware,
        load,
        plan,
        quantize,
        run,
    )
    from anncvt.errors import AnncvtError
    from anncvt.program import Program

__all__ = [
    "AnncvtError",
    "Program",
    "bench",
    "check",
    "compile",
    "convert",
    "distill",
    "evaluate",
    "export",
    "export_hardware",
    "load",
    "plan",
    "quantize",
    "run",
]

_HOMES = {"AnncvtError": "anncvt.errors", "Program": "anncvt.program"}

calm_openmp()  # has an effect only before torch is imported


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("anncvt")
    elif name in __all__:
        value = getattr(import_module(_HOMES.get(name, "anncvt.api")), name)
    else:
        raise AttributeError(f"module 'anncvt' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
