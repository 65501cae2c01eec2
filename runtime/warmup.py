"""Compile the kernels that training a network will need before it begins, where their progress can be seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anncvt.modes import eval_mode
from anncvt.nn import AdderConv1d, AdderConv2d, AdderConv3d
from anncvt.progress import SILENT, Progress
from anncvt.runtime import kernels


def compile_kernels(network: nn.Module, input_size: Sequence[int], progress: Progress = SILENT) -> None:
    """Run every adder layer of ``network`` forward and backward once, on one image of zeros.

    Kernels serve any batch size and stay in memory and on disk; without this each is compiled when a first training
    step meets it. Does nothing where no compiled kernel would be used, but says so on a GPU, where it should.

    Args:
        network: whose adder layers have the ``gradient`` they will be trained with.
        input_size: ``(C, H, W)`` of an image.
    """
    parameter = next(network.parameters(), None)
    adders = [m for m in network.modules() if isinstance(m, AdderConv1d | AdderConv2d | AdderConv3d)]
    if not adders or parameter is None:
        return
    if not kernels.usable(parameter):
        if parameter.device.type == "cuda":
            from anncvt.runtime.kernels import cuda

            progress.note(
                f"training on {parameter.device} with slow pure-torch kernels: {cuda.obstacle(parameter.device)}"
            )
        return
    with progress.task("compile kernels", len(adders)) as task:

        def train_once(adder: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            with torch.enable_grad():
                x = inputs[0].detach().requires_grad_()
                torch.autograd.grad(adder.forward(x).sum(), [x, *adder.parameters()], allow_unused=True)
            task.advance()

        hooks = [adder.register_forward_hook(train_once) for adder in adders]
        try:
            with eval_mode(network), torch.no_grad():
                network(torch.zeros(1, *input_size, device=parameter.device))
        finally:
            for hook in hooks:
                hook.remove()
