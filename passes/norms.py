"""BatchNorms that do more than normalise: the activation behind them may be part of them, as in timm."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

#: Class names of norms with an activation of their own: timm's, and copies of them in other packages.
_WITH_ACTIVATION = ("BatchNormAct2d", "SyncBatchNormAct")


def normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """What ``norm`` makes of ``x`` ``[N, C, *]``, without an activation of its own."""
    return _BatchNorm.forward(cast(_BatchNorm, norm), x) if _activation(norm) is not None else norm(x)


def own_activation(norm: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What ``norm`` does to its normalised values, element by element; leaves its input alone. None: nothing."""
    activation = _activation(norm)
    # The clone: activations work in place.
    return None if activation is None else lambda z: activation(z.clone())


def _activation(norm: nn.Module) -> nn.Module | None:
    if not isinstance(norm, _BatchNorm) or type(norm).__name__ not in _WITH_ACTIVATION:
        return None
    activation = getattr(norm, "act", None)
    return activation if isinstance(activation, nn.Module) and not isinstance(activation, nn.Identity) else None
