"""Calibration of networks small enough for the fast suite: it must beat what is there before it, for any structure."""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from killing import killed_and_resumed
from networks import Awkward, Mobile, NormAct, Residual
from recorder import Recorder
from torch import nn

from anncvt.errors import AnncvtError
from anncvt.images import Images, normalise
from anncvt.loading import load
from anncvt.passes import calibration_state
from anncvt.passes.calibrate import CalibrationConfig, calibrate
from anncvt.passes.choice import Choice
from anncvt.passes.fit_blocks import BlockFit
from anncvt.passes.fit_jointly import JointFit
from anncvt.passes.fit_layers import LayerFit
from anncvt.passes.fit_logits import LogitFit
from anncvt.passes.initialise import initialise
from anncvt.passes.pairing import pairs
from anncvt.passes.plan import plan
from anncvt.passes.rewrite import rewrite

QUICK = CalibrationConfig(
    LayerFit(sweeps=2, steps=25, positions=1024),
    BlockFit(steps=10, positions=1024),
    JointFit(steps=25, batch_size=16),
    LogitFit(steps=10, batch_size=16),
)


def _images(count=96, size=8):
    """Smooth coloured blobs: noise would leave nothing to explain."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 3, 3, generator=generator)
    pixels = (F.interpolate(coarse, (size, size), mode="bilinear") * 255).to(torch.uint8)
    return Images(pixels, None, None, "blobs")


def _program(network, size=8):
    torch.manual_seed(0)
    network.train()
    with torch.no_grad():
        for _ in range(3):  # statistics of a network that has seen images
            network(torch.randn(16, 3, size, size))
    program = load(network.eval(), input_size=(3, size, size))
    return rewrite(plan(program))


def _distance(program, images):
    """Squared error of the logits, in units of how much they differ from image to image."""
    x = normalise(images.pixels, program.preprocess)
    with torch.no_grad():
        wanted, got = program.teacher(x), program.student(x)
    return float((got - wanted).square().mean() / wanted.var(0).mean())


@pytest.mark.parametrize("network", [Residual, Mobile])
def test_the_student_comes_close_to_the_teacher(network):
    size = 16 if network is Mobile else 8
    images, program = _images(size=size), _program(network(), size)
    before = copy.deepcopy(program.teacher.state_dict())
    untouched = _distance(program, images)
    calibrate(program, images, config=QUICK)
    assert _distance(program, images) < 0.5 * untouched
    record = program.history[-1]
    assert record.stage == "calibrated"
    assert set(record.metrics["layers"]) == {pair.name for pair in pairs(program)}
    assert all(torch.equal(value, before[name]) for name, value in program.teacher.state_dict().items())
    assert not program.student.training
    assert {pair.adder.gradient for pair in pairs(program)} == {"full"}


def test_each_stage_improves_on_the_map():
    distances = []
    stages = torch.eye(6, dtype=torch.int) * torch.tensor([1, 4, 60, 60, 60, 60])
    for regress, sweeps, layer, block, joint, logits in [(0,) * 6, *stages.tolist()]:
        program = _program(Residual())
        # A network as small as this one stands higher rates than the defaults, and needs them in so few steps.
        config = CalibrationConfig(
            LayerFit(bool(regress), sweeps, steps=layer, positions=1024),
            BlockFit(steps=block, positions=1024, weight_lr=0.05, norm_lr=0.01),
            # Not mirrored: the distance is measured on these very images.
            JointFit(steps=joint, batch_size=16, lr=1e-3, weight_lr=0.01, mirror=False),
            LogitFit(steps=logits, batch_size=16, mirror=False),
        )
        calibrate(program, _images(), config=config)
        distances.append(_distance(program, _images()))
    assert max(distances[1:]) < 0.5 * distances[0]


def test_what_tracing_cannot_reach_is_calibrated_all_the_same():
    program = _program(Awkward())
    calibrate(program, _images(), config=QUICK)
    assert set(program.history[-1].metrics["layers"]) == {pair.name for pair in pairs(program)}
    assert "branch.conv" in program.history[-1].metrics["layers"]
    assert all(torch.isfinite(value).all() for value in program.student.state_dict().values())


class InPlace(Residual):
    """Activations overwrite what the norms made."""

    def forward(self, x):
        x = F.relu_(self.bn(self.stem(x)))
        y = F.relu_(self.bn1(self.conv1(x)))
        x = F.relu_(self.bn2(self.conv2(y)) + self.down(x))
        return self.head(x.mean((2, 3)))


def _like(program, network):
    """A program of another way to write the same network."""
    network.load_state_dict(program.teacher.state_dict())
    found = rewrite(plan(load(network.eval(), input_size=program.preprocess.input_size)))
    assert found.plan.layers == program.plan.layers
    return found


@pytest.mark.parametrize("size", [(2, 40), (2, 4, 8, 8)])
def test_signals_and_clips_are_calibrated(size):
    conv, norm, pool = (nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d)
    if len(size) == 4:
        conv, norm, pool = (nn.Conv3d, nn.BatchNorm3d, nn.AdaptiveAvgPool3d)
    layers = [conv(2, 4, 3), norm(4), nn.ReLU(), conv(4, 4, 2), norm(4), nn.ReLU()]
    program = rewrite(plan(load(nn.Sequential(*layers, pool(1), nn.Flatten(), nn.Linear(4, 3)), input_size=size)))
    generator = torch.Generator().manual_seed(0)
    images = Images(torch.randint(0, 256, (32, *size), dtype=torch.uint8, generator=generator), None, None, "noise")
    calibrate(program, images, config=QUICK)
    assert program.history[-1].metrics["final_r2"]["3"] > 0.3


class Several(nn.Module):
    """Two outputs, of which one is no tensor of scores, and a branch that images may or may not take."""

    def __init__(self, threshold):
        super().__init__()
        self.stem, self.dark, self.bright = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.after, self.threshold = nn.Conv2d(4, 4, 1), threshold
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        y = self.stem(x)
        y = self.bright(y) if x.mean() > self.threshold else self.dark(y)
        pooled = torch.relu(self.after(torch.relu(y))).mean((2, 3))
        return {"scores": self.head(pooled), "norm": pooled.norm(dim=1), "step": 3}


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_networks_of_several_outputs_and_paths_are_calibrated(threshold):
    """Images (from 0 to 1) go the other way than the zeros that plan looks at, now this way, now that, or the same."""
    network = load(Several(threshold), input_size=8, mean=(0.0,) * 3, std=(1.0,) * 3)
    program, progress = rewrite(plan(network)), Recorder()
    assert [layer.name for layer in program.plan.swapped] == ["dark", "after"]
    calibrate(program, _images(), config=QUICK, progress=progress)
    done = program.history[-1].metrics
    assert "after" in done["final_r2"] and done["joint_steps"] == 25 and done["logit_steps"] == 10
    assert ("dark" in done["layers"]) == (threshold > 0.2)
    assert any(note.endswith("comes through: dark") for note in progress.notes) == (threshold == 0.2)


class Overwriting(Residual):
    """As detection heads do at inference."""

    def forward(self, x):
        x = torch.sigmoid(super().forward(x))
        x[:, :1] *= 2
        return x


class Stacked(nn.Module):
    """Two branches side by side, in front of the images."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3), nn.Conv2d(4, 3, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return torch.stack([torch.relu(self.one(x)), torch.relu(self.two(x))]).mean(0).mean((2, 3))


