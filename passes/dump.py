"""A network's graphs as text, to compare what a pass was given with what it made."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from anncvt.files import write_text
from anncvt.nn import _AdderNd
from anncvt.passes.trace import TracedModule, trace
from anncvt.program import Program


def write(program: Program, path: Path) -> None:
    """Write the graphs of the student (before there is one: of the CNN), its layers and the plan to a text file.

    Raises:
        AnncvtError: ``path`` cannot be written.
    """
    network = program.teacher if program.student is None else program.student
    actions = {} if program.plan is None else {layer.name: layer for layer in program.plan.layers}
    lines = [f"# {program.source.name}, stage {program.stage}: the {'CNN' if program.student is None else 'student'}"]
    for part in trace(network).parts:
        lines += ["", f"## {part.path or 'the network itself'}", *_part(part)]
    lines += ["", "## layers"]
    for name, module in network.named_modules():
        if name in actions or isinstance(module, _AdderNd):
            lines.append(_layer(name, module))
            if name in actions and program.student is None:
                lines.append(f"    {actions[name].action}: {actions[name].reason}")
    write_text(path, "\n".join(lines) + "\n")


def _part(part: TracedModule) -> list[str]:
    if part.graph is None:
        return [f"not traceable: {part.reason}; its children follow"]
    return str(part.graph).strip().splitlines()


def _layer(name: str, module: nn.Module) -> str:
    weight = module.weight.detach() if isinstance(module.weight, Tensor) else None
    shown = f"{name}: {type(module).__name__}({module.extra_repr()})"
    if weight is not None:
        shown += f", weights {float(weight.mean()):.4g} +- {float(weight.std()):.4g}"
    return shown + (", norm inserted" if isinstance(module, _AdderNd) and module.norm is not None else "")
