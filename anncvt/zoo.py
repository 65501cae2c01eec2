"""The model collections: torchvision and timm, both optional."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import re
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from anncvt.errors import AnncvtError, first_line
from anncvt.program import Preprocess

if TYPE_CHECKING:
    from torch import nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ZOOS = ("torchvision", "timm")
#: A clip of a video network, unless the user says else.
FRAMES = 16
T = TypeVar("T")
_KEEP_ALIVE: list[Any] = []
_untold: list[str] = []
#: What a configuration file may not tell timm's factory: to read other files, or to fetch weights.
_NOT_FROM_FILES = frozenset({"cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"})
#: Widths, depths and classes of a network in a configuration file are at most this.
_LARGEST_ARGUMENT = 1 << 20


@dataclass(frozen=True)
class Candidate:
    """An architecture that a checkpoint may be of."""

    zoo: str
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    preprocess: Mapping[str, Any] = field(default_factory=dict)  # input_size, mean, std as its configuration says

    @property
    def arch(self) -> str:
        return f"{self.zoo}:{self.name}"


def import_torchvision() -> ModuleType:
    """``torchvision``, also on a CPU build of torch.

    The torchvision of package registries is built for CUDA; beside a CPU torch its C++ library does not load and its
    Python part then fails at import because the schemas of two ops are missing. Declaring those two is enough for
    data sets, transforms and models; calling the ops themselves (detection heads) still fails.

    Raises:
        AnncvtError: torchvision is not installed or does not fit the installed torch.
    """
    try:
        return importlib.import_module("torchvision")
    except ImportError as error:
        raise AnncvtError("torchvision is not installed", fix="pip install --no-deps torchvision") from error
    except RuntimeError as error:
        if not _lacks_schemas(error):
            raise AnncvtError(
                f"torchvision does not fit the installed torch: {error}", fix="install the release made for it"
            ) from error
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for op in ("nms", "qnms"):
        library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEEP_ALIVE.append(library)  # its definitions go with it
    _untold.append(
        "torchvision is built for CUDA, torch here is not: its models work, but not its compiled operators (detection, "
        "deformable convolutions)"
    )
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    try:
        return importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        raise AnncvtError(
            f"torchvision does not fit the installed torch: {error}", fix="install the release made for it"
        ) from error


def with_torchvision(act: Callable[[], T]) -> T:
    """What ``act`` returns, which may import torchvision: where that fails beside a CPU torch, it is tried again."""
    try:
        return act()
    except RuntimeError as error:
        if not _lacks_schemas(error):
            raise
    import_torchvision()
    return act()


def _lacks_schemas(error: RuntimeError) -> bool:
    return "operator torchvision::" in str(error)


def take_note() -> str | None:
    """What the user should know about the installed torchvision, the first time anyone asks."""
    return _untold.pop() if _untold else None


def import_timm() -> ModuleType:
    """``timm`` (which imports torchvision).

    Raises:
        AnncvtError: it is not installed.
    """
    try:
        import_torchvision()
        return importlib.import_module("timm")
    except ImportError as error:
        raise AnncvtError(f"timm is not usable: {error}", fix="pip install timm") from error


def names(zoo: str) -> list[str]:
    """The architectures of a zoo; empty where it is not installed."""
    try:
        if zoo == "torchvision":
            import_torchvision()
            listed = importlib.import_module("torchvision.models").list_models()
            return [name for name in listed if not name.startswith("quantized_")]
        return list(import_timm().list_models())
    except AnncvtError:
        return []


def build(zoo: str, name: str, arguments: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """An architecture of a zoo, with random weights or the zoo's best ones (downloaded).

    Raises:
        AnncvtError: no such name, or arguments it does not take.
    """
    if zoo == "torchvision":
        import_torchvision()
        models = importlib.import_module("torchvision.models")
        known = names(zoo)
        if name not in known:
            raise _unknown(zoo, name, known)
        own = {"transform_input": False} if name in _NORMALISING else {}
        options: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None, **own, **arguments}
        if not pretrained and "weights_backbone" not in options and name.startswith(_WITH_BACKBONE):
            options["weights_backbone"] = None
        return models.get_model(name, **options)
    timm = import_timm()
    if not name.startswith("hf-hub:") and not timm.is_model(name.partition(".")[0]):
        raise _unknown(zoo, name, timm.list_models())
    with _quiet_downloads() if pretrained or name.startswith("hf-hub:") else contextlib.nullcontext():
        return timm.create_model(name, pretrained=pretrained, **arguments)


def arguments_without_weights(zoo: str, name: str) -> dict[str, Any]:
    """What builds, without the zoo's weights, the network that its factory makes with them."""
    return dict(_WITHOUT_WEIGHTS.get(name, {})) if zoo == "torchvision" else {}


