"""What has to hold after each pass: well-formed graphs, the CNN's shapes, kept layers as they were, finite numbers."""

from __future__ import annotations

import torch
from torch import fx, nn

from anncvt.copies import outline
from anncvt.errors import AnncvtError, first_line
from anncvt.nn import _AdderNd
from anncvt.passes.observe import observe_outline
from anncvt.passes.trace import trace
from anncvt.program import Plan, Program


def rewritten(program: Program, student: nn.Module) -> None:
    """The student runs in both modes, with the teacher's shapes, through every adder, and kept layers are the same.

    Raises:
        AnncvtError: something of this does not hold; it says what, and which layer to keep.
    """
    assert program.plan is not None
    size = program.preprocess.input_size
    before, after = observe_outline(program.teacher, size), observe_outline(student, size)
    if before.output_shapes != after.output_shapes:
        raise _wrong(f"outputs are {after.output_shapes}, were {before.output_shapes}")
    ran = set(after.order)
    asleep = [layer.name for layer in program.plan.swapped if layer.macs and layer.name not in ran]
    if asleep:
        raise _wrong(f"{asleep[0]} is never called: its parent keeps another reference to the layer", asleep[0])
    _unchanged(program.teacher, student, program.plan)
    graphs(student)
    trouble = trouble_in_training(student, size)
    if trouble is not None and trouble_in_training(program.teacher, size) is None:
        raise _wrong(f"it does not run in training mode: {trouble}")


def graphs(network: nn.Module) -> None:
    """Every graph of the network is well formed (:meth:`torch.fx.Graph.lint`).

    Raises:
        AnncvtError: one is not.
    """
    for part in trace(network).parts:
        if part.graph is not None:
            try:
                part.graph.lint()
            except Exception as error:
                raise _wrong(f"the graph of {part.path or 'the network'}: {first_line(error)}") from error


def finite(network: nn.Module) -> None:
    """No parameter or buffer holds NaN or infinity.

    Raises:
        AnncvtError: one does.
    """
    for name, value in network.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise AnncvtError(f"{name} holds NaN or infinity", fix="use other images, or smaller learning rates")


def trouble_in_training(network: nn.Module, size: tuple[int, ...]) -> str | None:
    """Why a pass of two images in training mode fails, if it does."""
    message = ""
    for device in ("meta", "cpu"):
        copy = outline(network, device).train()
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                copy(torch.zeros(2, *size, dtype=next(copy.parameters()).dtype, device=device))
            return None
        except Exception as error:  # arbitrary Python code runs here
            message = f"{type(error).__name__}: {first_line(error)}"
    return message


def _unchanged(teacher: nn.Module, student: nn.Module, plan: Plan) -> None:
    """All that is not swapped has its class and its values; swapped layers on their own weights have those, too."""
    swapped = {layer.name for layer in plan.swapped}
    adders = {id(teacher.get_submodule(name)) for name in swapped}
    adders |= {id(part) for name in swapped for part in teacher.get_submodule(name).modules()}
    for name, module in teacher.named_modules():
        if id(module) not in adders:
            twin = student.get_submodule(name)
            if _class(twin) is not _class(module):
                raise _wrong(f"{name} was a {type(module).__name__} and is a {type(twin).__name__}", name)
            _same_values(name, module, twin)
    for name in swapped:
        conv, adder = teacher.get_submodule(name), student.get_submodule(name)
        if not isinstance(adder, _AdderNd):
            raise _wrong(f"{name} is a {type(adder).__name__}, no adder", name)
        mine, other = (layer.bias if isinstance(layer.bias, torch.Tensor) else None for layer in (conv, adder))
        if (mine is None) != (other is None) or (mine is not None and other is not None and not mine.equal(other)):
            raise _wrong(f"{name}.bias is lost or changed", name)


def _class(module: nn.Module) -> type:
    """Its class; GraphModules have one each."""
    return fx.GraphModule if isinstance(module, fx.GraphModule) else type(module)


def _same_values(name: str, module: nn.Module, twin: nn.Module) -> None:
    for kind in ("named_parameters", "named_buffers"):
        mine, other = (dict(getattr(m, kind)(recurse=False)) for m in (module, twin))
        for leaf, value in mine.items():
            if leaf not in other or not torch.equal(value, other[leaf]):
                raise _wrong(f"{name + '.' if name else ''}{leaf} is lost or changed", name)


def _wrong(what: str, layer: str | None = None) -> AnncvtError:
    fix = f"keep it with --keep '{layer}'" if layer else "keep the layers concerned with --keep GLOB"
    return AnncvtError(f"the converted network is not as planned: {what}", fix=fix)
