"""The networks of a run: where student and teacher start, and the average that the student leaves behind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from anncvt.copies import copied
from anncvt.errors import AnncvtError
from anncvt.program import Program
from anncvt.swap import swap


def initialise(program: Program, init: str) -> nn.Module:
    """The student with the weights it starts from; changed in place.

    Args:
        init: "oneshot" (as it is), "copy" (the CNN's weights, what is done without a calibration) or "fresh".

    Raises:
        AnncvtError: "fresh", and the network has parameters that nothing says how to initialise.
    """
    assert program.student is not None and program.plan is not None
    if init == "copy":
        source = copied(program.teacher)
        swap(source, program.plan)
        program.student.load_state_dict(source.state_dict())
    elif init == "fresh":
        reset(program.student)
    return program.student


def reset(network: nn.Module) -> None:
    """Initialise every layer as its class does it, from torch's random state.

    Raises:
        AnncvtError: parameters that belong to no class of layers which knows how.
    """
    for name, module in network.named_modules():
        own = getattr(module, "reset_parameters", None)
        if callable(own):
            own()
        elif any(True for _ in module.parameters(recurse=False)):
            raise AnncvtError(
                f"{type(module).__name__} does not say how its parameters are initialised",
                where=name,
                fix="start from the pretrained weights: --init oneshot, --teacher frozen or progressive",
            )


def average(network: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights, and of the statistics of BatchNorm that belong to them.

    The decay rises from 0.1 to ``decay``, as ``(1 + n) / (10 + n)`` after n updates, so that the average does not
    hang on to the weights it started from.
    """

    @torch.no_grad()
    def blend(averages: Sequence[Tensor], now: Sequence[Tensor], updates: int | Tensor) -> None:
        keep = min(decay, (1 + int(updates)) / (10 + int(updates)))
        for mean, value in zip(averages, now, strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, 1 - keep)
            else:
                mean.copy_(value)  # counts

    return AveragedModel(network, multi_avg_fn=blend, use_buffers=True)
