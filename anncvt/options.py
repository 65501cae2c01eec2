"""Options that several verbs share, and how their values are read."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import click

from anncvt.devices import DEVICES
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
    )(command)


def layers(command: Command) -> Command:
    """Which layers become adders."""
    return _all(
        click.option("--keep", multiple=True, metavar="GLOB", help="Layers that stay as they are (repeatable)."),
        click.option("--swap", multiple=True, metavar="GLOB", help="Layers that become adders (repeatable)."),
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
    )(command)


def reading(command: Command) -> Command:
    """How data are read."""
    return _all(
        click.option("--data-dir", type=click.Path(), help="Where cifar10, imagenet, ... lie."),
        click.option("--limit", type=click.IntRange(1), help="At most so many images of each split."),
        click.option("--workers", type=click.IntRange(0), default=0, help="Decoding threads.  [default: one per core]"),
        click.option("--seed", type=int, default=0, show_default=True, help="Of sampling, order and augmentation."),
    )(command)


def training(command: Command) -> Command:
    """Hyper-parameters of distillation."""
    return _all(
        click.option("--epochs", type=click.IntRange(1), help="Epochs of distillation.  [default: 1]"),
        click.option("--batch-size", type=click.IntRange(2), help="Images a training step.  [default: 128]"),
        click.option("--lr", type=click.FloatRange(0, min_open=True), help="Peak learning rate.  [default: 0.01]"),
    )(command)


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


def _all(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def apply(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
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
    ctx.default_map = {names[key].name: _as_typed(entry) for key, entry in content.items() if names[key].name}


def _long_name(param: click.Parameter) -> str:
    if isinstance(param, click.Argument):
        return (param.name or "").replace("_", "-")
    return max(param.opts, key=len).lstrip("-")


def _as_typed(entry: Any) -> Any:
    """A TOML table (for --arch-args) as pairs."""
    return list(entry.items()) if isinstance(entry, dict) else entry
