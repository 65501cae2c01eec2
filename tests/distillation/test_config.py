import dataclasses

import click
import pytest
from click.testing import CliRunner

from anncvt import options
from anncvt.cli import cli
from anncvt.distillation.config import CHOICES, DistillConfig
from anncvt.errors import AnncvtError


def test_what_is_left_open_is_settled_by_the_optimizer_and_the_teacher():
    plain, adamw = DistillConfig().settled(), DistillConfig(optimizer="adamw").settled()
    assert (plain.lr, plain.eta, plain.init, plain.teacher_lr) == (0.01, 0.1, "oneshot", None)
    assert adamw.lr == 0.001 and adamw.weight_decay != plain.weight_decay
    scratch = DistillConfig(teacher="scratch", lr=0.3).settled()
    assert (scratch.init, scratch.teacher_lr) == ("fresh", 0.3)
    assert DistillConfig(teacher="scratch", init="copy").settled().init == "copy"
    assert scratch.settled() == scratch


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "absent"}, "frozen, progressive, scratch"),
        ({"feature_loss": "l1"}, "kernel, mse, none"),
        ({"init": "zero"}, "oneshot, copy, fresh"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 1}, "batch_size=1"),
        ({"lr": 0.0}, "more than 0"),
        ({"ema": 1.0}, "at least 0 and less than 1"),
        ({"warmup": 1.5}, "at least 0 and at most 1"),
        ({"lr": float("nan")}, "lr=nan"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, message):
    with pytest.raises(AnncvtError) as caught:
        DistillConfig(**changes)
    assert message in f"{caught.value} {caught.value.fix}"


def test_what_only_watches_does_not_make_another_run():
    config = DistillConfig()
    assert dataclasses.replace(config, tensorboard=True, checkpoint_seconds=1).identity() == config.identity()
    assert dataclasses.replace(config, beta=0.5).identity() != config.identity()


#: A value other than the default for every field.
OTHER = {
    "epochs": 7,
    "batch_size": 64,
    "accumulate": 2,
    "seed": 3,
    **{name: choices[-1] for name, choices in CHOICES.items()},
    "feature_loss": "mse",
    "init": "copy",
    "alpha": 0.5,
    "beta": 2.0,
    "temperature": 3.0,
    "teacher_lr": 0.2,
    "lr": 0.3,
    "momentum": 0.8,
    "weight_decay": 0.001,
    "eta": 0.4,
    "warmup": 0.1,
    "clip_grad": 5.0,
    "ema": 0.99,
    "augment": False,
    "transform": "mine:make",
    "label_smoothing": 0.1,
    "mixup": 0.2,
    "cutmix": 1.0,
    "sync_bn": True,
    "stop_within": 1.5,
    "patience": 4,
    "tensorboard": True,
    "checkpoint_seconds": 9.0,
}


def parsed(*args):
    """What a verb with all options of distillation is called with."""
    seen = {}

    @click.command()
    @options.reading
    @options.training
    @options.more_training
    @options.common
    def verb(**values):
        seen.update(values)

    result = CliRunner().invoke(verb, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return {name: seen[name] for name in OTHER}


def test_every_setting_is_an_option_and_the_saved_file_gives_it_back(tmp_path):
    config, default = DistillConfig(**OTHER), DistillConfig()
    assert set(OTHER) == {field.name for field in dataclasses.fields(DistillConfig)}
    assert all(getattr(config, name) != getattr(default, name) for name in OTHER)
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert parsed("-c", path) == OTHER


def test_options_that_are_not_given_leave_the_configuration_alone():
    assert parsed() == {**dict.fromkeys(OTHER), "seed": 0}


def test_the_long_list_is_in_the_help_of_distill_alone():
    shown = {verb: CliRunner().invoke(cli, [verb, "--help"]).output for verb in ("distill", "convert")}
    assert "--label-smoothing" in shown["distill"] and "Distillation, images:" in shown["distill"]
    assert "--label-smoothing" not in shown["convert"] and "--epochs" in shown["convert"]