def hub_architecture(name: str) -> Candidate:
    """What the configuration of ``hf-hub:OWNER/MODEL`` says, so that the network can be built again without the hub.

    Raises:
        AnncvtError: no network and nothing cached, no such model, or it is not a timm model.
    """
    import_timm()
    hub = importlib.import_module("timm.models._hub")
    try:
        with _quiet_downloads():
            config, architecture, arguments = hub.load_model_config_from_hf(name.partition(":")[2])
    except Exception as error:  # a dozen kinds of the hub's client
        raise AnncvtError(
            f"the configuration of {name} cannot be had: {first_line(error).partition('. ')[0]}",
            fix="check the name and the network, or download its config.json and weights into one folder and name the "
            "weights file",
        ) from error
    return _configured({**config, "architecture": architecture, "model_args": arguments}, name)


def _configured(config: Mapping[str, Any], where: str) -> Candidate:
    """timm's configuration of a model (``config.json`` on the hub), which lies at ``where``."""
    inner, arguments = config.get("pretrained_cfg"), config.get("model_args")
    own = inner if isinstance(inner, Mapping) else config
    given = arguments.items() if isinstance(arguments, Mapping) else ()
    kept = {name: value for name, value in given if name not in _NOT_FROM_FILES}
    classes = config.get("num_classes") or own.get("num_classes")
    if isinstance(classes, int):
        kept = {"num_classes": classes} | kept
    if _largest(kept) > _LARGEST_ARGUMENT:
        raise AnncvtError(
            "asks for an absurdly large network",
            where=where,
            fix="pass --arch, and --arch-args where it takes some",
        )
    stated = {name: own[name] for name in ("input_size", "mean", "std") if isinstance(own.get(name), list | tuple)}
    return Candidate("timm", str(config.get("architecture", "")), kept, stated)


def _largest(value: Any) -> float:
    """The largest number in a JSON value."""
    if isinstance(value, Mapping | list):
        return max(map(_largest, value.values() if isinstance(value, Mapping) else value), default=0)
    return abs(value) if isinstance(value, int | float) else 0


@contextlib.contextmanager
def _quiet_downloads() -> Iterator[None]:
    """Without the hub's log of every retry: the caller says once what came of it. Without network, what is cached."""
    constants: Any = importlib.import_module("huggingface_hub.constants")
    logger = logging.getLogger("huggingface_hub")
    level, offline = logger.level, constants.HF_HUB_OFFLINE
    logger.setLevel(logging.ERROR)
    # Its client would try for 23 seconds, for every file anew.
    constants.HF_HUB_OFFLINE = offline or not _resolves(constants.ENDPOINT)
    try:
        yield
    finally:
        logger.setLevel(level)
        constants.HF_HUB_OFFLINE = offline


def _resolves(url: str) -> bool:
    """Whether the name of its host is known; a proxy is taken to know it."""
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(url).hostname, None)
    except OSError:
        return False
    return True


