import dataclasses

import pytest
import torch

from anncvt.distillation.batches import Batches
from anncvt.distillation.config import DistillConfig
from anncvt.distillation.processes import Processes
from anncvt.errors import AnncvtError
from anncvt.images import Images
from anncvt.program import Preprocess

PREPROCESS = Preprocess((1, 8, 8), (0.0,), (1.0,))
CONFIG = DistillConfig(batch_size=8, augment=False)


def images(count=40):
    """Image i is of value i + 1 everywhere and of class i."""
    pixels = torch.arange(1, count + 1, dtype=torch.uint8).view(-1, 1, 1, 1).expand(count, 1, 8, 8).clone()
    return Images(pixels, torch.arange(count), None, "numbers")


def batches(config=CONFIG, rank=0, count=1, of=40):
    return Batches(images(of), PREPROCESS, config, Processes(rank, count))


def test_an_epoch_shows_every_image_once_and_another_order_follows():
    made = batches()
    seen = [next(iter(made.parts(step))).labels for step in range(10)]
    for epoch in (seen[:5], seen[5:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(40))
    assert not torch.equal(torch.cat(seen[:5]), torch.cat(seen[5:]))


@pytest.mark.parametrize(
    "changes", [{}, {"augment": True}, {"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}]
)
@pytest.mark.parametrize(("count", "parts"), [(2, 1), (1, 4), (2, 2)])
def test_a_step_is_the_same_however_it_is_divided(changes, count, parts):
    config = dataclasses.replace(CONFIG, **changes)
    for step in (0, 7):
        whole = next(iter(batches(config).parts(step)))
        divided = dataclasses.replace(config, accumulate=parts)
        pieces = [piece for rank in range(count) for piece in batches(divided, rank, count).parts(step)]
        for name in ("x", "labels", "others"):
            assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(whole, name))
        assert {piece.share for piece in pieces} == {whole.share}


def test_mixed_images_show_their_labels_by_their_shares():
    for changes in ({"mixup": 1.0}, {"cutmix": 1.0}):
        batch = next(iter(batches(dataclasses.replace(CONFIG, **changes)).parts(3)))
        assert 0 < batch.share < 1
        expected = batch.share * (batch.labels + 1) + (1 - batch.share) * (batch.others + 1)
        torch.testing.assert_close(batch.x.mean((1, 2, 3)) * 255, expected.float(), rtol=1e-4, atol=1e-3)
        values = {len(image.unique()) for image in batch.x}
        assert values == ({1} if "mixup" in changes else {2})


def test_a_batch_is_no_larger_than_the_data_and_divides_evenly():
    assert batches(dataclasses.replace(CONFIG, batch_size=100, accumulate=3)).size == 39
    with pytest.raises(AnncvtError, match="cannot be divided among 3 processes") as caught:
        batches(CONFIG, 0, 3)
    assert "multiple of 3" in caught.value.fix
