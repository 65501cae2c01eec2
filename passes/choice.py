"""What the user says about layers: a policy, GLOBs over names, a plan file with changed actions."""

from __future__ import annotations

import difflib
import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anncvt.errors import AnncvtError

#: What stays a convolution by default, by the first word of the reason.
POLICIES: dict[str, frozenset[str]] = {
    "no-depthwise": frozenset({"stem", "classifier", "gate", "depthwise"}),
    "paper": frozenset({"stem", "classifier"}),  # AdderNet, arXiv 1912.13200, section 4: all but the first and the last
    "all": frozenset(),
}
DEFAULT_POLICY = "no-depthwise"
_ACTIONS = ("swap", "keep")
#: Weights per input.
COPIES = (1, 2, 3, 4)
_NUMBERS = "choose 1, 2, 3 or 4"
_WRITE_ONE = "write one with `anncvt plan MODEL --json > plan.json`"


@dataclass(frozen=True)
class Choice:
    """The user's wishes; ``keep`` wins over ``swap``, both over ``file``, all over ``policy``.

    Of the layers that become adders, those that a GLOB of ``copies`` matches (the last one counts) compare every input
    with so many weights; else what the file says.
    """

    keep: tuple[str, ...] = ()
    swap: tuple[str, ...] = ()
    copies: Mapping[str, int] = field(default_factory=dict)  # GLOB -> weights per input
    policy: str = DEFAULT_POLICY
    linear: bool = False  # Linear layers become adders, too
    file: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # name -> the layer's entry in a plan file

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise AnncvtError(f"unknown policy {self.policy!r}", fix=f"choose one of {', '.join(POLICIES)}")

    @classmethod
    def of(
        cls,
        *,
        keep: Iterable[str] = (),
        swap: Iterable[str] = (),
        copies: int | Mapping[str, int] | None = None,
        policy: str | None = None,
        linear: bool = False,
        plan_file: str | Path | None = None,
    ) -> Choice:
        """A choice from options; a plan file with Linear layers in it implies ``linear``.

        Args:
            copies: weights per input, of all adders or by GLOB.

        Raises:
            AnncvtError: no such policy, not such a number, or the file is not a plan.
        """
        file = {} if plan_file is None else read_plan_file(Path(plan_file))
        linear = linear or any(row.get("kind") == "Linear" for row in file.values())
        by_glob = {} if copies is None else {"*": copies} if isinstance(copies, int) else dict(copies)
        for pattern, number in by_glob.items():
            if number not in COPIES:
                raise AnncvtError(f"{number} weights per input for {pattern!r}", fix=_NUMBERS)
        return cls(tuple(keep), tuple(swap), by_glob, policy or DEFAULT_POLICY, linear, file)

    def to_json(self) -> dict[str, Any]:
        """For the history; only what differs from the default."""
        actions = {name: row["action"] for name, row in self.file.items()}
        found: dict[str, Any] = {"keep": list(self.keep), "swap": list(self.swap), "policy": self.policy}
        found |= {"copies": dict(self.copies)} if self.copies else {}
        return found | ({"linear": True} if self.linear else {}) | ({"file": actions} if actions else {})

    def check(self, names: Iterable[str], linears: Iterable[str] = ()) -> None:
        """Find out that a GLOB matches nothing, or that the file names a layer that is not there.

        Args:
            names: layers that can be chosen.
            linears: Linear layers, which can be with ``linear`` only.

        Raises:
            AnncvtError: so it is; close names are listed.
        """
        known = list(names)
        for flag, patterns in (("--keep", self.keep), ("--swap", self.swap), ("--copies", self.copies)):
            for pattern in patterns:
                if fnmatch.filter(known, pattern):
                    continue
                if not self.linear and fnmatch.filter(linears, pattern):
                    raise AnncvtError(
                        f"{flag} {pattern!r} matches Linear layers alone, which stay as they are",
                        fix=f"leave out {flag} {pattern}, or pass --linear",
                    )
                raise AnncvtError(f"{flag} {pattern!r} matches no layer", fix=_close(pattern, known))
        for name in self.file:
            if name not in known:
                raise AnncvtError(f"the plan file has a layer {name!r}, the network does not", fix=_close(name, known))

    def copies_of(self, name: str) -> tuple[int, bool]:
        """The layer's weights per input, should it become an adder, and whether just this layer is named."""
        pattern = _matching(name, [*self.copies][::-1])
        if pattern is None:
            return self.file.get(name, {}).get("copies", 1), name in self.file
        return self.copies[pattern], pattern == name

    def overruled(self, name: str) -> tuple[str, str, bool] | None:
        """``(action, reason, whether just this layer is named)``, where the user decides."""
        kept, wanted = _matching(name, self.keep), _matching(name, self.swap)
        if kept is not None:
            return "keep", f"--keep {kept}", kept == name
        if wanted is not None:
            return "swap", f"--swap {wanted}", wanted == name
        if name in self.file:
            return self.file[name]["action"], "plan file", True
        return None


def read_plan_file(path: Path) -> dict[str, dict[str, Any]]:
    """The layers of a plan file by name, each with a valid ``action``.

    Raises:
        AnncvtError: missing, not JSON, not a plan, or an action that does not exist.
    """
    where = str(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AnncvtError(f"cannot read: {error.strerror or error}", where=where, fix="check the path") from error
    except (ValueError, RecursionError) as error:
        raise AnncvtError(f"not JSON: {error}", where=where, fix=_WRITE_ONE) from error
    rows = data.get("layers") if isinstance(data, dict) else None
    if not isinstance(rows, list) or not rows:
        raise AnncvtError("not a plan: it has no list 'layers', or an empty one", where=where, fix=_WRITE_ONE)
    layers: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise AnncvtError(f"layers[{number}] has no name", where=where, fix=_WRITE_ONE)
        if row.get("action") not in _ACTIONS:
            raise AnncvtError(
                f"{row['name']}: no action {row.get('action')!r}", where=where, fix='write "action": "swap" or "keep"'
            )
        if row.get("copies", 1) not in COPIES:
            raise AnncvtError(f"{row['name']}: {row['copies']!r} copies", where=where, fix=_NUMBERS)
        if row["name"] in layers:
            raise AnncvtError(f"{row['name']} is there twice", where=where, fix="leave one of them")
        layers[row["name"]] = row
    return layers


def _close(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 5, 0.3) or known[:5]
    return f"names are: {', '.join(close)}"


def _matching(name: str, patterns: Iterable[str]) -> str | None:
    return next((pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)), None)
