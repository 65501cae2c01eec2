"""How images become input: what the user says, else what the model collection says, else the usual defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from anncvt import zoo
from anncvt.errors import AnncvtError
from anncvt.program import Preprocess
from anncvt.progress import SILENT, Progress

if TYPE_CHECKING:
    from torch import nn
    from torch.nn.modules.conv import _ConvNd


def choose_preprocess(
    network: nn.Module,
    arch: str | None,
    *,
    input_size: int | tuple[int, ...] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    progress: Progress = SILENT,
) -> Preprocess:
    """Flags, then the zoo's configuration, then defaults; what was assumed goes to ``progress``.

    Raises:
        AnncvtError: the flags do not fit the network's channels or each other.
    """
    prefix, _, name = (arch or "").partition(":")
    known = zoo.stated_preprocess(network)
    if prefix == "torchvision":
        known = zoo.torchvision_preprocess(name)
    stem = _stem(network)
    channels = stem.in_channels if stem is not None else 3
    assumed = []
    # The first convolution that is registered need not be the first that runs.
    possible = (channels, *([known.input_size[0]] if known else []))
    size = _size(input_size, possible, len(stem.kernel_size) if stem is not None else 2)
    if size is None:
        size = known.input_size if known else _default_size(stem, channels)
        if not known:
            assumed.append(f"input size {'x'.join(map(str, size))} (--input-size)")
    usual = (zoo.IMAGENET_MEAN, zoo.IMAGENET_STD) if size[0] == 3 else ((0.0,) * size[0], (1.0,) * size[0])
    if mean is None:
        mean = known.mean if known else usual[0]
        if not known:
            assumed.append(f"mean {_list(mean)} (--mean)")
    if std is None:
        std = known.std if known else usual[1]
        if not known:
            assumed.append(f"std {_list(std)} (--std)")
    mean, std = (_per_channel(flag, values, size[0]) for flag, values in (("--mean", mean), ("--std", std)))
    if any(value == 0 for value in std):
        raise AnncvtError("--std must not contain 0", fix="give the standard deviation of pixels scaled to [0, 1]")
    if assumed:
        progress.note(f"assumed: {', '.join(assumed)}")
    return Preprocess(size, mean, std)


def _stem(network: nn.Module) -> _ConvNd | None:
    from torch.nn.modules.conv import _ConvNd

    return next((cast("_ConvNd", m) for m in network.modules() if isinstance(m, _ConvNd)), None)


def _size(given: int | tuple[int, ...] | None, possible: tuple[int, ...], ndim: int) -> tuple[int, ...] | None:
    channels = possible[0]
    if given is None:
        return None
    values = (given,) if isinstance(given, int) else tuple(given)
    if any(value < 1 for value in values):
        raise AnncvtError(f"input size {_list(values)} is not positive", fix="for example --input-size 3x224x224")
    if len(values) == 1:
        return (channels, *values * ndim)
    if len(values) == ndim:
        return (channels, *values)
    if len(values) == ndim + 1:
        if values[0] not in possible:
            raise AnncvtError(
                f"the first convolution reads {channels} channels, not {values[0]}",
                fix=f"for example --input-size {'x'.join(map(str, (channels, *values[1:])))}",
            )
        return values
    raise AnncvtError(
        f"input size {_list(values)} has {len(values)} numbers; the network wants {ndim} or {ndim + 1}",
        fix="give channels and the spatial size, for example --input-size 3x224x224",
    )


def _default_size(stem: _ConvNd | None, channels: int) -> tuple[int, ...]:
    """Networks whose first convolution keeps the resolution are made for small images (CIFAR's 32x32)."""
    if stem is None:
        return (channels, 224, 224)
    small = all(step == 1 for step in stem.stride)
    if len(stem.kernel_size) == 3 and not small:  # videos: frames, height, width
        return (channels, zoo.FRAMES, 112, 112)
    pixels = 32 if small else 224
    return (channels, *(pixels,) * len(stem.kernel_size))


def _per_channel(flag: str, values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == 1:
        values = tuple(values) * channels
    if len(values) != channels:
        raise AnncvtError(f"{flag} has {len(values)} numbers for {channels} channels", fix=f"give {channels} or one")
    return tuple(float(value) for value in values)


def _list(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)
