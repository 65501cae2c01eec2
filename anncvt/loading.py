"""What MODEL can be: a checkpoint of any kind, the name of a model, a factory, or a module in Python."""

from __future__ import annotations

import dataclasses
import importlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anncvt import zoo
from anncvt.architecture import bounded, instantiate, on_path, parse_arch_args, refuse_lazy
from anncvt.checkpoint import Checkpoint, read, sha256
from anncvt.errors import AnncvtError, first_line
from anncvt.preprocess import choose_preprocess
from anncvt.program import Program, Source
from anncvt.progress import SILENT, Progress
from anncvt.state_dict import Mismatch, Weights, fit, load_strict, weights

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["build", "load", "parse_arch_args"]

_NAMED = re.compile(r"(torchvision|timm|hf-hub):.+|[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass
class _Loaded:
    network: nn.Module
    source: Source
    facts: dict[str, Any] = field(default_factory=dict)


def load(
    model: str | Path | nn.Module,
    *,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    input_size: int | tuple[int, ...] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    trust_pickle: bool = False,
    progress: Progress = SILENT,
) -> Program:
    """Load a CNN.

    Args:
        model: a checkpoint file, ``torchvision:NAME``, ``timm:NAME``, ``hf-hub:NAME``, ``package.module:factory``, or
            an ``nn.Module`` (copied).
        arch: architecture for a checkpoint that holds weights only: ``torchvision:NAME``, ``timm:NAME`` or
            ``module:factory``; the module may be installed, in the current folder or beside the checkpoint.
        arch_args: keyword arguments of the factory.
        input_size: pixels, ``(height, width)`` or ``(channels, height, width)``.
        mean, std: per channel, of pixels scaled to [0, 1].
        trust_pickle: run the code of a pickled checkpoint. It can do anything to your machine.
        progress: told what was assumed.

    Returns:
        A program whose teacher is the network, in eval mode, strictly loaded.

    Raises:
        AnncvtError: nothing there, not a checkpoint, or it does not fit the architecture.
    """
    from torch import nn

    begin = time.monotonic()
    arguments = dict(arch_args or {})
    if isinstance(model, nn.Module):
        if arch is not None or arguments:
            raise AnncvtError(
                "the network is given, --arch is for checkpoint files", fix="leave out arch and arch_args"
            )
        loaded = _given(model)
    elif not isinstance(model, str | Path):
        raise AnncvtError(
            f"a network is expected, not a {type(model).__name__}",
            fix="pass a file, a name like torchvision:resnet18, or an nn.Module",
        )
    else:
        path = Path(model).expanduser()
        if path.exists() or not _NAMED.fullmatch(str(model)):
            loaded = _from_file(path, arch, arguments, trust_pickle, progress)
        elif arch is not None:
            raise AnncvtError(
                f"{model} names a network, --arch is for checkpoint files", fix="leave out one of the two"
            )
        else:
            loaded = _from_name(str(model), arguments, progress)
    network = loaded.network.eval()
    before = to_float32(network)
    if before is not None:
        progress.note(f"its parameters are {before}; it is converted as float32")
    note = zoo.take_note()
    if note is not None:
        progress.note(note)
    preprocess = choose_preprocess(
        network, loaded.source.arch, input_size=input_size, mean=mean, std=std, progress=progress
    )
    program = Program(loaded.source, preprocess, network)
    facts = {"parameters": sum(p.numel() for p in network.parameters()), **loaded.facts}
    program.record("loaded", time.monotonic() - begin, facts)
    return program


def build(source: Source, near: Path | None = None) -> nn.Module:
    """The architecture of ``source`` with random weights.

    Args:
        near: one more folder to look for its module in.

    Raises:
        AnncvtError: it cannot be built here; a module that was passed in Python never can.
    """
    if source.arch is None:
        raise AnncvtError(
            "the network was passed as a Python object, which has no name to build it from",
            where=source.model,
            fix="pass the module again: open_folder(path, model=network)",
        )
    if source.arch == PICKLED:
        network = _pickled_module(Path(source.model), read(Path(source.model)))
    else:
        folders = [Path.cwd(), *([Path(source.arch_path)] if source.arch_path else []), *([near] if near else [])]
        network = instantiate(source.arch, source.arch_args, folders)[0]
    to_float32(network)
    return network


#: ``Source.arch`` of a network whose architecture comes out of the checkpoint: a whole pickled module.
PICKLED = "checkpoint"


def unwrapped(module: nn.Module) -> nn.Module:
    """Without what several devices and torch.compile put around a network."""
    while type(module).__name__ in ("DataParallel", "DistributedDataParallel", "OptimizedModule"):
        module = next(module.children())
    return module


def to_float32(network: nn.Module) -> str | None:
    """Make a network of other floating-point numbers (half precision, double) one of float32; returns what it was."""
    others = {str(p.dtype).removeprefix("torch.") for p in network.parameters() if p.is_floating_point()} - {"float32"}
    if not others:
        return None
    network.float()
    return " and ".join(sorted(others))


def _given(model: nn.Module) -> _Loaded:
    import torch

    from anncvt.copies import copied

    if isinstance(model, torch.jit.ScriptModule):
        raise AnncvtError("a TorchScript module cannot be rewritten", fix="pass the Python module it was made from")
    model = unwrapped(model)
    refuse_lazy(model, type(model).__name__)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise AnncvtError("the network is on the meta device, without values", fix="load its weights first")
    try:
        return _Loaded(copied(model), Source(type(model).__name__), {"weights": "given"})
    except Exception as error:
        raise AnncvtError(
            f"the module cannot be copied: {error}", fix="remove what copy.deepcopy cannot copy from it"
        ) from error


def _from_name(model: str, arguments: dict[str, Any], progress: Progress) -> _Loaded:
    prefix = model.partition(":")[0]
    if prefix not in (*zoo.ZOOS, "hf-hub"):
        network, folder = instantiate(model, arguments, [Path.cwd()])
        progress.note(f"{model}: weights as its factory leaves them (random unless it loads some)")
        return _Loaded(network, Source(model, model, arguments, folder), {"weights": "factory"})
    source = Source(model, model, arguments)
    if prefix == "hf-hub":
        with progress.task(f"ask the hub for {model}", None):
            known = zoo.hub_architecture(model)
        source = Source(model, known.arch, {**known.arguments, **arguments})
    try:
        with progress.task(f"fetch {model}", None):
            network = instantiate(model, arguments, pretrained=True)[0]
        implied = zoo.arguments_without_weights(prefix, model.partition(":")[2])
        source = dataclasses.replace(source, arch_args={**implied, **source.arch_args})
        return _Loaded(network, source, {"weights": "pretrained"})
    except AnncvtError as error:
        # Weights that cannot be had (no network, none published) still leave a network to plan and to time.
        assert source.arch is not None
        network = instantiate(source.arch, source.arch_args)[0]
        reason = first_line(error.__cause__ or error).partition(". ")[0]
        progress.note(f"{model}: no pretrained weights ({reason}); RANDOM weights, of use for plan and bench only")
        return _Loaded(network, source, {"weights": "random"})


def _from_file(
    path: Path, arch: str | None, arguments: dict[str, Any], trust_pickle: bool, progress: Progress
) -> _Loaded:
    if path.is_dir():
        raise AnncvtError("a folder, not a checkpoint", where=str(path), fix="name the checkpoint file in it")
    if not path.exists():
        raise AnncvtError(
            "no such file", where=str(path), fix="check the path, or name a model: torchvision:resnet18, timm:NAME"
        )
    if trust_pickle:
        content = _run_pickle(path)
        digest = sha256(path)
    else:
        checkpoint = read(path)
        digest = sha256(path)
        content = weights(checkpoint, str(path))
        if content.module is not None and arch is None and checkpoint.kind in ("state_dict", "legacy"):
            if arguments:
                raise AnncvtError(
                    "--arch-args, but the checkpoint is a whole network, which is built already",
                    where=str(path),
                    fix="leave them out, or pass --arch, too, to take its weights alone",
                )
            network = _pickled_module(path, checkpoint)
            progress.note(f"{path.name}: a whole pickled {type(network).__name__}, of known classes only")
            source = Source(str(path.resolve()), PICKLED, {}, None, digest)
            return _Loaded(network, source, {"weights": "checkpoint", "kind": "pickled module"})
    for note in content.notes:
        progress.note(f"{path.name}: {note}")
    folder: str | None = None
    if arch is None:
        arch, arguments, network, table = _infer(path, content, arguments)
        progress.note(
            f"{path.name}: architecture {arch}, by its name, its entry 'arch' or config.json and a strict match of all "
            "tensors"
        )
    else:
        network, folder = instantiate(arch, arguments, [Path.cwd(), path.resolve().parent])
        if folder is not None:
            progress.note(f"architecture {arch} from {folder}")
        table, mismatch = fit(content.tensors, network)
        if mismatch:
            raise _wrong_architecture(path, arch, mismatch, content)
    prefix = next(iter(content.tensors), "").removesuffix(next(iter(table), ""))
    if prefix:
        progress.note(f"{path.name}: {prefix!r} taken off the names")
    _strict(network, table, path)
    source = Source(str(path.resolve()), arch, arguments, folder, digest)
    return _Loaded(network, source, {"weights": "checkpoint", "tensors": len(table)})


def _strict(network: nn.Module, table: Mapping[str, Any], path: Path) -> None:
    if any(value.is_quantized for value in table.values()):
        raise AnncvtError("a quantised checkpoint", where=str(path), fix="use the network before quantisation")
    own = network.state_dict()
    imaginary = [name for name, value in table.items() if value.is_complex() and not own[name].is_complex()]
    if imaginary:
        raise AnncvtError(
            f"{imaginary[0]} holds complex numbers, in the network it does not", where=str(path), fix="check --arch"
        )
    broken = [name for name, value in table.items() if not _finite(value)]
    if broken:
        raise AnncvtError(f"{broken[0]} holds NaN or infinity", where=str(path), fix="use an earlier checkpoint")
    try:
        load_strict(network, table)
    except RuntimeError as error:
        raise AnncvtError(f"the weights do not load: {error}", where=str(path), fix="check --arch") from error


def _finite(value: Tensor) -> bool:
    import torch

    if not value.is_floating_point():
        return True
    # The 8-bit kinds have no isfinite of their own.
    return bool(torch.isfinite(value.float() if value.element_size() == 1 else value).all())


def _wrong_architecture(path: Path, arch: str, mismatch: Mismatch, content: Weights) -> AnncvtError:
    fix = "check --arch and --arch-args"
    heads = [s for s in mismatch.shapes if len(s[1]) == len(s[2]) and s[1][1:] == s[2][1:] and s[1][0] != s[2][0]]
    if mismatch.shapes and len(heads) == len(mismatch) and len({s[1][0] for s in heads}) == 1:
        fix = f"if only the number of classes differs: --arch-args num_classes={heads[0][1][0]}"
    what = f"the weights do not fit {arch}: {mismatch.describe()}"
    if re.search(r"-\d+-of-\d+$", path.stem):
        fix = "this is one part of several: name the index file beside them, *.index.json"
    if content.module:
        what += f" (they come from a pickled {content.module})"
    return AnncvtError(what, where=str(path), fix=fix)


def _infer(
    path: Path, content: Weights, arguments: dict[str, Any]
) -> tuple[str, dict[str, Any], nn.Module, dict[str, Any]]:
    """The one architecture that the file's name, its entry "arch" or a config.json beside it suggests and every tensor
    fits.

    Returns:
        Architecture, its arguments, the network, the table of tensors.
    """
    fits = []
    near: tuple[str, Mismatch] | None = None
    for candidate in zoo.candidates(path, content.arch):
        wanted = {**candidate.arguments, **arguments}
        with bounded(len(content.tensors)):
            outline = _outline(candidate.arch, wanted)
        table, mismatch = fit(content.tensors, outline)
        if not mismatch:
            fits.append((candidate, wanted, table))
        elif near is None:
            near = candidate.arch, mismatch
    if len(fits) == 1:
        candidate, wanted, table = fits[0]
        network = instantiate(candidate.arch, wanted)[0]
        if candidate.preprocess:
            zoo.state_preprocess(network, candidate.preprocess)
        return candidate.arch, wanted, network, table
    if fits:
        listed = " or ".join(f"--arch {candidate.arch}" for candidate, _, _ in fits)
        raise AnncvtError("several architectures fit these weights", where=str(path), fix=f"say which: {listed}")
    if near is not None:
        raise _wrong_architecture(path, near[0], near[1], content)
    origin = f" (of a pickled {content.module})" if content.module else ""
    first = ", ".join(list(content.tensors)[:3])
    raise AnncvtError(
        f"weights alone{origin}, {len(content.tensors)} tensors ({first}, ...), and nothing says for which network",
        where=str(path),
        fix="pass --arch torchvision:NAME, --arch timm:NAME, or --arch module:factory with its .py file beside "
        "the checkpoint",
    )


def _outline(arch: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The architecture without memory for its weights, where its constructor allows that."""
    import torch

    try:
        with torch.device("meta"):
            return instantiate(arch, arguments)[0]
    except AnncvtError:  # a constructor that looks at values
        return instantiate(arch, arguments)[0]


def _pickled_module(path: Path, checkpoint: Checkpoint) -> nn.Module:
    """A pickled module whose every class belongs to torch.nn, torchvision or timm, through torch's safe unpickler."""
    import torch
    from torch import nn

    allowed = [_allowed(name, path) for name in sorted(checkpoint.names)]
    try:
        with torch.serialization.safe_globals([value for value in allowed if value is not None]):
            value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise AnncvtError(
            "a whole pickled module that torch's safe unpickler does not load"
            + (" (it is in the old file format)" if checkpoint.kind == "legacy" else ""),
            where=str(path),
            fix="pass --arch module:factory, torchvision:NAME or timm:NAME; its weights are read without unpickling it",
        ) from error
    while isinstance(value, Mapping):
        value = next(v for v in value.values() if isinstance(v, nn.Module))
    return unwrapped(value)


_BASICS = ("torch._utils._rebuild", "torch._tensor._rebuild", "collections.", "torch.Size", "torch.device")


def _allowed(name: str, path: Path) -> Any:
    """The object behind a name a pickled module uses, or ``None`` where torch's unpickler knows it already."""
    import enum
    import functools

    from torch import nn

    module, _, leaf = name.rpartition(".")
    if name.startswith(_BASICS) or module in ("builtins", "__builtin__", "torch", "torch.storage"):
        return None
    if name == "functools.partial":
        return functools.partial
    value: Any = None
    if module.startswith(("torch.nn.", "torchvision.models.", "torchvision.ops.", "timm.models.", "timm.layers.")):
        if module.startswith("torchvision."):
            zoo.import_torchvision()
        elif module.startswith("timm."):
            zoo.import_timm()
        try:
            value = getattr(importlib.import_module(module), leaf)
        except (ImportError, AttributeError):
            value = None
    if isinstance(value, type) and issubclass(value, (nn.Module, nn.Parameter, enum.Enum)):
        return value
    if value is not None and module == "torch.nn.functional":
        return value
    raise AnncvtError(
        f"a whole pickled module that needs {name}, which cannot be loaded safely",
        where=str(path),
        fix="pass --arch module:factory: its weights are then read without unpickling it; "
        "or, if you trust the file's author with your machine, --trust-pickle",
    )


def _run_pickle(path: Path) -> Weights:
    """``torch.load`` without safety, because the user asked for it."""
    import torch
    from torch import nn

    try:
        with on_path(str(path.resolve().parent)):  # where the classes of a pickled module often are
            value = zoo.with_torchvision(lambda: torch.load(path, map_location="cpu", weights_only=False))
    except Exception as error:
        raise AnncvtError(f"cannot be unpickled: {type(error).__name__}: {error}", where=str(path)) from error
    module = value if isinstance(value, nn.Module) else None
    if isinstance(value, Mapping):
        module = next((v for v in value.values() if isinstance(v, nn.Module)), None)
    if module is not None:
        return Weights(dict(module.state_dict()), (), type(module).__name__)
    return weights(Checkpoint("state_dict", value), str(path))
