"""How well every layer does, and what its numbers look like: the facts behind a report."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from anncvt.distributions import Distribution, distribution, standardised
from anncvt.images import Images
from anncvt.modes import eval_mode
from anncvt.passes.objectives import unexplained
from anncvt.passes.pairing import outputs_of, pairs
from anncvt.program import Program
from anncvt.progress import SILENT, Progress

#: Images of one pass; only one is made.
IMAGES = 64


@torch.no_grad()
def inspect(program: Program, images: Images | None, *, progress: Progress = SILENT) -> dict[str, Any]:
    """Every adder layer against the convolution it stands for.

    Args:
        program: with a student.
        images: the first :data:`IMAGES` are looked at; None: weights alone.

    Returns:
        ``{"layers": [{"name", "weights", "r2", "error", "activations"}], "overall": {...}, "images"}``. ``r2`` is the
        share of the variance of the CNN's output there (after BatchNorm) that the adder network has, ``error`` the root
        mean square of the difference; ``weights`` and ``activations`` (the layer's outputs before BatchNorm) are
        distributions. ``overall`` has the distributions of all layers together, each standardised, of both networks.
    """
    paired = pairs(program)
    assert program.student is not None
    layers: list[dict[str, Any]] = [
        {"name": pair.name, "weights": _plain(distribution(pair.adder.weight))} for pair in paired
    ]
    overall = {
        "adder weights": _plain(distribution(standardised([pair.adder.weight for pair in paired]))),
        "CNN weights": _plain(distribution(standardised([_weight(pair.conv) for pair in paired]))),
    }
    count = 0 if images is None else min(len(images), IMAGES)
    if images is not None and count:
        batch = images.batch(torch.arange(count), program.preprocess)
        ends = [module for pair in paired for module in (pair.conv, pair.conv_end, pair.adder_end, pair.adder)]
        with progress.task("looking at layers", None), outputs_of(dict.fromkeys(ends)) as seen:
            with eval_mode(program.teacher), eval_mode(program.student):
                program.teacher(batch)
                program.student(batch)
            for row, pair in zip(layers, paired, strict=True):
                wanted, got = seen[pair.conv_end][0], seen[pair.adder_end][0]
                lost = float(unexplained(got, wanted))
                row |= {"r2": 1 - lost, "error": float((got - wanted).square().mean().sqrt())}
                row["activations"] = _plain(distribution(seen[pair.adder][0]))
            responses = [seen[pair.adder][0] for pair in paired]
            overall |= {
                "adder outputs": _plain(distribution(standardised(responses))),
                "CNN outputs": _plain(distribution(standardised([seen[pair.conv][0] for pair in paired]))),
            }
    return {"layers": layers, "overall": overall, "images": count}


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _plain(found: Distribution | None) -> dict[str, Any] | None:
    return None if found is None else found.to_json()
