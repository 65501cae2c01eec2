"""Errors a user can act on: what went wrong, where, and how to fix it."""

from __future__ import annotations


class AnncvtError(Exception):
    """A failure with a remedy. The CLI prints it without a traceback and exits with :attr:`exit_code`."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(f"{where}: {what}" if where else what)


class GateError(AnncvtError):
    """A check ran and its result is below what was asked for (parity, accuracy gate)."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """What an exception says, in one line: other packages' messages run over pages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
