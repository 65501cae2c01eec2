"""Images that are decoded when a training step needs them, for data sets that do not fit in memory."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anncvt.images import Picture, decode
from anncvt.sources import Listing

#: Blocks (row groups of a parquet file) that an order mixes, and whose encoded pictures are kept at a time.
WINDOW = 4

Named = tuple[str, Picture]


class Stream:
    """A split of a data set that stays on disk; for training what :class:`anncvt.images.Images` is.

    Pictures are read by one thread (readers need not be thread-safe) and decoded by several, ahead of their use where
    :meth:`expect` says so.

    Args:
        listing: with labels.
        rows: of the listing; image i is the one at ``rows[i]``.
        size: ``(C, H, W)`` to decode to.
        name: for messages.
        workers: decoding threads; 0: one per core.
    """

    def __init__(self, listing: Listing, rows: np.ndarray, size: Sequence[int], name: str, workers: int = 0) -> None:
        self.labels = None if listing.labels is None else torch.from_numpy(listing.labels[rows].astype(np.int64))
        self.classes, self.name, self.flip = listing.classes, name, listing.flip
        self._listing, self._rows, self._size = listing, rows, tuple(size)
        self._threads = workers or os.cpu_count() or 1
        self._reader = ThreadPoolExecutor(1)
        self._decoders = ThreadPoolExecutor(self._threads)
        self._coming: dict[bytes, Future[list[Future[_Part]]]] = {}
        self._block_of = None if listing.blocks is None else np.searchsorted(np.cumsum(listing.blocks), rows, "right")
        self._blocks: dict[int, dict[int, Named]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def order(self, generator: torch.Generator) -> Tensor:
        """A permutation of the images. Where blocks are read as a whole, one that mixes WINDOW of them at a time."""
        if self._block_of is None:
            return torch.randperm(len(self), generator=generator)
        block_of = torch.from_numpy(self._block_of)
        place = torch.randperm(int(block_of.max()) + 1, generator=generator)[block_of]
        return (place // WINDOW + torch.rand(len(self), generator=generator, dtype=torch.float64)).argsort()

    def expect(self, indices: Tensor) -> None:
        """Begin to read and decode what :meth:`at` will be asked for."""
        key = indices.numpy().tobytes()
        if key not in self._coming:
            self._coming[key] = self._reader.submit(self._begin, self._rows[indices.numpy()])

    def at(self, indices: Tensor) -> Tensor:
        """The pictures at ``indices``, ``[B, C, H, W]`` uint8.

        Raises:
            AnncvtError: one cannot be read or decoded.
        """
        self.expect(indices)
        pixels = np.empty((len(indices), *self._size), np.uint8)
        for part in self._coming.pop(indices.numpy().tobytes()).result():
            done = part.result()
            pixels[done.slots] = done.pixels
        return torch.from_numpy(pixels)

    def close(self) -> None:
        """Stop the threads; what is expected is not decoded any more."""
        self._reader.shutdown(cancel_futures=True)
        self._decoders.shutdown(cancel_futures=True)

    def _begin(self, rows: np.ndarray) -> list[Future[_Part]]:
        """Read the pictures at ``rows`` and hand them to the decoders in as many parts as there are threads."""
        slots = np.argsort(rows)
        named = self._read(rows[slots])
        bounds = np.linspace(0, len(rows), self._threads + 1).astype(int).tolist()
        return [
            self._decoders.submit(self._decode, named[begin:end], slots[begin:end])
            for begin, end in itertools.pairwise(bounds)
            if begin < end
        ]

    def _read(self, rows: np.ndarray) -> list[Named]:
        """The encoded pictures at ascending ``rows``."""
        if self._listing.blocks is None:
            return list(self._listing.stream(rows))
        ends = np.cumsum(self._listing.blocks)
        found: dict[int, Named] = {}
        for block in np.unique(np.searchsorted(ends, rows, "right")).tolist():
            if block not in self._blocks:
                while len(self._blocks) > WINDOW:
                    del self._blocks[next(iter(self._blocks))]  # the oldest
                whole = np.arange(ends[block] - self._listing.blocks[block], ends[block])
                self._blocks[block] = dict(zip(whole.tolist(), self._listing.stream(whole), strict=True))
            found |= self._blocks[block]
        return [found[row] for row in rows.tolist()]

    def _decode(self, named: list[Named], slots: np.ndarray) -> _Part:
        return _Part(slots, np.stack([decode(picture, self._size, where) for where, picture in named]))


@dataclass(frozen=True)
class _Part:
    slots: np.ndarray
    pixels: np.ndarray
