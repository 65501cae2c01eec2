import pytest
import torch
from networks import Awkward, Residual

from anncvt.errors import AnncvtError
from anncvt.images import Images
from anncvt.loading import load
from anncvt.passes.calibrate import CalibrationConfig, calibrate
from anncvt.passes.choice import Choice
from anncvt.passes.fit_blocks import BlockFit
from anncvt.passes.fit_jointly import JointFit
from anncvt.passes.fit_layers import LayerFit
from anncvt.passes.pipeline import PIPELINE, apply
from anncvt.passes.plan import plan
from anncvt.passes.rewrite import rewrite


def test_graphs_are_written_before_and_after_each_pass(tmp_path):
    program = apply(plan, load(Residual(), input_size=8), Choice(keep=("conv1",)), to=tmp_path)
    program = apply(rewrite, program, to=tmp_path)
    images = Images(torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8), None, None, "noise")
    config = CalibrationConfig(LayerFit(steps=2), BlockFit(steps=1), JointFit(steps=1, batch_size=4))
    program = apply(calibrate, program, images, to=tmp_path, config=config)
    names = [f"{at}-{step.__name__}.{when}.txt" for at, step in enumerate(PIPELINE, 1) for when in ("after", "before")]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)
    text = {file.stem: file.read_text() for file in tmp_path.iterdir()}
    for shown in text.values():
        assert "call_module[target=conv2]" in shown and "call_module[target=bn2]" in shown
    assert "conv1: Conv2d" not in text["1-plan.before"] and "keep: --keep conv1" in text["1-plan.after"]
    assert "conv2: Conv2d" in text["2-rewrite.before"] and "conv2: AdderConv2d" in text["2-rewrite.after"]
    assert "stage rewritten: the student" in text["2-rewrite.after"]
    assert text["2-rewrite.after"] != text["3-calibrate.after"], "the weights are others"
    assert "stage calibrated" in text["3-calibrate.after"]


def test_what_no_graph_shows_is_said(tmp_path):
    apply(plan, load(Awkward(), input_size=6), to=tmp_path)
    shown = (tmp_path / "1-plan.after.txt").read_text()
    assert "## branch\nnot traceable: TraceError" in shown


def test_a_pass_that_leaves_nonsense_is_caught():
    def broken(program):
        program = rewrite(program)
        with torch.no_grad():
            program.student.conv1.weight[0] = float("inf")
        return program

    with pytest.raises(AnncvtError, match=r"conv1\.weight holds NaN or infinity"):
        apply(broken, plan(load(Residual(), input_size=8)))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AnncvtError, match="cannot write"):
        apply(plan, load(Residual(), input_size=8), to=tmp_path / "file" / "below")
