"""What a run leaves to look at: one JSON object a line, and TensorBoard's files where asked for."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from anncvt.errors import AnncvtError
from anncvt.files import write_text

LOG = "train/log.jsonl"
BOARD = "train/tensorboard"


class Journal:
    """The log of a run in ``folder``; a run that goes on after ``step`` drops what was logged behind it.

    Raises:
        AnncvtError: ``board``, and TensorBoard is not installed.
    """

    def __init__(self, folder: Path, *, board: bool = False, step: int = 0) -> None:
        self._path = folder / LOG
        self._board = _writer(folder / BOARD, step) if board else None
        kept = [line for line in self._lines() if _step(line) <= step] if step else []
        write_text(self._path, "".join(f"{line}\n" for line in kept))

    def write(self, row: dict[str, Any]) -> None:
        """Figures of one step, which ``row["step"]`` names."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}) + "\n")
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._board.add_scalar(name, value, row["step"])
            self._board.flush()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def _lines(self) -> list[str]:
        return self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []


def _step(line: str) -> float:
    """The step of a logged line; a torn one belongs to none."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return float(json.loads(line)["step"])
    return float("inf")


def _writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise AnncvtError(
            "TensorBoard is not installed", fix='pip install "anncvt[tensorboard]", or leave out --tensorboard'
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1)