@pytest.mark.parametrize(("network", "steps"), [(Overwriting, 0), (Stacked, 10)])
def test_networks_that_end_in_unusual_ways_are_calibrated(network, steps):
    """Where no gradient flows back from the output, layers alone are fitted. Stacked branches are no batch."""
    program = rewrite(plan(load(network(), input_size=8)))
    calibrate(program, _images(), config=QUICK)
    done = program.history[-1].metrics
    assert done["joint_steps"] == 25 and (done["logit_steps"] or 0) == steps
    assert sum(done["final_r2"].values()) / len(done["final_r2"]) > 0.3


def test_images_that_come_through_no_adder_are_named():
    program = rewrite(plan(load(Several(0.2), input_size=8, mean=(0.0,) * 3, std=(1.0,) * 3), Choice(keep=("after",))))
    with pytest.raises(AnncvtError, match="none of its adders"):
        calibrate(program, _images(), config=QUICK)


def test_a_layer_is_fitted_alike_whether_the_activation_is_in_its_norm():
    plain = _program(Residual())
    rows = []
    for program in (plain, _like(plain, NormAct())):
        rows.append(calibrate(program, _images(), config=QUICK).history[-1].metrics["layers"])
    for name, row in rows[0].items():
        assert rows[1][name] == pytest.approx(row, abs=2e-3), name


