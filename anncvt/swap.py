"""Put a plan into effect: convolutions become adders, in place, by qualified name."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from anncvt.errors import AnncvtError
from anncvt.program import LayerPlan, Plan

if TYPE_CHECKING:
    from torch import nn
    from torch.nn.modules.conv import _ConvNd


def swap(network: nn.Module, plan: Plan) -> int:
    """Replace the planned convolutions of ``network`` by adders on the same Parameter objects.

    The names in ``state_dict()`` stay; a layer with ``insert_bn`` adds ``NAME.norm.*``. A module that is registered
    under several names is replaced once and shared again. Adders that are in place already are left alone.

    Returns:
        How many modules were replaced.

    Raises:
        AnncvtError: the plan was made for another architecture. Nothing is changed then.
    """
    import torch

    from anncvt.nn import _AdderNd, adder_class

    named = dict(network.named_modules(remove_duplicate=False))
    planned = {layer.name: _checked(layer, named.get(layer.name)) for layer in plan.swapped}
    adders: dict[int, nn.Module] = {}
    for layer in plan.swapped:
        conv = planned[layer.name]
        if not isinstance(conv, _AdderNd) and id(conv) not in adders:
            convolution = cast("_ConvNd", conv)
            maker = adder_class(len(convolution.kernel_size))
            with torch.random.fork_rng(devices=[]):  # its own initial weights are thrown away
                adders[id(conv)] = maker.from_conv(convolution, norm=layer.insert_bn)
    for name, module in named.items():
        if id(module) in adders:
            owner, _, leaf = name.rpartition(".")
            setattr(named[owner], leaf, adders[id(module)])
    return len(adders)


def _checked(layer: LayerPlan, module: nn.Module | None) -> nn.Module:
    """The module a plan names, if it still is the convolution (or already the adder) that was planned."""
    from torch.nn.modules.conv import _ConvNd

    from anncvt.nn import _AdderNd

    if not isinstance(module, (_ConvNd, _AdderNd)):
        found = "nothing" if module is None else f"a {type(module).__name__}"
        raise _changed(f"{layer.name} was a {layer.kind}, now there is {found}")
    geometry = (tuple(module.kernel_size), tuple(module.stride), module.groups)
    if geometry != (layer.kernel, layer.stride, layer.groups):
        raise _changed(
            f"{layer.name} had kernel {layer.kernel}, stride {layer.stride}, groups {layer.groups}, "
            f"now {geometry[0]}, {geometry[1]}, {geometry[2]}"
        )
    return module


def _changed(what: str) -> AnncvtError:
    return AnncvtError(
        f"the architecture is not the one that was planned: {what}",
        fix="use the same version of its code, or convert again",
    )
