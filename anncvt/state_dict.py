"""From what a checkpoint holds to one flat ``name -> tensor`` table, and how that table fits a network."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anncvt.checkpoint import Checkpoint
from anncvt.errors import AnncvtError
from anncvt.pickles import UNREADABLE, Inert, TensorRef, corrupt

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Keys under which training scripts keep the weights, the likeliest first.
WRAPPERS = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "params",
    "module",
    "weights",
    "model_ema",
    "state_dict_ema",
    "ema_state_dict",
    "ema",
)
#: How many wrappers (DataParallel, torch.compile, Lightning modules, ...) may have put a prefix before every name.
_WRAPPED = 6
_MAX_TENSORS = 200_000


@dataclass(frozen=True)
class Weights:
    """The tensors of one network as a checkpoint names them."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()  # what was unwrapped, for the user
    module: str | None = None  # class of the pickled module they were taken from
    arch: str | None = None  # the name that training scripts keep beside them


@dataclass(frozen=True)
class Mismatch:
    """How a table of tensors differs from what a network wants."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]  # name, in the checkpoint, in the network

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.shapes)

    def describe(self) -> str:
        """The first differences of each kind, for an error message."""
        parts = []
        if self.shapes:
            name, have, want = self.shapes[0]
            parts.append(f"{name} is {list(have)} there and {list(want)} in the network" + _more(self.shapes))
        if self.missing:
            parts.append(f"the checkpoint lacks {', '.join(self.missing[:3])}" + _more(self.missing, 3))
        if self.unexpected:
            parts.append(f"the network has no {', '.join(self.unexpected[:3])}" + _more(self.unexpected, 3))
        return "; ".join(parts)


def _more(items: Sequence[Any], shown: int = 1) -> str:
    return f" (and {len(items) - shown} more)" if len(items) > shown else ""


def weights(checkpoint: Checkpoint, where: str) -> Weights:
    """The weights inside a checkpoint.

    Raises:
        AnncvtError: there are none, or several networks' and nothing says which.
    """
    try:
        return _weights(checkpoint, where)
    except (AnncvtError, MemoryError):
        raise
    except Exception as error:  # a pickle may put anything where a dictionary is expected
        raise corrupt(where, f"{type(error).__name__}: {error}") from error


def _weights(checkpoint: Checkpoint, where: str) -> Weights:
    value, notes, arch = _unwrap(checkpoint.value, where)
    module: str | None = None
    if isinstance(value, Inert):
        module = re.sub(r"___torch_mangle_\d+\.", "", value.path.removeprefix("__torch__."))
        leaves = _of_module(value, where)
        kind = "TorchScript" if checkpoint.kind == "torchscript" else "pickled"
        notes.append(f"took the weights out of a {kind} {module.rpartition('.')[2]}")
    else:
        leaves = {name: leaf for name, leaf in value.items() if isinstance(name, str) and _is_tensor(leaf)}
    if not leaves:
        raise AnncvtError("no weights inside", where=where, fix="save torch.save(model.state_dict(), path)")
    for name, leaf in leaves.items():
        if isinstance(leaf, Inert):
            what, fix = UNREADABLE[leaf.path]
            raise AnncvtError(f"{name} is {what}", where=where, fix=fix)
    if "n_averaged" in leaves and all(name.startswith("module.") for name in leaves if name != "n_averaged"):
        del leaves["n_averaged"]
        notes.append("the moving average that torch.optim.swa_utils.AveragedModel keeps")
    return Weights({name: checkpoint.tensor(leaf) for name, leaf in leaves.items()}, tuple(notes), module, arch)


def fit(tensors: Mapping[str, Tensor], network: nn.Module) -> tuple[dict[str, Tensor], Mismatch]:
    """The table under the prefix that fits ``network`` best, and what still differs."""
    best: tuple[dict[str, Tensor], Mismatch] | None = None
    for table in _stripped(dict(tensors)):
        mismatch = compare(table, network)
        if not mismatch:
            return table, mismatch
        if best is None or len(mismatch) < len(best[1]):
            best = table, mismatch
    assert best is not None
    return best


def compare(tensors: Mapping[str, Tensor], network: nn.Module) -> Mismatch:
    """What ``network.load_state_dict(tensors, strict=True)`` would complain about."""
    own = {
        name: tuple(value.shape) for name, value in network.state_dict().items() if not name.endswith("_extra_state")
    }
    return Mismatch(
        # Checkpoints from before PyTorch 0.4.1 do not count batches; BatchNorm fills that in.
        tuple(n for n in own if n not in tensors and not n.endswith(".num_batches_tracked")),
        tuple(n for n in tensors if n not in own),
        tuple(
            (n, tuple(tensors[n].shape), shape)
            for n, shape in own.items()
            if n in tensors and tensors[n].shape != shape
        ),
    )


def load_strict(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """``load_state_dict`` of a table that :func:`compare` finds nothing wrong with.

    The table gets the network's own version marks, for modules (torchvision's MNASNet, say) that insist on one, and
    the batch counts that checkpoints from before PyTorch 0.4.1 lack.

    Raises:
        RuntimeError: it does not fit after all.
    """
    own = network.state_dict()
    counts = {name: value for name, value in own.items() if name.endswith(".num_batches_tracked")}
    table = OrderedDict({**counts, **tensors})
    if hasattr(own, "_metadata"):
        table.__dict__["_metadata"] = own._metadata
    try:
        network.load_state_dict(table, strict=True)
    except Exception as error:  # modules may check for themselves, and raise what they like
        raise RuntimeError(str(error)) from error


def _stripped(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    tables = [tensors]
    while len(tables) <= _WRAPPED:
        current = tables[-1]
        prefix = next(iter(current), "").partition(".")[0] + "."
        if not all(name.startswith(prefix) and name != prefix for name in current):
            break
        tables.append({name[len(prefix) :]: value for name, value in current.items()})
    return tables


def _unwrap(value: Any, where: str) -> tuple[Any, list[str], str | None]:
    """Descend through ``{'state_dict': ...}`` and the like to a table of tensors or a pickled module.

    Returns:
        What was found, notes on the way there, and the ``'arch'`` that lay beside it.
    """
    notes: list[str] = []
    arch: str | None = None
    for _ in range(8):
        if isinstance(value, Inert) and (_is_module(value) or value.path.startswith("__torch__.")):
            return value, notes, arch
        if not isinstance(value, Mapping):
            raise AnncvtError(
                f"holds a {_kind(value)}, not the weights of a network",
                where=where,
                fix="save torch.save(model.state_dict(), path)",
            )
        inside = {k: v for k, v in value.items() if isinstance(k, str) and _holds_weights(v)}
        # Beside the weights may lie a loss or an accuracy that is a tensor, as PyTorch's own ImageNet example has it.
        if any(_is_tensor(leaf) for leaf in value.values()) and not any(k in inside for k in WRAPPERS):
            return value, notes, arch
        key = next((k for k in WRAPPERS if k in inside), next(iter(inside), None) if len(inside) == 1 else None)
        if key is None:
            listed = ", under " + ", ".join(map(repr, list(inside or value)[:8])) if value else ""
            what = "several networks" if inside else "no weights"
            raise AnncvtError(f"{what} inside{listed}", where=where, fix="save the one network's state_dict() alone")
        others = [k for k in inside if k != key]
        more = f" (also there: {', '.join(others[:4])}; save those alone to convert them)" if others else ""
        notes.append(f"weights taken from '{key}'{more}")
        arch = value["arch"] if isinstance(value.get("arch"), str) else arch
        value = inside[key]
    raise AnncvtError("wrapped too deeply", where=where, fix="save torch.save(model.state_dict(), path)")


def _holds_weights(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_is_tensor(leaf) for leaf in value.values()) or any(
            k in value and isinstance(value[k], (Mapping, Inert)) for k in WRAPPERS
        )
    return isinstance(value, Inert) and (_is_module(value) or value.path.startswith("__torch__."))


def _is_tensor(leaf: Any) -> bool:
    """One that can be read, or one of which is known why it cannot be."""
    if isinstance(leaf, TensorRef) or (isinstance(leaf, Inert) and leaf.path in UNREADABLE):
        return True
    import torch

    return isinstance(leaf, torch.Tensor)


def _is_module(value: Inert) -> bool:
    return isinstance(vars(value).get("_modules"), dict) and isinstance(vars(value).get("_parameters"), dict)


def _kind(value: Any) -> str:
    if _is_tensor(value):
        return "single tensor"
    return value.path if isinstance(value, Inert) else type(value).__name__


def _of_module(root: Inert, where: str) -> dict[str, TensorRef]:
    """What ``state_dict()`` of a pickled or scripted module would hold."""
    found: dict[str, TensorRef] = {}
    steps = 0
    todo: list[tuple[str, Inert]] = [("", root)]
    while todo:
        prefix, module = todo.pop()
        steps += 1
        if steps > _MAX_TENSORS or len(prefix) > 2000:
            raise AnncvtError("an absurdly large or endless module", where=where)
        state = vars(module)
        if _is_module(module):
            hidden = state.get("_non_persistent_buffers_set") or ()
            tables = [state["_parameters"], {k: v for k, v in (state.get("_buffers") or {}).items() if k not in hidden}]
            children: Mapping[Any, Any] = state["_modules"]
        else:  # TorchScript keeps parameters, buffers and children as plain attributes
            tables, children = [state], state
        for table in tables:
            found.update({prefix + k: v for k, v in table.items() if isinstance(k, str) and isinstance(v, TensorRef)})
        inside = [(f"{prefix}{name}.", child) for name, child in children.items() if isinstance(child, Inert)]
        todo.extend(reversed(inside))  # the last in is the next out
    return found
