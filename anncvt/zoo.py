"""The model collections: torchvision and timm, both optional."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from anncvt.errors import AnncvtError
from anncvt.program import Preprocess

if TYPE_CHECKING:
    from torch import nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ZOOS = ("torchvision", "timm")
_KEEP_ALIVE: list[Any] = []


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
        if "operator torchvision::" not in str(error):
            raise AnncvtError(
                f"torchvision does not fit the installed torch: {error}", fix="install the release made for it"
            ) from error
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for op in ("nms", "qnms"):
        library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEEP_ALIVE.append(library)  # its definitions go with it
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    try:
        return importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        raise AnncvtError(
            f"torchvision does not fit the installed torch: {error}", fix="install the release made for it"
        ) from error


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
        options: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None, **arguments}
        if not pretrained and "weights_backbone" not in options and name.startswith(_WITH_BACKBONE):
            options["weights_backbone"] = None
        return models.get_model(name, **options)
    timm = import_timm()
    if not name.startswith(("hf-hub:", "hf_hub:")) and not timm.is_model(name.partition(".")[0]):
        raise _unknown(zoo, name, timm.list_models())
    return timm.create_model(name, pretrained=pretrained, **arguments)


#: Their factories would download a backbone even without weights of their own.
_WITH_BACKBONE = ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet", "ssd", "fcos", "fcn", "deeplabv3", "lraspp")


def stated_preprocess(network: nn.Module) -> Preprocess | None:
    """The preprocessing a timm network carries with itself."""
    config = getattr(network, "pretrained_cfg", None) or getattr(network, "default_cfg", None)
    if not isinstance(config, Mapping) or not config.get("input_size"):
        return None
    mean, std = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
    return Preprocess(tuple(config["input_size"]), tuple(mean), tuple(std))


def torchvision_preprocess(name: str) -> Preprocess | None:
    """torchvision's preprocessing of an architecture, where it states one for still images."""
    import_torchvision()
    models = importlib.import_module("torchvision.models")
    try:
        transform = models.get_model_weights(name).DEFAULT.transforms()
        size, mean, std = transform.crop_size, transform.mean, transform.std
    except (AttributeError, ValueError, TypeError):  # segmentation and video state other things
        return None
    return Preprocess((3, size[0], size[0]), tuple(mean), tuple(std)) if len(size) == 1 else None


def candidates(path: Path) -> list[tuple[str, str]]:
    """``(zoo, name)`` pairs that a checkpoint's file name suggests: torchvision's URL exactly, else the same stem."""
    exact = [("torchvision", name) for name in _torchvision_file(path.name)]
    if exact:
        return exact
    stem = re.sub(r"[-_.][0-9a-f]{8,}$", "", path.stem).replace("-", "_").lower()
    base, dot, _ = stem.partition(".")  # timm names a training recipe behind a dot: resnet18.a1_in1k
    zoos = ("timm",) if dot else ZOOS
    return [(zoo, name) for zoo in zoos for name in names(zoo) if name.lower() == base]


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
