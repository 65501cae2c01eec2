"""Accuracy of a network on a labelled data set."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from anncvt.errors import AnncvtError
from anncvt.images import Images
from anncvt.modes import eval_mode
from anncvt.passes.fuse import for_inference, pays
from anncvt.passes.pairing import channels_last
from anncvt.program import Preprocess
from anncvt.progress import SILENT, Progress


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    images: Images,
    preprocess: Preprocess,
    *,
    batch_size: int = 256,
    progress: Progress = SILENT,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent, ``{"top1": ..., "top5": ...}``.

    Runs in eval mode on the network's own device, on GPUs with its adders fused with what follows them, and leaves
    every module's mode as it was. With fewer than five classes "top5" counts as many as there are.

    Raises:
        AnncvtError: no labels, labels outside the network's outputs, or a network that does not take the images.
    """
    parameter = next(iter(network.parameters()), None)
    device = torch.device("cpu") if parameter is None else parameter.device

    def batch(indices: Tensor) -> Tensor:
        x = images.batch(indices, preprocess).to(device)
        return x if device.type == "cpu" else channels_last(x)

    def scores(indices: Tensor) -> Tensor:
        return _forward(running, batch(indices), images.name)

    with eval_mode(network):
        running = network
        if pays(device) and len(images):
            _forward(network, first := batch(torch.arange(min(2, len(images)))), images.name)  # it takes such images
            running = for_inference(network, first, progress)
        return evaluate_scores(scores, images, batch_size=batch_size, progress=progress)


def evaluate_scores(
    scores: Callable[[Tensor], Tensor], images: Images, *, batch_size: int = 256, progress: Progress = SILENT
) -> dict[str, float]:
    """:func:`evaluate` for anything: ``scores`` gives the class scores ``[B, classes]`` of the images at ``[B]``.

    Raises:
        AnncvtError: no labels, or labels outside the classes.
    """
    if images.labels is None:
        raise AnncvtError("the images have no labels", where=images.name, fix="evaluate on a data set with labels")
    if batch_size < 1:
        raise AnncvtError(f"a batch of {batch_size} images", fix="give --batch-size a positive number")
    top1 = top5 = 0
    with progress.task("evaluating", len(images)) as task:
        for indices in torch.arange(len(images)).split(batch_size):
            logits = scores(indices)
            labels = images.labels[indices].to(logits.device)
            _check_labels(labels, logits, images)
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            top1 += int(best[:, 0].sum())
            top5 += int(best.any(dim=1).sum())
            task.advance(len(indices))
    return {"top1": 100 * top1 / len(images), "top5": 100 * top5 / len(images)}


def _forward(network: nn.Module, batch: Tensor, name: str) -> Tensor:
    size = "x".join(map(str, batch.shape[1:]))
    try:
        logits = network(batch)
    except (RuntimeError, ValueError, AssertionError) as error:  # as layers, ops and models report a wrong shape
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise AnncvtError(
            f"the network does not take {size} images: {reason}",
            where=name,
            fix="set the size it was trained for with --input-size CHANNELSxHEIGHTxWIDTH",
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(batch):
        shape = "x".join(map(str, logits.shape)) if isinstance(logits, Tensor) else type(logits).__name__
        raise AnncvtError(
            f"the network's output for {len(batch)} images of {size} is {shape}, accuracy needs one row of class "
            "scores an image",
            where=name,
            fix="evaluate a classifier, at the size it was trained for (--input-size)",
        )
    return logits


def _check_labels(labels: Tensor, logits: Tensor, images: Images) -> None:
    low, high, outputs = int(labels.min()), int(labels.max()), logits.shape[1]
    if low < 0 or high >= outputs:
        raise AnncvtError(
            f"the network has {outputs} outputs (0 to {outputs - 1}) and the data a label {low if low < 0 else high}",
            where=images.name,
            fix="use the data set that the network was trained for",
        )
