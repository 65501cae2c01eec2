"""From the name of an architecture to a network with random weights."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from anncvt import zoo
from anncvt.errors import AnncvtError

if TYPE_CHECKING:
    from torch import nn

#: Modules and parameters that any network may have; see :func:`bounded`.
_SPARE_PARTS = 10_000
#: Top-level modules imported from a folder, so that another folder's file of the same name replaces them.
_FROM_FOLDER: dict[str, str] = {}


def parse_arch_args(values: Sequence[str]) -> dict[str, Any]:
    """``["n=3", "act=relu"]`` to ``{"n": 3, "act": "relu"}``: Python literals where they are, else text.

    Raises:
        AnncvtError: an entry has no ``=`` or no proper name before it.
    """
    parsed: dict[str, Any] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name.isidentifier():
            raise AnncvtError(f"--arch-args {value!r} is not NAME=VALUE", fix="for example: --arch-args n=3")
        try:
            parsed[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            parsed[name] = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    return parsed


def instantiate(
    arch: str, arguments: Mapping[str, Any], folders: Sequence[Path] = (), *, pretrained: bool = False
) -> tuple[nn.Module, str | None]:
    """Build ``arch``: ``torchvision:NAME``, ``timm:NAME``, ``hf-hub:NAME`` or ``module:factory``.

    Args:
        arguments: keyword arguments of the factory.
        folders: where to look for ``module`` after what is importable.
        pretrained: take the zoo's weights along.

    Returns:
        The network and the folder its module was found in (``None``: an installed package).

    Raises:
        AnncvtError: nothing has that name, or the factory fails.
    """
    prefix, colon, name = arch.partition(":")
    if not colon or not name:
        raise AnncvtError(
            f"architecture {arch!r} has no ':'", fix="write torchvision:NAME, timm:NAME or module:factory"
        )
    if prefix == "hf-hub":
        return _called(arch, lambda: zoo.build("timm", arch, arguments, pretrained=pretrained)), None
    if prefix in zoo.ZOOS:
        return _called(arch, lambda: zoo.build(prefix, name, arguments, pretrained=pretrained)), None
    with callable_of(prefix, name, folders) as (factory, folder):
        network = _called(arch, lambda: factory(**arguments))
    return network, folder or _outside_site(prefix)


@contextlib.contextmanager
def bounded(tensors: int) -> Iterator[None]:
    """Refuse to build networks of many times more layers than ``tensors``: a configuration file may ask for any number.

    Raises:
        AnncvtError: from whatever builds one inside the block.
    """
    from torch.nn.modules import module

    left = _SPARE_PARTS + 10 * tensors

    def count(*part: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise AnncvtError(
                f"its configuration describes a network of many times more layers than the {tensors} tensors here",
                fix="pass --arch, and --arch-args where it takes some",
            )

    with contextlib.ExitStack() as stack:
        stack.callback(module.register_module_module_registration_hook(count).remove)
        stack.callback(module.register_module_parameter_registration_hook(count).remove)
        yield


def _called(arch: str, make: Any) -> nn.Module:
    from torch import nn

    try:
        network = zoo.with_torchvision(make)
    except AnncvtError:
        raise
    except Exception as error:
        raise AnncvtError(
            f"{arch} could not be built: {type(error).__name__}: {error}",
            fix="pass what it needs with --arch-args NAME=VALUE",
        ) from error
    if not isinstance(network, nn.Module):
        raise AnncvtError(
            f"{arch} makes no torch.nn.Module but: {type(network).__name__}",
            fix="name the class of the network, or a function that makes it",
        )
    refuse_lazy(network, arch)
    return network


def refuse_lazy(network: nn.Module, name: str) -> None:
    """Raises an AnncvtError where layers (``LazyConv2d``) wait for their first input to know their sizes."""
    from torch import nn

    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in network.parameters()):
        raise AnncvtError(
            f"{name} has lazy layers, whose sizes are not known yet", fix="run it once on an image, or state the sizes"
        )


@contextlib.contextmanager
def callable_of(module: str, name: str, folders: Sequence[Path]) -> Iterator[tuple[Any, str | None]]:
    """The callable ``name`` of ``module``, and the folder it was found in, which is importable inside the block.

    Raises:
        AnncvtError: there is none, or it cannot be imported.
    """
    with contextlib.ExitStack() as stack:
        yield _factory(module, name, folders, stack)


def _factory(module: str, name: str, folders: Sequence[Path], stack: contextlib.ExitStack) -> tuple[Any, str | None]:
    top = module.partition(".")[0]
    fix = "give module:factory of an installed package or of a .py file in this folder or beside the checkpoint"
    if not all(part.isidentifier() for part in [*module.split("."), *name.split(".")]):
        raise AnncvtError(f"{module}:{name} is not the name of a Python object", fix=fix)
    folder: str | None = None
    if not _importable(top):
        found = next((f for f in folders if (f / f"{top}.py").is_file() or (f / top).is_dir()), None)
        if found is None:
            looked = ", ".join(str(f) for f in folders)
            raise AnncvtError(f"no module {top!r} is installed" + (f" or in {looked}" if looked else ""), fix=fix)
        folder = str(found.resolve())
        stack.enter_context(on_path(folder))
        _forget_other(top, folder)
    value: Any = _imported(module)
    if folder is not None:
        _FROM_FOLDER[top] = folder
    for part in name.split("."):
        if not hasattr(value, part):
            public = [n for n, v in vars(value).items() if callable(v) and not n.startswith("_")]
            raise AnncvtError(
                f"module {module!r} has no {name!r}", fix=f"it has: {', '.join(public[:12]) or 'nothing'}"
            )
        value = getattr(value, part)
    if not callable(value):
        raise AnncvtError(f"{module}:{name} is a {type(value).__name__}, not a class or function", fix=fix)
    return value, folder


def _outside_site(module: str) -> str | None:
    """Where a module comes from that is importable in this process only, such as one beside the running script."""
    file = getattr(sys.modules[module.partition(".")[0]], "__file__", None)
    if file is None:
        return None
    place = Path(file).resolve().parent
    if Path(file).name == "__init__.py":
        place = place.parent
    installed = [Path(path).resolve() for path in sysconfig.get_paths().values()]
    return None if any(place.is_relative_to(path) for path in installed) else str(place)


def _importable(top: str) -> bool:
    if top in _FROM_FOLDER:
        return False
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    # A bare folder on the path is a namespace package of the same name, hardly what was meant.
    return spec is not None and spec.origin is not None


def _imported(module: str) -> ModuleType:
    try:
        return zoo.with_torchvision(lambda: importlib.import_module(module))
    except Exception as error:  # whatever the user's file raises
        raise AnncvtError(
            f"importing {module!r} failed: {type(error).__name__}: {error}", fix="fix that file"
        ) from error


@contextlib.contextmanager
def on_path(folder: str) -> Iterator[None]:
    """Make what lies in ``folder`` importable, before anything of the same name, inside the ``with`` block."""
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _forget_other(top: str, folder: str) -> None:
    if _FROM_FOLDER.get(top, folder) != folder:
        for name in [n for n in sys.modules if n.partition(".")[0] == top]:
            del sys.modules[name]
