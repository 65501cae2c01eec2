"""Options that several verbs share, and how their values are read."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import click

from anncvt.devices import DEVICES
from anncvt.distillation.config import BOUNDS, BY_OPTIMIZER, CHOICES, OPEN_BOUNDS, DistillConfig
from anncvt.passes.choice import POLICIES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Command = Callable[..., Any]


@dataclass
class Settings:
    """What every verb has: how to talk."""

    json: bool = False
    verbose: bool = False
    quiet: bool = False
    answered: bool = False  # the one JSON object is out
    stdout: TextIO = field(default_factory=lambda: sys.stdout)  # while everything else printed goes to stderr


def settings() -> Settings:
    """Those of the running command."""
    return click.get_current_context().find_root().ensure_object(Settings)


class Numbers(click.ParamType):
    """``0.5,0.5,0.5`` (or a list, from a file) as a tuple of floats."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            parts = value.split(",") if isinstance(value, str) else value
            return tuple(float(part) for part in (parts if isinstance(parts, list | tuple) else [parts]))
        except (TypeError, ValueError):
            self.fail(f"{value!r} is not a list of numbers; write for example 0.485,0.456,0.406", param, ctx)


class Size(click.ParamType):
    """``32``, ``32x32``, ``3x32x32`` or ``3,32,32`` (or a list, from a file) as a tuple of whole numbers."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            parts = re.split("[x,]", value) if isinstance(value, str) else value
            sides = tuple(int(part) for part in (parts if isinstance(parts, list | tuple) else [parts]))
        except (TypeError, ValueError):
            sides = ()
        if not sides or min(sides) < 1:
            self.fail(f"{value!r} is not a size; write 32, 32x32 or 3x32x32", param, ctx)
        return sides


class Duration(click.ParamType):
    """``90``, ``90s``, ``5m`` or ``1.5h`` as seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", str(value))
        if not match or not float(match[1]):
            self.fail(f"{value!r} is not a duration; write 90s, 5m or 1h", param, ctx)
        return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


class Bytes(click.ParamType):
    """``500M``, ``8G`` or ``1.5GiB`` as bytes (K, M and G are powers of 1024)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG])(?:i?B)?", str(value), re.IGNORECASE)
        if not match or not float(match[1]):
            self.fail(f"{value!r} is not an amount of memory; write 500M or 8G", param, ctx)
        return int(float(match[1]) * 1024 ** ("KMG".index(match[2].upper()) + 1))


class Copies(click.ParamType):
    """``3`` as ``("*", 3)``, ``conv1=2`` as ``("conv1", 2)``."""

    name = "copies"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        if isinstance(value, tuple):
            return value
        pattern, _, number = str(value).rpartition("=")
        if not number.isdecimal():
            self.fail(f"{value!r} is no number of weights; write 2 for all layers or GLOB=2 for some", param, ctx)
        return pattern or "*", int(number)


class Setting(click.ParamType):
    """``n=3`` as ``("n", 3)``: a Python literal where it is one, else text."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        from anncvt.architecture import parse_arch_args
        from anncvt.errors import AnncvtError

        if isinstance(value, tuple):
            return value
        try:
            return next(iter(parse_arch_args([value]).items()))
        except AnncvtError as error:
            self.fail(f"{error}; {error.fix}", param, ctx)


def common(command: Command) -> Command:
    """--json, -v, -q, -c, on every verb."""
    return _all(
        click.option(
            "--json",
            is_flag=True,
            expose_value=False,
            callback=_keep,
            help="Print one JSON object, no tables.",
        ),
        click.option(
            "-v", "--verbose", is_flag=True, expose_value=False, callback=_keep, help="Show tracebacks of errors."
        ),
        click.option(
            "-q", "--quiet", is_flag=True, expose_value=False, callback=_keep, help="No progress and no notes."
        ),
        click.option(
            "-c",
            "--config",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            is_eager=True,
            expose_value=False,
            callback=_read_config,
            help="Read options from a TOML file (keys are the long option names); the command line wins.",
        ),
        section="General",
    )(command)


def model(command: Command) -> Command:
    """MODEL and what it takes to load it."""
    return _all(
        click.argument("model"),
        click.option("--arch", help="Architecture: module:factory, torchvision:NAME or timm:NAME."),
        click.option(
            "--arch-args",
            type=Setting(),
            multiple=True,
            metavar="NAME=VALUE",
            help="Its arguments (repeatable).",
        ),
        click.option("--input-size", type=Size(), help="What the network takes: 32, 32x32 or 3x32x32."),
        click.option("--mean", type=Numbers(), help="Mean of each channel, of pixels in 0..1: 0.485,0.456,0.406."),
        click.option("--std", type=Numbers(), help="Standard deviation of each channel: 0.229,0.224,0.225."),
        click.option("--trust-pickle", is_flag=True, help="Run the code in a pickled checkpoint: it can do anything."),
        section="Model",
    )(command)


