"""A trial of the kernels on the device they are to run on: what disagrees with plain torch is not used."""

from __future__ import annotations

import torch
from torch import Tensor

from anncvt.runtime import fallback
from anncvt.runtime.epilogue import Epilogue
from anncvt.runtime.kernels.cuda import launch

#: Channels, filters, groups, stride: with vectors of four, alone and shared by several blocks; without; depthwise.
_LAYERS = ((20, 24, 1, 1), (64, 24, 1, 1), (5, 7, 1, 2), (12, 12, 12, 2))


def disagreement(device: torch.device, dtype: torch.dtype) -> str | None:
    """Which result of small layers differs from that of plain torch on the same device; ``None`` if none does.

    Takes some milliseconds once kernels are compiled, and waits for the device.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    for channels, filters, groups, stride in _LAYERS:

        def random(*shape: int) -> Tensor:
            # Few distinct values, so that some weights equal what they meet; all are exact in every type.
            whole = torch.randint(-6, 7, shape, generator=generator, device="cpu")
            return (whole.to(torch.float32) / 4).to(device)

        x, weight = random(2, channels, 9, 7), random(filters, channels // groups, 3, 3)
        config = ([stride] * 2, [1, 1], [1, 1], groups)
        y = fallback.forward(x, weight, *config)
        g = random(*y.shape)
        halves, given = (x.to(dtype), g.to(dtype)), (weight, *config)
        epilogue = Epilogue(random(filters) / 64, random(filters), g, -1.0, 3.0)
        pairs = {
            "forward": (launch.forward(halves[0], *given), y),
            "fused forward": (
                launch.fused_forward(halves[0], *given, epilogue),
                fallback.fused_forward(x, *given, epilogue),
            ),
            "weight gradient": (
                launch.exact_weight_gradient(halves[1], halves[0], *given),
                fallback.exact_weight_gradient(g, x, *given),
            ),
        }
        for gradient in ("full", "exact"):
            pairs[f"{gradient} input gradient"] = (
                launch.input_gradient(halves[1], halves[0], *given, gradient),
                fallback.input_gradient(g, x, *given, gradient),
            )
        for name, (actual, expected) in pairs.items():
            limit = max(1e-5, torch.finfo(dtype).eps) * float(expected.abs().max())
            if not float((actual.float() - expected).abs().max()) <= limit:  # a NaN is a difference
                return f"the {name} of a layer of {channels} channels differs from that of plain torch"
    return None
