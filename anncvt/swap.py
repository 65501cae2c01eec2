"""Put a plan into effect: layers become adders, in place, by qualified name."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, cast

from anncvt.errors import AnncvtError
from anncvt.program import LayerPlan, Plan

if TYPE_CHECKING:
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    from anncvt.nn import _AdderNd


def swap(network: nn.Module, plan: Plan) -> int:
    """Replace the planned layers of ``network`` by adders on the same Parameter objects.

    The names in ``state_dict()`` stay; a layer with ``insert_bn`` adds ``NAME.norm.*``. A layer that computes its
    weight from others (weight standardisation, weight norm) becomes an adder of the weight as it is now,
    ``NAME.weight``, and so does one with several weights per input. A module that is registered under several names is
    replaced once and shared again; layers that share nothing but a weight get one each, because what suits an adder
    depends on its own inputs. Adders that are in place already are left alone.

    Adders and the norms that follow them learn, also where the network was frozen.

    Returns:
        How many modules were replaced.

    Raises:
        AnncvtError: the plan was made for another architecture. Nothing is changed then.
    """
    import torch

    from anncvt.nn import _AdderNd

    named = dict(network.named_modules(remove_duplicate=False))
    planned = {layer.name: _checked(layer, named.get(layer.name)) for layer in plan.swapped}
    holders = Counter(id(p) for module in network.modules() for p in module.parameters(recurse=False))
    adders: dict[int, nn.Module] = {}
    for layer in plan.swapped:
        module = planned[layer.name]
        if not isinstance(module, _AdderNd) and id(module) not in adders:
            with torch.random.fork_rng(devices=[]):  # its own initial weights are thrown away
                adder = adders[id(module)] = _adder(layer, module)
                for leaf, parameter in [*adder.named_parameters(recurse=False)]:
                    if holders[id(parameter)] > 1:  # of several modules
                        setattr(adder, leaf, torch.nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
    for name, module in named.items():
        if id(module) in adders:
            owner, _, leaf = name.rpartition(".")
            setattr(named[owner], leaf, adders[id(module)])
    for layer in plan.swapped:
        network.get_submodule(layer.name).requires_grad_()
        if layer.bn in named:
            named[layer.bn].requires_grad_()
    return len(adders)


def _adder(layer: LayerPlan, module: nn.Module) -> _AdderNd:
    from torch import nn

    from anncvt.convolution import NoForm, form_of
    from anncvt.nn import AdderLinear, adder_class

    if isinstance(module, nn.Linear):
        return AdderLinear.from_linear(module, norm=layer.insert_bn, copies=layer.copies)
    conv = cast("_ConvNd", module)
    try:
        form = form_of(conv)
    except NoForm as reason:
        raise _changed(f"{layer.name} cannot become an adder any more ({reason})") from reason
    weight = nn.Parameter(form.weight.clone()) if form.folded else None
    adder = adder_class(len(conv.kernel_size)).from_conv(conv, weight=weight, norm=layer.insert_bn, copies=layer.copies)
    adder.same = form.same
    return adder


def _checked(layer: LayerPlan, module: nn.Module | None) -> nn.Module:
    """The module a plan names, if it still is the layer (or already the adder) that was planned."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    from anncvt.nn import _AdderNd

    if isinstance(module, nn.Linear) and layer.kind == "Linear":
        return module
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
