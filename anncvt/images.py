"""Pictures in memory: decoding, resizing, normalising, augmenting."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anncvt.errors import AnncvtError
from anncvt.program import Preprocess


@dataclass(frozen=True)
class InputArray:
    """What is in the network's own shape already, ``[C, ...]`` uint8."""

    array: np.ndarray


#: An encoded picture, a picture file, pixels ``[H, W]`` or ``[H, W, 3]`` uint8, or a finished input.
Picture = bytes | Path | np.ndarray | InputArray

#: Share of the resized picture that the centre crop keeps (the usual evaluation transform, 256 -> 224).
CROP = 0.875
#: Pictures up to this side are thumbnails (digits, CIFAR, Tiny ImageNet): the subject fills them, nothing is cropped.
THUMBNAIL = 64

_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True, eq=False)
class Images:
    """A split of a data set, decoded and at the network's size.

    ``pixels`` is ``[N, C, H, W]`` uint8, ``labels`` is ``[N]`` int64 or None. ``flip`` says whether a mirrored picture
    keeps its label (False for digits and letters).
    """

    pixels: Tensor
    labels: Tensor | None
    classes: list[str] | None
    name: str
    flip: bool = True

    def __len__(self) -> int:
        return len(self.pixels)

    def at(self, indices: Tensor) -> Tensor:
        """The pixels at ``indices``, ``[B, C, H, W]`` uint8."""
        return self.pixels[indices]

    def order(self, generator: torch.Generator) -> Tensor:
        """A permutation of the images, to train on them."""
        return torch.randperm(len(self), generator=generator)

    def expect(self, indices: Tensor) -> None:
        """Nothing: what :meth:`at` will be asked for is here already (:class:`anncvt.stream.Stream` decodes it)."""

    def subset(self, indices: Tensor | Sequence[int]) -> Images:
        """The pictures at ``indices`` (copied), in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return replace(self, pixels=self.pixels[chosen], labels=None if self.labels is None else self.labels[chosen])

    def batch(self, indices: Tensor, preprocess: Preprocess) -> Tensor:
        """The pictures at ``indices`` as the network's input: ``[B, C, H, W]`` float32, ``(x / 255 - mean) / std``."""
        return normalise(self.pixels[indices], preprocess)