@pytest.mark.parametrize("other", [InPlace, NormAct])
def test_the_map_aims_at_what_comes_before_the_activation(other):
    plain = _program(Residual())
    explained = []
    for program in (plain, _like(plain, other())):
        x = normalise(_images().pixels, program.preprocess)
        explained.append(initialise(program.teacher, program.student, pairs(program), x))
    assert explained[1] == pytest.approx(explained[0], abs=1e-4)


def test_same_seed_same_weights():
    students = []
    network = Residual()
    for seed in (3, 3, 4):
        program = _program(copy.deepcopy(network))
        calibrate(program, _images(), seed=seed, config=QUICK)
        students.append(program.student.state_dict())
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])
    assert any(not torch.equal(students[0][name], students[2][name]) for name in students[0])


def test_a_budget_is_kept_and_its_steps_recorded():
    program = _program(Residual())
    calibrate(program, _images(), budget=3.0, config=CalibrationConfig(joint=JointFit(least_steps=10)))
    record = program.history[-1]
    assert record.seconds < 12
    assert record.metrics["blocks"][0]["steps"] >= 10
    assert record.metrics["joint_steps"] >= 10
    assert not record.metrics["logit_steps"]  # there was no time left for them


def test_time_too_short_for_the_joint_stage_goes_to_the_blocks():
    program = _program(Residual())
    calibrate(program, _images(), budget=3.0, config=CalibrationConfig(joint=JointFit(least_steps=10**6)))
    metrics = program.history[-1].metrics
    assert metrics["blocks"][0]["steps"] >= 10
    assert not metrics["joint_steps"]
    assert metrics["end_to_end_kept"]


def test_time_that_the_joint_stage_leaves_goes_to_the_logits():
    config = replace(QUICK, joint=replace(QUICK.joint, steps=3), logits=replace(QUICK.logits, least_steps=1))
    program = _program(Residual())
    calibrate(program, _images(), budget=3.0, config=config)
    metrics = program.history[-1].metrics
    assert metrics["joint_steps"] == 3
    assert metrics["logit_steps"] >= 10


def test_end_to_end_training_that_loses_is_undone():
    network, students = Residual(), []
    for steps in (0, 20):
        program = _program(copy.deepcopy(network))
        harmful = JointFit(steps=steps, batch_size=16, lr=0.3, weight_lr=3.0)
        calibrate(program, _images(), config=replace(QUICK, joint=harmful, logits=LogitFit()))
        students.append(program.student.state_dict())
        assert program.history[-1].metrics["end_to_end_kept"] == (not steps)
    assert all(torch.equal(value, students[1][name]) for name, value in students[0].items())


def test_progress_names_layers_and_their_fit():
    recorder, program = Recorder(), _program(Residual())
    calibrate(program, _images(), config=QUICK, progress=recorder)
    shown = {metrics["layer"] for _, metrics in recorder.steps if "layer" in metrics}
    assert shown == {*(pair.name for pair in pairs(program)), *program.history[-1].metrics["kept"], "block 1"}
    assert recorder.done == len(shown) + QUICK.joint.steps + QUICK.logits.steps