def layers(command: Command) -> Command:
    """Which layers become adders."""
    return _all(
        click.option("--keep", multiple=True, metavar="GLOB", help="Layers that stay as they are (repeatable)."),
        click.option("--swap", multiple=True, metavar="GLOB", help="Layers that become adders (repeatable)."),
        click.option(
            "--copies",
            type=Copies(),
            multiple=True,
            callback=lambda _ctx, _param, values: dict(values),
            metavar="[GLOB=]K",
            help="Weights per input of adders, 1 to 4 (repeatable): K times the additions, far closer to the CNN.",
        ),
        click.option(
            "--policy",
            type=click.Choice(list(POLICIES)),
            help="What stays by default. no-depthwise: stem, classifier, gates and depthwise convolutions; paper: stem "
            "and classifier; all: what has no adder counterpart.  [default: no-depthwise]",
        ),
        click.option(
            "--plan",
            "plan_file",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            metavar="FILE",
            help="Take the actions in FILE, an edited output of `anncvt plan --json`.",
        ),
        click.option("--linear", is_flag=True, help="Linear layers become adders, too."),
        click.option("--dump", type=click.Path(file_okay=False), metavar="DIR", help="Write graphs around each pass."),
        section="Layers",
    )(command)


def reading(command: Command) -> Command:
    """How data are read."""
    return _all(
        click.option("--data-dir", type=click.Path(), help="Where cifar10, imagenet, ... lie."),
        click.option("--limit", type=click.IntRange(1), help="At most so many images of each split."),
        click.option("--workers", type=click.IntRange(0), default=0, help="Decoding threads.  [default: one per core]"),
        click.option("--seed", type=int, default=0, show_default=True, help="Of sampling, order and augmentation."),
        section="Data",
    )(command)


def training(command: Command) -> Command:
    """The hyper-parameters of distillation that matter first."""
    return _all(*_hyperparameters(("epochs", "batch_size", "lr")), section="Distillation")(command)


def more_training(command: Command, *, hidden: bool = False) -> Command:
    """All others of :class:`anncvt.distillation.config.DistillConfig`, by section.

    Args:
        hidden: taken, and not shown.
    """
    for section, names in reversed(_SECTIONS.items()):
        command = _all(*_hyperparameters(names, hidden=hidden), section=f"Distillation, {section}")(command)
    return command


def hidden_training(command: Command) -> Command:
    """:func:`more_training`, not shown in the help."""
    return more_training(command, hidden=True)


_HELP = {
    "epochs": "Epochs of distillation.",
    "batch_size": "Images a training step.",
    "lr": "Peak learning rate.",
    "feature_loss": "How features are compared.",
    "alpha": "Weight of the teacher's outputs.",
    "beta": "Weight of the features.",
    "temperature": "Of the softmax in the teacher's term.",
    "teacher": "frozen, or goes on learning: progressive from its weights, scratch from none.",
    "teacher_lr": "Its peak learning rate.",
    "init": "Where the adder network starts: as it is, with the CNN's weights, from none.",
    "gradient": "Of the adder op: the subgradient, or AdderNet's.",
    "optimizer": "What moves the weights.",
    "momentum": "Of sgd.",
    "weight_decay": "Of everything but adder weights, norms and biases.",
    "eta": "Step of adder weights, times --lr.",
    "warmup": "Share of the steps before the cosine.",
    "clip_grad": "Greatest norm of the gradients, those of adder weights left out.",
    "ema": "Decay of a moving average of the weights, which becomes the result.",
    "precision": "Of all layers but adders.",
    "accumulate": "Divide the images of a step into so many parts, to save memory.",
    "augment": "Shift and mirror the images.",
    "transform": "module:factory of a further transform of an image, [C, H, W] uint8, as in torchvision.transforms.v2.",
    "label_smoothing": "Share of a label that goes to all classes.",
    "mixup": "Alpha of mixup; 0: none.",
    "cutmix": "Alpha of CutMix; 0: none.",
    "sync_bn": "BatchNorm over the images of all processes.",
    "select": "Which epoch's weights are the result; best: on the test images.",
    "stop_within": "Stop after the epoch that comes so near to the CNN's top-1 (points).",
    "patience": "Stop after so many epochs without a better top-1.",
    "tensorboard": "Log for TensorBoard, too.",
    "checkpoint_seconds": "Time between checkpoints.",
}
_SECTIONS: dict[str, tuple[str, ...]] = {
    "method": ("feature_loss", "alpha", "beta", "temperature", "teacher", "teacher_lr", "init", "gradient"),
    "optimizer": (
        "optimizer", "momentum", "weight_decay", "eta", "warmup", "clip_grad", "ema", "precision", "accumulate",
    ),
    "images": ("augment", "transform", "label_smoothing", "mixup", "cutmix"),
    "course": ("sync_bn", "select", "stop_within", "patience", "tensorboard", "checkpoint_seconds"),
}  # fmt: skip
#: Names of all hyper-parameters of distillation.
TRAINING = tuple(_HELP)
_WHOLE = ("epochs", "batch_size", "accumulate", "patience")
_DEFAULTS = {"teacher_lr": "--lr", "init": "oneshot; fresh with --teacher scratch"}