def normalise(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """``[B, C, ...]`` uint8 (or float on the same scale) -> float32 ``(x / 255 - mean) / std``.

    Raises:
        AnncvtError: the size is not ``preprocess.input_size``, or mean and std do not fit the channels.
    """
    size = tuple(pixels.shape[1:])
    if size != tuple(preprocess.input_size):
        raise AnncvtError(
            f"the images are {_by(size)} and the network takes {_by(preprocess.input_size)}",
            fix="open the data with the network's own input size (--input-size)",
        )
    return (pixels.float() / 255 - _channels(preprocess.mean, pixels)) / _channels(preprocess.std, pixels)


def _channels(values: tuple[float, ...], pixels: Tensor) -> Tensor:
    channels = pixels.shape[1]
    if len(values) not in (1, channels):
        raise AnncvtError(
            f"{len(values)} values of mean or std for {channels} channels",
            fix=f"give --mean and --std one value, or {channels} separated by commas",
        )
    return torch.tensor(values, dtype=torch.float32).view(-1, *(1,) * (pixels.ndim - 2))


def decode(picture: Picture, size: tuple[int, ...], where: str) -> np.ndarray:
    """One picture as ``[C, H, W]`` uint8 of exactly ``size``.

    A picture that has the size already is left alone. A larger or smaller one is resized (bilinear with antialias) so
    that its shorter side is ``size / 0.875``, and the centre is cut out; a thumbnail is not cropped.

    Raises:
        AnncvtError: the picture cannot be decoded; the message names ``where``.
    """
    if isinstance(picture, InputArray):
        return picture.array
    if len(size) != 3 or size[0] not in _MODES:
        raise AnncvtError(
            f"pictures have 1 or 3 channels, height and width; the network's input is {_by(size)}",
            where=where,
            fix="set --input-size to CHANNELSxHEIGHTxWIDTH with 1 or 3 channels",
        )
    channels, height, width = size
    if isinstance(picture, np.ndarray) and picture.shape == (height, width, *(() if channels == 1 else (channels,))):
        return picture[None] if channels == 1 else picture.transpose(2, 0, 1)
    try:
        with _open(picture) as image:
            converted = _convert(image, _MODES[channels])
    except Exception as error:  # Pillow's plugins raise nearly anything on broken files
        raise AnncvtError(
            f"cannot be decoded as a picture: {error or type(error).__name__}",
            where=where,
            fix="remove the file from the data set or replace it with a whole one",
        ) from error
    array = np.asarray(_fit(converted, height, width))
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def read_pixels(path: str | Path, preprocess: Preprocess) -> Tensor:
    """A picture file at the network's input size, ``[1, C, H, W]`` uint8.

    Raises:
        AnncvtError: no such file, or it is no picture.
    """
    path = Path(path)
    if not path.is_file():
        raise AnncvtError("no such picture", where=str(path), fix="give the path of a JPEG, PNG or similar file")
    pixels = decode(path, preprocess.input_size, str(path))
    return torch.from_numpy(pixels.copy())[None]


def read_image(path: str | Path, preprocess: Preprocess) -> Tensor:
    """:func:`read_pixels`, normalised: ``[1, C, H, W]`` float32."""
    return normalise(read_pixels(path, preprocess), preprocess)


def picture_size(picture: Picture) -> tuple[int, int, int] | None:
    """``(C, H, W)`` from the header alone, colour modes counting as 3 channels; None where it cannot be read."""
    try:
        with _open(picture) as image:
            return (1 if image.mode in ("1", "L") or image.mode.startswith("I") else 3, image.height, image.width)
    except Exception:  # as in decode; who needs the pixels will report it
        return None


def augment(
    batch: Tensor,
    generator: torch.Generator,
    pad: int = 4,
    flip: bool = True,
    *,
    places: Tensor | None = None,
    of: int | None = None,
) -> Tensor:
    """Random shifts by up to ``pad`` pixels (zeros come in at the border) and, with ``flip``, random mirroring.

    ``[B, C, H, W]`` in CPU memory, of any dtype -> a new tensor of the same shape, each picture shifted and mirrored on
    its own. Deterministic from ``generator``. Meant for pixels as they are, before :func:`normalise`: there zero is
    black, and a byte a pixel is the least to move.

    Args:
        places, of: the pictures are those at ``places`` of a batch of ``of``, and change as they would in it.
    """
    count, channels, height, width = batch.shape
    places, of = (torch.arange(count), count) if places is None or of is None else (places, of)
    dy, dx = torch.randint(0, 2 * pad + 1, (2, of), generator=generator)[:, places].tolist()
    mirrored = (torch.rand(of, generator=generator) < 0.5)[places].tolist()
    # Copies of numpy views, one picture at a time: three times as fast as one indexing of the whole batch, and free of
    # torch's thread pool, whose barriers cost far more than the work when other processes use the cores.
    source = batch.numpy()
    padded = np.zeros((count, channels, height + 2 * pad, width + 2 * pad), source.dtype)
    padded[:, :, pad : pad + height, pad : pad + width] = source
    result = np.empty_like(source)
    for picture, window, top, left, mirror in zip(result, padded, dy, dx, mirrored, strict=True):
        shifted = window[:, top : top + height, left : left + width]
        picture[:] = shifted[:, :, ::-1] if flip and mirror else shifted
    return torch.from_numpy(result)


def _open(picture: Picture) -> Image.Image:
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture)
    assert not isinstance(picture, InputArray)  # has nothing to decode
    return Image.open(picture if isinstance(picture, Path) else io.BytesIO(picture))


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip instead of scale
        scaled = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def _fit(image: Image.Image, height: int, width: int) -> Image.Image:
    if image.size == (width, height):
        return image
    crop = 1.0 if max(image.size) <= THUMBNAIL else CROP
    scale = max(round(height / crop) / image.height, round(width / crop) / image.width)
    tall, wide = max(height, round(image.height * scale)), max(width, round(image.width * scale))
    resized = image.resize((wide, tall), Image.Resampling.BILINEAR)
    top, left = round((tall - height) / 2), round((wide - width) / 2)
    return resized.crop((left, top, left + width, top + height))


def _by(size: Sequence[int]) -> str:
    return "x".join(str(side) for side in size)