@pytest.mark.parametrize("at", [1, 2, 4, 20, 35])
def test_an_interrupted_calibration_goes_on_as_if_nothing_had_happened(at, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration_state, "INTERVAL", 0.0)
    torch.manual_seed(0)
    network = Residual()
    whole, cut, resumed = (_program(copy.deepcopy(network)) for _ in range(3))
    calibrate(whole, _images(), config=QUICK)
    recorder = Recorder()
    recorder.on_advance = _interrupt_at(at)
    with pytest.raises(KeyboardInterrupt):
        calibrate(cut, _images(), config=QUICK, folder=tmp_path, progress=recorder)
    assert "interrupted" in recorder.notes[-1] and ("kept" in recorder.notes[-1]) == (at > 1)
    calibrate(resumed, _images(), config=QUICK, folder=tmp_path, resume=True)
    expected, got = whole.student.state_dict(), resumed.student.state_dict()
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
    assert resumed.history[-1].metrics == whole.history[-1].metrics


def _interrupt_at(at):
    def bomb(done):
        if done >= at:
            raise KeyboardInterrupt

    return bomb


def test_a_checkpoint_of_another_calibration_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration_state, "INTERVAL", 0.0)
    calibrate(_program(Residual()), _images(), config=QUICK, folder=tmp_path)
    with pytest.raises(AnncvtError, match=r"other settings \(seed\)"):
        calibrate(_program(Residual()), _images(), config=QUICK, seed=1, folder=tmp_path, resume=True)
    (tmp_path / calibration_state.CHECKPOINT).write_bytes(b"torn")
    with pytest.raises(AnncvtError, match="not a usable checkpoint"):
        calibrate(_program(Residual()), _images(), config=QUICK, folder=tmp_path, resume=True)
    calibration_state.discard_checkpoint(tmp_path)
    assert not (tmp_path / calibration_state.CHECKPOINT).exists()


def test_little_memory_takes_fewer_images_and_smaller_batches():
    program = _program(Residual())
    calibrate(program, _images(), config=QUICK, memory=1 << 18)
    metrics = program.history[-1].metrics
    assert metrics["config"]["joint"]["batch_size"] < QUICK.joint.batch_size
    assert _distance(program, _images()) < 1


def test_every_layer_reports_how_it_fits():
    program = _program(Residual())
    calibrate(program, _images(), config=QUICK)
    for row in program.history[-1].metrics["layers"].values():
        assert row["mapped_r2"] <= row["r2"] <= 1  # a fit that is worse than the map is not taken
        assert 0 <= row["outside"] <= 1
        assert 1 <= row["sweeps"] <= QUICK.layer.sweeps
        assert row["steps"] == 0  # those of the block follow
    (block,) = program.history[-1].metrics["blocks"]
    assert block["before_r2"] <= block["r2"] <= 1
    assert block["steps"] == QUICK.block.steps


def test_no_images_and_no_rewrite_are_named():
    program = _program(Residual())
    with pytest.raises(AnncvtError, match="no calibration images"):
        calibrate(program, _images().subset([]), config=QUICK)
    program.student = None
    with pytest.raises(AnncvtError, match="not converted"):
        calibrate(program, _images(), config=QUICK)


def test_diverging_is_an_error_with_a_remedy():
    program = _program(Residual())
    with torch.no_grad():
        program.teacher.head.weight.fill_(float("nan"))
    with pytest.raises(AnncvtError, match="diverged"):
        calibrate(program, _images(), config=QUICK)


SCRIPT = """
import sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
import torch
from networks import Residual
from test_calibrate import QUICK, _images, _program
from anncvt.passes import calibration_state
from anncvt.passes.calibrate import calibrate
calibration_state.INTERVAL = 0.0
torch.manual_seed(0)
program = _program(Residual())
calibrate(program, _images(), config=QUICK, folder=Path(sys.argv[3]), resume=True)
torch.save(program.student.state_dict(), sys.argv[4])
"""


@pytest.mark.slow
def test_kill_nine_and_resume(tmp_path):
    here = Path(__file__).parent
    command = [sys.executable, "-c", SCRIPT, str(here.parent), str(here)]
    expected, got = killed_and_resumed(command, tmp_path, calibration_state.CHECKPOINT)
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
