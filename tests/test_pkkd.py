"""PKKD on a network that trains in seconds: it learns in every way there is, resumes, and refuses what cannot work."""

import dataclasses
import json
import sys

import pytest
import torch
from colours import QUICK, images, program, undisturbed, weights
from recorder import Recorder
from safetensors.torch import load_file

from anncvt.errors import AnncvtError
from anncvt.evaluation import evaluate
from anncvt.pkkd import BEST, CHECKPOINT, CONFIG, LOG, discard_checkpoint, distill


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"feature_loss": "mse"},
        {"feature_loss": "none"},
        {"teacher": "progressive"},
        {"gradient": "full", "augment": False},
    ],
)
def test_the_student_learns_and_the_teacher_stays(tmp_path, changes):
    net = program()
    before = {name: value.clone() for name, value in net.teacher.state_dict().items()}
    distill(net, images(), images(), dataclasses.replace(QUICK, epochs=6, **changes), folder=tmp_path)
    assert evaluate(net.student, images(), net.preprocess)["top1"] > 80
    assert all(torch.equal(value, before[name]) for name, value in net.teacher.state_dict().items())
    assert net.stage == "distilled"
    rows = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert rows[-1]["step"] == 6 * 6
    assert {"loss", "ce", "kd", "top1"} <= set(rows[-1])
    assert ("mid" in rows[-1]) == (changes.get("feature_loss") != "none")


@pytest.mark.parametrize("config", [QUICK, dataclasses.replace(QUICK, teacher="progressive")])
@pytest.mark.parametrize("at", [1, 5, 6, 11])
def test_a_run_stopped_at_any_step_ends_with_the_same_bits(tmp_path, config, at):
    class Stop(Exception):
        pass

    def bomb(steps):
        """In the middle of step ``at``, before its checkpoint."""
        if steps == at:
            raise Stop

    with pytest.raises(Stop):
        distill(program(), images(), None, config, folder=tmp_path / "cut", progress=Recorder(bomb, "distil"))
    resumed = distill(program(), images(), None, config, folder=tmp_path / "cut", resume=True)
    got = weights(resumed)
    assert all(torch.equal(value, got[name]) for name, value in undisturbed(config).items())


def test_a_checkpoint_of_other_settings_or_no_checkpoint_is_refused(tmp_path):
    distill(program(), images(), None, QUICK, folder=tmp_path)
    with pytest.raises(AnncvtError, match=r"other settings \(lr: 0\.\d+ then, 0\.5 now"):
        distill(program(), images(), None, dataclasses.replace(QUICK, lr=0.5), folder=tmp_path, resume=True)
    (tmp_path / CHECKPOINT).write_bytes(b"torn")
    with pytest.raises(AnncvtError, match="not a usable checkpoint"):
        distill(program(), images(), None, QUICK, folder=tmp_path, resume=True)
    discard_checkpoint(tmp_path)
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    distill(program(), images(), None, QUICK, folder=tmp_path)
    kept = (tmp_path / CHECKPOINT).read_bytes()
    net = program()
    with torch.no_grad():
        net.student.head.weight.fill_(float("nan"))
    with pytest.raises(AnncvtError, match=r"loss is nan at step 1 .*: the weights head.weight of the student"):
        distill(net, images(), None, QUICK, folder=tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == kept


def test_data_that_cannot_teach_is_named(tmp_path):
    with pytest.raises(AnncvtError, match="no labels"):
        distill(program(), dataclasses.replace(images(), labels=None), None, QUICK, folder=tmp_path)
    with pytest.raises(AnncvtError, match="1 training images"):
        distill(program(), images(1), None, QUICK, folder=tmp_path)


def test_a_batch_is_never_larger_than_the_data(tmp_path):
    distill(program(), images(8), None, QUICK, folder=tmp_path)
    assert json.loads((tmp_path / LOG).read_text().splitlines()[-1])["step"] == QUICK.epochs


BRIEF = dataclasses.replace(QUICK, epochs=1)


def trained(folder, net=None, **changes):
    """The weights after an epoch with ``changes``, and the program."""
    net = net or program()
    distill(net, images(), images(), dataclasses.replace(BRIEF, **changes), folder=folder, teacher_top1=100.0)
    return weights(net)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw"},
        {"teacher": "scratch"},
        {"init": "copy"},
        {"label_smoothing": 0.1, "mixup": 0.2, "cutmix": 1.0},
        {"ema": 0.9, "clip_grad": 1.0},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"sync_bn": True},
        {"accumulate": 2},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_every_way_of_training_lowers_the_loss(tmp_path, changes):
    trained(tmp_path, epochs=3, **changes)
    losses = [json.loads(line)["loss"] for line in (tmp_path / LOG).read_text().splitlines()]
    assert losses[-1] < losses[0]


def test_where_the_student_starts(tmp_path):
    """With a rate that moves nothing, the result is the start."""
    still = {"lr": 1e-12, "beta": 0.0}
    net = program()
    start = weights(net)
    with torch.no_grad():
        net.student.conv1.weight.add_(1.0)
    moved = net.student.conv1.weight.clone()
    convolutions = net.teacher.state_dict()
    assert torch.allclose(trained(tmp_path / "a", net, **still)["conv1.weight"], moved)
    copied = trained(tmp_path / "b", net, init="copy", **still)
    assert torch.allclose(copied["conv1.weight"], convolutions["conv1.weight"])
    fresh = trained(tmp_path / "c", net, init="fresh", **still)
    assert not torch.allclose(fresh["head.weight"], start["head.weight"], atol=1e-3)
    assert 0.8 < float(fresh["conv1.weight"].std()) < 1.2  # AdderNet's initialisation


def test_the_best_epoch_is_kept_and_can_be_the_result(tmp_path):
    config = dataclasses.replace(QUICK, epochs=3, select="best", lr=0.02)
    net = program()
    distill(net, images(), images(), config, folder=tmp_path)
    best = load_file(tmp_path / BEST)
    metrics = net.history[-1].metrics
    assert metrics["best"]["top1"] == metrics["top1"]
    assert evaluate(net.student, images(), net.preprocess)["top1"] == pytest.approx(metrics["top1"])
    assert all(torch.equal(value, best[name]) for name, value in net.student.state_dict().items())


def test_a_run_may_end_when_it_is_good_enough_or_no_longer_improves(tmp_path):
    for name, changes in (("near", {"stop_within": 100.0}), ("weary", {"patience": 1, "lr": 1e-12, "ema": 0.0})):
        net = program()
        config = dataclasses.replace(QUICK, epochs=9, **changes)
        distill(net, images(), images(), config, folder=tmp_path / name, teacher_top1=90.0)
        assert net.history[-1].metrics["steps"] <= 4 * 6
    with pytest.raises(AnncvtError, match="stop_within needs labelled test images"):
        distill(program(), images(), None, dataclasses.replace(QUICK, stop_within=1.0), folder=tmp_path)


def test_the_effective_configuration_is_saved(tmp_path):
    trained(tmp_path, optimizer="adamw")
    saved = (tmp_path / CONFIG).read_text()
    assert 'optimizer = "adamw"' in saved and "lr = 0.02" in saved and "eta = 1.0" in saved


def test_tensorboard_is_asked_for_by_name_when_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(AnncvtError, match="TensorBoard is not installed"):
        trained(tmp_path, tensorboard=True)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    trained(tmp_path, tensorboard=True)
    assert list((tmp_path / "train" / "tensorboard").glob("events.*"))
