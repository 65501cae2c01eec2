"""Images that stay on disk: the same pictures, in an order that reads every block about once, decoded ahead."""

import numpy as np
import pytest
import torch
from test_data import RGB, numbers, write_parquet, write_png

from anncvt import data
from anncvt.data import Images, open_images, open_training_images
from anncvt.distillation.batches import Batches
from anncvt.distillation.config import DistillConfig
from anncvt.distillation.processes import Processes
from anncvt.errors import AnncvtError
from anncvt.stream import WINDOW, Stream


@pytest.fixture
def small_memory(monkeypatch):
    monkeypatch.setattr(data, "available_memory", lambda: 4000)


def photos(folder, count=24):
    for number in range(count):
        write_png(folder / f"class{number % 3}" / f"{number}.png", number, (8, 8))
    return f"folder:{folder}"


def rows(folder, count=60):
    write_parquet(folder / "train.parquet", [(number, number % 10) for number in range(count)])
    return f"hf:{folder}"


@pytest.mark.parametrize("source", [photos, rows])
@pytest.mark.parametrize("limit", [None, 17])
def test_it_shows_what_memory_would_hold(tmp_path, small_memory, monkeypatch, source, limit):
    spec = source(tmp_path)
    stream = open_training_images(spec, RGB, limit=limit, seed=1, workers=2)
    assert isinstance(stream, Stream)
    monkeypatch.undo()
    images = open_images(spec, "train", RGB, limit=limit, seed=1)
    assert isinstance(open_training_images(spec, RGB, limit=limit), Images)
    assert len(stream) == len(images) and stream.classes == images.classes and stream.flip == images.flip
    assert torch.equal(stream.labels, images.labels)
    for indices in (torch.tensor([5, 2, 11]), torch.arange(len(stream)).flip(0)):
        stream.expect(indices)
        assert torch.equal(stream.at(indices), images.at(indices))
    stream.close()


def test_training_sees_the_same_batches(tmp_path, small_memory, monkeypatch):
    spec, config = photos(tmp_path), DistillConfig(batch_size=4, mixup=0.3)
    stream = open_training_images(spec, RGB)
    monkeypatch.undo()
    streamed, held = (Batches(images, RGB, config, Processes()) for images in (stream, open_images(spec, "train", RGB)))
    for step in (0, 1, 2, 7, 3):
        for got, expected in zip(streamed.parts(step), held.parts(step), strict=True):
            assert torch.equal(got.x, expected.x) and torch.equal(got.labels, expected.labels)
    stream.close()


def test_an_order_mixes_a_few_blocks_at_a_time(tmp_path, small_memory):
    """Row groups of three: whatever the epoch, no more than a window of them is open at once."""
    stream = open_training_images(rows(tmp_path), RGB)
    orders = [stream.order(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    for order in orders:
        assert sorted(order.tolist()) == list(range(60))
        for window in order.split(3 * WINDOW):
            assert len({row // 3 for row in window.tolist()}) == WINDOW
        assert order[:3].tolist() != sorted(order[:3].tolist()) or order[3:6].tolist() != sorted(order[3:6].tolist())
    reads = []
    whole = stream._listing.stream
    object.__setattr__(stream._listing, "stream", lambda wanted: reads.append(len(wanted)) or whole(wanted))
    for indices in orders[0].split(5):
        stream.at(indices)
    assert reads == [3] * 20  # each of the 20 groups once
    stream.close()


def test_a_picture_that_cannot_be_decoded_is_named(tmp_path, small_memory):
    spec = photos(tmp_path)
    (tmp_path / "class1" / "4.png").write_bytes(b"no picture")
    stream = open_training_images(spec, RGB)
    with pytest.raises(AnncvtError, match=r"4.png: cannot be decoded"):
        stream.at(torch.arange(len(stream)))
    stream.close()


def test_pictures_come_as_they_are_asked_for(tmp_path, small_memory):
    stream = open_training_images(rows(tmp_path), RGB)
    pixels = stream.at(torch.tensor([7, 0, 31]))
    whole = Images(pixels, None, None, "three")
    assert numbers(whole) == [tuple(np.array(c) % 256) for c in [(49, 91, 203), (0, 0, 0), (217, 403, 899)]]
    stream.close()
