"""PKKD on a network that trains in seconds: it learns, can be killed at any step, and refuses what cannot work."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from killing import killed_and_resumed
from networks import Residual
from recorder import Recorder

from anncvt.errors import AnncvtError
from anncvt.evaluation import evaluate
from anncvt.images import Images
from anncvt.loading import load
from anncvt.passes.plan import plan
from anncvt.passes.rewrite import rewrite
from anncvt.pkkd import CHECKPOINT, LOG, DistillConfig, discard_checkpoint, distill

QUICK = DistillConfig(epochs=2, batch_size=16, lr=0.02, checkpoint_seconds=0.0)


def images(count=96):
    """Five classes told apart by colour and brightness."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 5
    base = torch.tensor([[200, 30, 30], [30, 200, 30], [30, 30, 200], [220, 220, 220], [20, 20, 20]])
    noise = torch.randint(-20, 20, (count, 3, 8, 8), generator=generator)
    pixels = (base[labels][:, :, None, None] + noise).clamp(0, 255).to(torch.uint8)
    return Images(pixels, labels, [str(n) for n in range(5)], "colours")


def program():
    torch.manual_seed(0)
    # 16 channels: oneDNN 3.12 damages memory in the strided 1x1 convolutions of a learning teacher with fewer.
    network = Residual(16)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    data = images()
    x = (data.pixels.float() / 255 - 0.45) / 0.22
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x), data.labels).backward()
        optimizer.step()
    return rewrite(plan(load(network.eval(), input_size=(3, 8, 8), mean=(0.45,), std=(0.22,))))


def weights(trained):
    return {name: value.clone() for name, value in trained.student.state_dict().items()}


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
    teacher = {name: value.clone() for name, value in net.teacher.state_dict().items()}
    distill(net, images(), images(), dataclasses.replace(QUICK, epochs=8, **changes), folder=tmp_path)
    assert evaluate(net.student, images(), net.preprocess)["top1"] > 80
    assert all(torch.equal(value, teacher[name]) for name, value in net.teacher.state_dict().items())
    assert net.stage == "distilled"
    rows = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert rows[-1]["step"] == 8 * 6
    assert {"loss", "ce", "kd", "top1"} <= set(rows[-1])
    assert ("mid" in rows[-1]) == (changes.get("feature_loss") != "none")


@pytest.mark.parametrize("config", [QUICK, dataclasses.replace(QUICK, teacher="progressive")])
@pytest.mark.parametrize("at", [1, 5, 6, 11])
def test_a_run_stopped_at_any_step_ends_with_the_same_bits(tmp_path, config, at):
    undisturbed = distill(program(), images(), None, config, folder=tmp_path / "whole")

    class Stop(Exception):
        pass

    def bomb(steps):
        """In the middle of step ``at``, before its checkpoint."""
        if steps == at:
            raise Stop

    with pytest.raises(Stop):
        distill(program(), images(), None, config, folder=tmp_path / "cut", progress=Recorder(bomb, "distil"))
    resumed = distill(program(), images(), None, config, folder=tmp_path / "cut", resume=True)
    expected, got = weights(undisturbed), weights(resumed)
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_pkkd import QUICK, distill, images, program
import torch
net = distill(program(), images(), None, QUICK, folder=Path(sys.argv[2]), resume=True)
torch.save(net.student.state_dict(), sys.argv[3])
"""


@pytest.mark.slow
def test_kill_nine_and_resume(tmp_path):
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", SCRIPT, here]
    expected, got = killed_and_resumed(command, tmp_path, CHECKPOINT)
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


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
    with pytest.raises(AnncvtError, match="loss is nan at step 1"):
        distill(net, images(), None, QUICK, folder=tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "absent"}, "progressive, frozen"),
        ({"feature_loss": "l1"}, "kernel, mse, none"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 1}, "batch_size=1"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, message):
    with pytest.raises(AnncvtError) as caught:
        DistillConfig(**changes)
    assert message in f"{caught.value} {caught.value.fix}"


def test_data_that_cannot_teach_is_named(tmp_path):
    with pytest.raises(AnncvtError, match="no labels"):
        distill(program(), dataclasses.replace(images(), labels=None), None, QUICK, folder=tmp_path)
    with pytest.raises(AnncvtError, match="1 training images"):
        distill(program(), images(1), None, QUICK, folder=tmp_path)


def test_a_batch_is_never_larger_than_the_data(tmp_path):
    distill(program(), images(8), None, QUICK, folder=tmp_path)
    assert json.loads((tmp_path / LOG).read_text().splitlines()[-1])["step"] == QUICK.epochs
