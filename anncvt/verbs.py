"""How verbs behave: one JSON object or tables on stdout, the rest on stderr, errors as one message, exit codes."""

from __future__ import annotations

import contextlib
import errno
import json
import shlex
import sys
import traceback
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from anncvt import launch
from anncvt.errors import AnncvtError
from anncvt.options import settings

if TYPE_CHECKING:
    from rich.console import RenderableType

    from anncvt.progress import Progress

INTERRUPTED = 130
#: Verbs that several processes launched together can share the work of.
SHARED = ("distill",)


class Verb(click.Command):
    """A verb. Whatever else prints while it works (a network's own code, an exporter) goes to stderr."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["anncvt.args"] = list(args)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Options by section, the verb's own first."""
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                section = "General" if param.name == "help" else getattr(param, "section", "Options")
                sections.setdefault(section, []).append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def invoke(self, ctx: click.Context) -> Any:
        settings().stdout = sys.stdout
        try:
            with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
                if not settings().verbose:
                    warnings.simplefilter("ignore")  # of the packages below, nothing the user could act on
                if launch.count() > 1 and self.name not in SHARED:
                    raise AnncvtError(
                        f"{self.name} runs in one process, {launch.count()} were launched",
                        fix=f"run it without a launcher; only {', '.join(SHARED)} divides its work",
                    )
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            _say(_interruption(ctx))
            ctx.exit(INTERRUPTED)
        except AnncvtError as error:
            _explain(error)
            ctx.exit(error.exit_code)
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # whoever read our output has left; click ends silently
            _explain(error)
            ctx.exit(1)


class Verbs(click.Group):
    """The verbs, listed in the order they are used in."""

    command_class = Verb

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def working() -> AbstractContextManager[Progress]:
    """Progress as the user wants it, for the duration of the ``with`` block."""
    from anncvt.terminal import reporter

    return reporter(quiet=settings().quiet or launch.rank() > 0, plain=settings().json)


def answer(data: Any, *shown: RenderableType) -> None:
    """Print ``data`` as the one JSON object with --json, else ``shown``; the first of several processes does."""
    if launch.rank() > 0:
        return
    out = settings().stdout
    if settings().json:
        settings().answered = True
        click.echo(json.dumps(data, allow_nan=False, default=str), file=out)
    else:
        from rich.console import Console

        # Without a terminal there is no width to fit; a narrow default would cut the tables of a log.
        console = Console(file=out, width=None if out.isatty() else 160, highlight=False)
        for item in shown:
            console.print(item, markup=not isinstance(item, str))


def _explain(error: Exception) -> None:
    """One message on stderr; with --json also on stdout, if nothing was answered yet."""
    expected = isinstance(error, AnncvtError)
    what = str(error) if expected else f"{type(error).__name__}: {error}"
    fix = getattr(error, "fix", None)
    if settings().verbose:
        traceback.print_exception(error)
    message = f"error: {what}" if launch.rank() == 0 else f"error in process {launch.rank()}: {what}"
    if fix:
        message += f"\n  fix: {fix}"
    elif not expected and not settings().verbose:
        message += "\n  this is a bug or an unforeseen input; run it again with -v to see where"
    _say(message)
    if settings().json and not settings().answered:
        answer({"error": {"what": getattr(error, "what", what), "where": getattr(error, "where", None), "fix": fix}})


def _say(message: str) -> None:
    click.echo(message, err=True)


def _interruption(ctx: click.Context) -> str:
    folder = ctx.params.get("output") or ctx.params.get("folder")
    if "resume" not in ctx.params or folder is None or not (Path(folder) / "program.json").is_file():
        return "interrupted"
    args = [arg for arg in ctx.meta["anncvt.args"] if arg not in ("--resume", "--force")]
    command = shlex.join(["anncvt", ctx.info_name or "", *args, "--resume"])
    return f"interrupted; the finished stages are in {folder}, go on with\n  {command}"
