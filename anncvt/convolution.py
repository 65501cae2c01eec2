"""What a convolution module really computes: the weight and the padding its input meets, found by running it.

Subclasses of torch's convolutions standardise their weights, normalise them, or pad by the size of the input. Whether
such a layer is a plain convolution of some constant weight is not told from its class but from what it hands to
``torch.conv*d`` for several inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from anncvt.copies import copied

_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True)
class Form:
    """A layer as a plain convolution."""

    weight: Tensor  # [O, C/groups, *kernel]
    folded: bool = False  # the weight is computed from the layer's parameters
    same: bool = False  # pads as TensorFlow's SAME does, by the size of the input


class NoForm(Exception):
    """The layer is no plain convolution; the message says why."""


def form_of(conv: nn.Module) -> Form:
    """The form of a convolution module in eval mode, exact or not at all.

    Raises:
        NoForm: it has none.
    """
    if isinstance(conv, _ConvTransposeNd):
        raise NoForm("transposed: no adder counterpart")
    if not isinstance(conv, _ConvNd):
        raise NoForm(f"{type(conv).__name__}: not a convolution")
    if any(parameter.is_complex() for parameter in conv.parameters()):
        raise NoForm("complex numbers: no adder counterpart")
    if conv._forward_hooks or (conv._forward_pre_hooks and "weight" in conv._parameters):
        raise NoForm("has hooks that a replacement would lose")
    if type(conv) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and "weight" in conv._parameters:
        return Form(conv.weight)
    return _probed(conv)


def effective_weight(layer: nn.Module) -> Tensor:
    """The weight that the input of a convolution or Linear layer meets."""
    return form_of(layer).weight if isinstance(layer, _ConvNd) else cast(Tensor, layer.weight)


@dataclass
class _Probe(TorchFunctionMode):
    """Notes every convolution that runs."""

    seen: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _FUNCTIONS:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
            self.seen.append({**defaults, **dict(zip(names, args, strict=False)), **(kwargs or {}), "output": output})
        return output


def _probed(conv: _ConvNd) -> Form:
    name = type(conv).__name__
    try:
        twin = copied(conv).eval()
        calls = [_call(twin, x) for x in _inputs(twin)]
    except NoForm as reason:
        raise NoForm(f"{name}: {reason}") from None
    except Exception as error:  # the forward of any class
        raise NoForm(f"{name}: its own forward could not be examined ({type(error).__name__})") from error
    first = calls[0][1]
    for _, seen in calls:
        if not _equal(seen["weight"], first["weight"]) or not _equal(seen["bias"], conv.bias):
            raise NoForm(f"{name}: its weights depend on its input")
        if seen["weight"].shape[2:] != conv.kernel_size or not _same_steps(conv, seen):
            raise NoForm(f"{name}: its own forward differs from a plain convolution")
    weight = first["weight"].detach()
    own = conv._parameters.get("weight")
    folded = own is None or not torch.equal(weight, own)
    for same in (False, True):
        if all(_equal(seen["input"], x) for x, seen in _padded(conv, calls, same)):
            return Form(weight if folded or own is None else own, folded, same)
    raise NoForm(f"{name}: its own padding differs from a plain convolution's")


def _call(conv: _ConvNd, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    with torch.no_grad(), _Probe() as probe:
        output = conv(x)
    if len(probe.seen) != 1 or probe.seen[0]["output"] is not output:
        raise NoForm("its own forward does more than a plain convolution")
    return x, probe.seen[0]


def _inputs(conv: _ConvNd) -> list[Tensor]:
    """Noise of several sizes, so that padding by size shows itself."""
    like = next(conv.parameters())
    generator = torch.Generator().manual_seed(0)
    reach = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    found = []
    for more in (1, 2, 3, 4):
        x = torch.randn(1, conv.in_channels, *(r + more for r in reach), generator=generator)
        found.append(x.to(like.device, like.dtype))
    return found


def _padded(conv: _ConvNd, calls: list[tuple[Tensor, dict[str, Any]]], same: bool) -> list[tuple[Tensor, dict]]:
    """The inputs as a hypothesis says they reach ``torch.conv*d``, padding that it does itself left out."""
    expected = []
    for x, seen in calls:
        if same:
            sides = [
                max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
                for size, k, s, d in zip(x.shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True)
            ]
            flat = [side for total in reversed(sides) for side in (total // 2, total - total // 2)]
            expected.append((F.pad(x, flat) if _unpadded(seen["padding"]) else x.new_empty(0), seen))
        elif conv.padding_mode != "zeros":
            expected.append((F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), seen))
        else:
            own = _per_side(seen["padding"], conv) == _per_side(conv.padding, conv)
            expected.append((x if own else x.new_empty(0), seen))
    return expected


def _unpadded(padding: Any) -> bool:
    return padding == "valid" or (not isinstance(padding, str) and not any(_tuple(padding, 1)))


def _per_side(padding: Any, conv: _ConvNd) -> Any:
    return padding if isinstance(padding, str) else _tuple(padding, len(conv.kernel_size))


def _same_steps(conv: _ConvNd, seen: dict[str, Any]) -> bool:
    n = len(conv.kernel_size)
    steps = _tuple(seen["stride"], n) == conv.stride and _tuple(seen["dilation"], n) == conv.dilation
    return steps and seen["groups"] == conv.groups


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a, b)
