"""Where a loss that is not finite comes from."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_not_finite(network: nn.Module, x: Tensor) -> str | None:
    """The first parameter that is not finite, else the first layer whose output for ``x`` is not; None: there is none.

    Runs the network once more, in the mode it is in.
    """
    for name, parameter in network.named_parameters():
        if not parameter.isfinite().all():
            return f"the weights {name}"
    found: list[str] = []
    names = {module: name for name, module in network.named_modules()}

    def look(module: nn.Module, inputs: object, output: object) -> None:
        if not found and isinstance(output, Tensor) and not output.isfinite().all():
            found.append(f"the output of {names[module] or 'the network'}")

    hooks = [module.register_forward_hook(look) for module in names]
    try:
        network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return next(iter(found), None)