#: With torchvision's weights they get the usual normalisation and turn it into their own, unless told not to. Here the
#: preprocessing is their own: a folder's network is built again without weights, and nothing is computed twice.
_NORMALISING = {"googlenet": ((0.5,) * 3, (0.5,) * 3), "inception_v3": ((0.5,) * 3, (0.5,) * 3)}
#: Arguments that the factories take for granted with torchvision's weights.
_WITHOUT_WEIGHTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False},
    **{f"{head}_{body}": {"aux_loss": True} for head in ("fcn", "deeplabv3") for body in ("resnet50", "resnet101")},
    "deeplabv3_mobilenet_v3_large": {"aux_loss": True},
}
#: Their factories would download a backbone even without weights of their own.
_WITH_BACKBONE = ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet", "ssd", "fcos", "fcn", "deeplabv3", "lraspp")


def stated_preprocess(network: nn.Module) -> Preprocess | None:
    """The preprocessing a timm network carries with itself."""
    config = getattr(network, "pretrained_cfg", None) or getattr(network, "default_cfg", None)
    if not isinstance(config, Mapping) or not config.get("input_size"):
        return None
    mean, std = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
    return Preprocess(tuple(config["input_size"]), tuple(mean), tuple(std))


def state_preprocess(network: Any, stated: Mapping[str, Any]) -> None:
    """Let a timm network carry another ``input_size``, ``mean`` or ``std`` than its architecture's."""
    network.pretrained_cfg = {**network.pretrained_cfg, **stated}


def torchvision_preprocess(name: str) -> Preprocess | None:
    """torchvision's preprocessing of an architecture, where it states one: for images, segmentation and videos."""
    import_torchvision()
    models = importlib.import_module("torchvision.models")
    try:
        transform = models.get_model_weights(name).DEFAULT.transforms()
        mean, std = _NORMALISING.get(name, (transform.mean, transform.std))
        # Segmentation resizes the shorter side and does not crop.
        size = list(getattr(transform, "crop_size", None) or transform.resize_size)
    except (AttributeError, ValueError, TypeError):  # detection states other things
        return None
    frames = [FRAMES] if type(transform).__name__ == "VideoClassification" else []
    return Preprocess((3, *frames, size[0], size[-1]), tuple(mean), tuple(std))


def candidates(path: Path, stated: str | None = None) -> list[Candidate]:
    """What a checkpoint may be of: torchvision's file of that name, timm's config.json beside it, the same stem.

    Args:
        stated: what the checkpoint itself says; counts as a stem, too.
    """
    exact = [Candidate("torchvision", name) for name in _torchvision_file(path.name)]
    if exact:
        return exact
    beside = _config_beside(path)
    if beside is not None:
        return [beside]
    named = _named(re.sub(r"[-_.][0-9a-f]{8,}$", "", path.stem))
    return named + [candidate for candidate in _named(stated or "") if candidate not in named]


def _named(stem: str) -> list[Candidate]:
    base, dot, _ = stem.replace("-", "_").lower().partition(".")  # timm names a recipe behind a dot: resnet18.a1_in1k
    zoos = ("timm",) if dot else ZOOS
    return [Candidate(zoo, name) for zoo in zoos for name in names(zoo) if name.lower() == base]


def _config_beside(path: Path) -> Candidate | None:
    """The architecture that a hub's ``config.json`` in the same folder names, if it is one of timm's."""
    file = path.with_name("config.json")
    try:
        if not file.is_file() or file.stat().st_size > 1 << 20:
            return None
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        return None
    found = _configured(config, str(file))
    return found if found.name in names("timm") else None


def _torchvision_file(file: str) -> list[str]:
    found = []
    known = names("torchvision")
    models = importlib.import_module("torchvision.models") if known else None
    for name in known:
        assert models is not None
        if any(weights.url.rpartition("/")[2] == file for weights in models.get_model_weights(name)):
            found.append(name)
    return found


def _unknown(zoo: str, name: str, known: list[str]) -> AnncvtError:
    import difflib

    close = difflib.get_close_matches(name, known, 5, 0.5)
    return AnncvtError(
        f"{zoo} has no architecture {name!r}",
        fix=f"did you mean {', '.join(close)}?" if close else f"see {zoo}'s list_models()",
    )
