"""Which images a step sees and how they are changed: a function of the seed and the step alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anncvt.distillation.config import DistillConfig
from anncvt.distillation.processes import Processes
from anncvt.distillation.transform import load_transform, transformed
from anncvt.errors import AnncvtError
from anncvt.images import Images, augment, normalise
from anncvt.program import Preprocess
from anncvt.stream import Stream

#: Steps whose images are decoded in advance, where they are not in memory.
AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """``x`` is ``[B, C, H, W]``; an image shows ``labels`` by its ``share`` and ``others`` by the rest of it."""

    x: Tensor
    labels: Tensor
    others: Tensor
    share: float

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``."""
        return Batch(self.x.to(device), self.labels.to(device), self.others.to(device), self.share)


class Batches:
    """The batches of a run. A step has the same images however many processes and parts divide them.

    Raises:
        AnncvtError: no labels, too few images, or a batch that cannot be divided.
    """

    def __init__(
        self, images: Images | Stream, preprocess: Preprocess, config: DistillConfig, processes: Processes
    ) -> None:
        if images.labels is None:
            raise AnncvtError(
                "the images have no labels", where=images.name, fix="distillation needs a labelled data set"
            )
        if len(images) < 2:
            raise AnncvtError(
                f"{len(images)} training images", where=images.name, fix="raise --limit, or name more data"
            )
        self.images, self.labels, self._preprocess, self._config = images, images.labels, preprocess, config
        shares = processes.count * config.accumulate
        self.size = config.batch_size if config.batch_size <= len(images) else len(images) // shares * shares
        if self.size % shares or self.size < 2 * shares:
            raise AnncvtError(
                f"a batch of {self.size} images cannot be divided among {processes.count} processes with "
                f"--accumulate {config.accumulate}",
                where=images.name,
                fix=f"use a --batch-size that is a multiple of {shares}, of at least {2 * shares}, and as many images",
            )
        part = self.size // shares
        begin = processes.rank * config.accumulate * part
        self._parts = [torch.arange(begin + at * part, begin + (at + 1) * part) for at in range(config.accumulate)]
        self.steps_per_epoch = len(images) // self.size
        self._mixes = [kind for kind in ("mixup", "cutmix") if getattr(config, kind)]
        self._transform = None if config.transform is None else load_transform(config.transform)
        self._orders: dict[int, Tensor] = {}

    def parts(self, step: int) -> Iterator[Batch]:
        """This process's images of ``step`` (from 0), in the parts whose gradients accumulate."""
        for ahead in range(AHEAD + 1):
            chosen = self._chosen(step + ahead)
            for places in self._parts:
                self.images.expect(chosen[self._needed(places)])
        for places in self._parts:
            yield self._batch(step, places)

    def _chosen(self, step: int) -> Tensor:
        """The numbers of all images of ``step``, over all processes."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = self.images.order(generator(self._config.seed, epoch))
        return self._orders[epoch][at * self.size : (at + 1) * self.size]

    def _needed(self, places: Tensor) -> Tensor:
        """Those places of a batch whose images make those at ``places``: mixing takes their mirror images, too."""
        return torch.unique(torch.cat([places, self.size - 1 - places])) if self._mixes else places

    def _batch(self, step: int, places: Tensor) -> Batch:
        config, chosen, needed = self._config, self._chosen(step), self._needed(places)
        pixels = self._changed(self.images.at(chosen[needed]), step, needed)
        labels = self.labels[chosen[places]]
        if not self._mixes:
            return Batch(self._input(pixels), labels, labels, 1.0)
        draws = np.random.default_rng((config.seed, step, 2))
        kind = self._mixes[int(draws.integers(len(self._mixes)))]
        share = float(draws.beta(getattr(config, kind), getattr(config, kind)))
        partners = self.size - 1 - places
        own, other = (pixels[torch.searchsorted(needed, at)].float() for at in (places, partners))
        if kind == "mixup":
            own = share * own + (1 - share) * other
        else:
            share = _cut(own, other, share, draws)
        return Batch(self._input(own), labels, self.labels[chosen[partners]], share)

    def _changed(self, pixels: Tensor, step: int, places: Tensor) -> Tensor:
        """The pixels of the images at ``places`` of a batch, augmented."""
        if self._config.augment and pixels.dim() == 4:
            pad = max(1, pixels.shape[-1] // 8)
            draws = generator(self._config.seed, step, 1)
            pixels = augment(pixels, draws, pad=pad, flip=self.images.flip, places=places, of=self.size)
        if self._transform is None:
            return pixels
        seeds = [mixed_seed(self._config.seed, step, place, 3) for place in places.tolist()]
        return transformed(pixels, self._transform, seeds)

    def _input(self, pixels: Tensor) -> Tensor:
        x = normalise(pixels, self._preprocess)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _cut(own: Tensor, other: Tensor, share: float, draws: np.random.Generator) -> float:
    """Paste a box of ``other`` into ``own`` (CutMix, arXiv 1905.04899); returns the share of ``own`` that is left."""
    sides = own.shape[2:]
    box = []
    for side in sides:
        half = side * (1 - share) ** (1 / len(sides)) / 2
        middle = draws.uniform(0, side)
        box.append(slice(max(0, round(middle - half)), min(side, round(middle + half))))
    place = (slice(None), slice(None), *box)
    own[place] = other[place]
    return 1 - own[place][0, 0].numel() / own[0, 0].numel()


def generator(*numbers: int) -> torch.Generator:
    """A generator seeded by all ``numbers``, well mixed (seed 0, step 1 and seed 1, step 0 are unrelated)."""
    return torch.Generator().manual_seed(mixed_seed(*numbers))


def mixed_seed(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
