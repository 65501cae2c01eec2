"""A user's own transform of training images, such as one of ``torchvision.transforms.v2``, made repeatable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from anncvt.architecture import callable_of
from anncvt.errors import AnncvtError
from anncvt.zoo import import_torchvision

Transform = Callable[[Tensor], Tensor]


def load_transform(name: str) -> Transform:
    """What ``module:factory`` returns when it is called without arguments: a callable on one image.

    ``module`` is installed, or a ``.py`` file in the current folder.

    Raises:
        AnncvtError: there is no such thing, or it cannot be called.
    """
    module, _, factory = name.partition(":")
    if module.partition(".")[0] == "torchvision":
        import_torchvision()  # which cannot be imported beside every build of torch without help
    with callable_of(module, factory, [Path.cwd()]) as (make, _):
        try:
            transform = make()
        except Exception as error:  # whatever the user's code raises
            raise AnncvtError(f"{name} failed: {type(error).__name__}: {error}", fix="name a factory") from error
    if not callable(transform):
        raise AnncvtError(f"{name} makes no transform but: {type(transform).__name__}", fix="name a factory")
    return transform


def transformed(pixels: Tensor, transform: Transform, seeds: Sequence[int]) -> Tensor:
    """Each image ``[C, H, W]`` uint8 of ``pixels`` changed on its own, torch's random state being that of its seed.

    Raises:
        AnncvtError: the transform fails, or makes another shape or type of an image.
    """
    changed = []
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(pixels, seeds, strict=True):
            torch.manual_seed(seed)
            try:
                changed.append(transform(image))
            except Exception as error:  # whatever the user's code raises
                raise AnncvtError(
                    f"the transform failed: {type(error).__name__}: {error}",
                    fix=f"it is given one image of {list(image.shape)}, uint8",
                ) from error
            if changed[-1].shape != image.shape or changed[-1].dtype != image.dtype:
                raise AnncvtError(
                    f"the transform makes {list(changed[-1].shape)} {changed[-1].dtype} of an image of "
                    f"{list(image.shape)} {image.dtype}",
                    fix="leave size and type as they are; scaling and normalising come afterwards",
                )
    return torch.stack(changed)