def _hyperparameters(names: tuple[str, ...], *, hidden: bool = False) -> Sequence[Callable[[Command], Command]]:
    """Options for fields of the configuration. None of them has a value of its own: who is silent gets the default."""
    found: list[Callable[[Command], Command]] = []
    for name in names:
        default = getattr(DistillConfig, name)
        shown = _DEFAULTS.get(name, default)
        if name in BY_OPTIMIZER["sgd"]:
            shown = ", ".join(f"{rates[name]:g} {optimizer}" for optimizer, rates in BY_OPTIMIZER.items())
        text = _HELP[name] if shown is None or isinstance(shown, bool) else f"{_HELP[name]}  [default: {shown}]"
        flag, kind = f"--{name.replace('_', '-')}", _kind(name)
        if isinstance(default, bool):
            flag += f"/--no-{name.replace('_', '-')}" if default else ""
            found.append(click.option(flag, is_flag=True, default=None, help=text, hidden=hidden))
        else:
            metavar = None if name in CHOICES else "N" if name in _WHOLE else "X" if name in BOUNDS else "NAME"
            found.append(click.option(flag, name, type=kind, metavar=metavar, help=text, hidden=hidden))
    return found


def _kind(name: str) -> click.ParamType | None:
    if name in CHOICES:
        return click.Choice(CHOICES[name])
    if name not in BOUNDS:
        return None
    low, high = BOUNDS[name]
    if name in _WHOLE:
        return click.IntRange(int(low))
    is_open = OPEN_BOUNDS.get(name)
    above = None if high == float("inf") else high
    return click.FloatRange(low, above, min_open=is_open == "low", max_open=is_open == "high")


def hardware(command: Command) -> Command:
    """Where and how wide to run."""
    return _all(
        click.option(
            "--device",
            type=click.Choice(DEVICES),
            default="auto",
            show_default=True,
            help="Where to train and evaluate. auto: on an NVIDIA GPU where there is one.",
        ),
        threads,
    )(command)


def device(command: Command) -> Command:
    """--device of a network that only runs."""
    return click.option(
        "--device",
        type=click.Choice(DEVICES),
        default="cpu",
        show_default=True,
        help="Where torch runs it. auto: on an NVIDIA GPU where there is one.",
    )(command)


def threads(command: Command) -> Command:
    """--threads."""
    return click.option(
        "--threads",
        type=click.IntRange(1),
        expose_value=False,
        callback=_limit_threads,
        help="Processor threads.  [default: one per core]",
    )(command)


def max_drop(command: Command) -> Command:
    """--max-drop."""
    return click.option(
        "--max-drop",
        type=click.FloatRange(0),
        metavar="POINTS",
        help="Exit with 3 if top-1 is more than POINTS below the CNN's.",
    )(command)


def _all(*decorators: Callable[[Command], Command], section: str | None = None) -> Callable[[Command], Command]:
    """All ``decorators``, the first outermost; their options stand under ``section`` in the help."""

    def apply(command: Command) -> Command:
        before = list(getattr(command, "__click_params__", ()))
        for decorator in reversed(decorators):
            command = decorator(command)
        for param in getattr(command, "__click_params__", ()):
            if section is not None and param not in before:
                param.section = section
        return command

    return apply


def _keep(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    assert param.name is not None
    setattr(settings(), param.name, value)


def _limit_threads(ctx: click.Context, param: click.Parameter, value: int | None) -> None:
    if value is not None:
        import torch

        torch.set_num_threads(value)  # the compiled kernels follow it


def _read_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    """Put the file's values where click looks for defaults, so that types and checks are those of the options."""
    if value is None:
        return
    try:
        content = tomllib.loads(value.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{value} is not TOML: {error}", ctx, param) from error
    names = {_long_name(p): p for p in ctx.command.params if p is not param and _long_name(p) != "help"}
    for key in content:
        if key not in names:
            close = difflib.get_close_matches(key, names, 1) or sorted(names)
            raise click.BadParameter(f"{value}: {ctx.info_name} has no {key!r}; try {', '.join(close)}", ctx, param)
    ctx.default_map = {
        names[key].name: _as_typed(entry, names[key]) for key, entry in content.items() if names[key].name
    }


def _long_name(param: click.Parameter) -> str:
    if isinstance(param, click.Argument):
        return (param.name or "").replace("_", "-")
    return max(param.opts, key=len).lstrip("-")


def _as_typed(entry: Any, param: click.Parameter) -> Any:
    """A TOML table (for --arch-args, --copies) as pairs, one value of a repeatable option as a list."""
    if isinstance(entry, dict):
        return list(entry.items())
    repeatable = isinstance(param, click.Option) and param.multiple
    return [entry] if repeatable and not isinstance(entry, list) else entry
