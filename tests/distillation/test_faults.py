"""What happens to a run when it is killed, when the disk is full, when it diverges."""

import dataclasses

import pytest
import torch
from colours import QUICK, images, program, undisturbed, weights
from distil_colours import PLACES, launched
from recorder import Recorder
from test_files import no_file_larger_than

from anncvt.distillation.diagnosis import first_not_finite
from anncvt.errors import AnncvtError
from anncvt.pkkd import CHECKPOINT, distill


def resumed(folder, config=QUICK):
    """The weights after the run in ``folder`` went on to its end."""
    return weights(distill(program(), images(), None, config, folder=folder, resume=True))


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_run_killed_while_it_writes_goes_on_from_the_checkpoint_before(tmp_path):
    assert launched(tmp_path, kill=("while a checkpoint is written", 5)) == [-9]
    assert same(resumed(tmp_path), undisturbed(QUICK))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"teacher": "progressive", "ema": 0.9, "mixup": 0.4}, {"optimizer": "adamw"}])
def test_a_run_killed_anywhere_ends_with_the_same_bits(tmp_path, changes):
    """Killed again and again, at another place each time, among them a second time before it has come any further."""
    for number, place in (
        (3, PLACES[0]),
        (1, PLACES[1]),
        (2, PLACES[2]),
        (1, PLACES[1]),
        (2, PLACES[3]),
        (5, PLACES[0]),
    ):
        assert launched(tmp_path, changes=changes, kill=(place, number)) == [-9]
    config = dataclasses.replace(QUICK, **changes)
    assert same(resumed(tmp_path, config), undisturbed(config))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    def fill(steps):
        if steps == 4:
            kept.append((tmp_path / CHECKPOINT).read_bytes())
            limit.__enter__()

    kept, limit = [], no_file_larger_than(20_000)
    try:
        with pytest.raises(AnncvtError, match="cannot write: File too large"):
            distill(program(), images(), None, QUICK, folder=tmp_path, progress=Recorder(fill, "distil"))
    finally:
        limit.__exit__(None, None, None)
    assert (tmp_path / CHECKPOINT).read_bytes() == kept[0]
    assert same(resumed(tmp_path), undisturbed(QUICK))


def test_a_run_that_diverges_names_the_layer_and_keeps_what_was_good(tmp_path):
    """A layer's output overflows: of all those that are not finite behind it the first one is named."""
    distill(program(), images(), None, QUICK, folder=tmp_path)
    kept = (tmp_path / CHECKPOINT).read_bytes()
    net = program()
    net.student.conv2.register_forward_hook(lambda module, inputs, output: output * float("inf"))
    with pytest.raises(AnncvtError, match=r"loss is nan at step 1 .*: the output of conv2 of the student"):
        distill(net, images(), None, QUICK, folder=tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == kept


def test_weights_that_are_not_finite_do_not_become_a_checkpoint(tmp_path):
    """The loss of a step may be finite and its gradient not."""
    net = program()

    def spoil(steps):
        if steps == 3:
            kept.append((tmp_path / CHECKPOINT).read_bytes())
            with torch.no_grad():
                net.student.bn1.weight[0] = float("inf")

    kept = []
    with pytest.raises(AnncvtError, match=r"the weights bn1.weight are not finite after step 3"):
        distill(net, images(), None, QUICK, folder=tmp_path, progress=Recorder(spoil, "distil"))
    assert (tmp_path / CHECKPOINT).read_bytes() == kept[0]


def test_a_network_that_is_finite_has_no_culprit():
    assert first_not_finite(program().student, torch.randn(2, 3, 8, 8)) is None
