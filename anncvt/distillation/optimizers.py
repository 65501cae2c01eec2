"""What moves the weights: parameter groups, the adaptive step, clipping, loss scaling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anncvt.distillation.config import DistillConfig
from anncvt.passes.adaptive_step import adaptive_adder_step
from anncvt.passes.objectives import backward
from anncvt.passes.schedule import set_rates


class Descent:
    """The optimizer of one network, with everything that happens between backward and the step.

    SGD takes adder gradients scaled to one norm a layer (:func:`adaptive_adder_step`). AdamW normalises every
    coordinate itself, so there ``eta`` is the rate of adder weights as a multiple of the others' rate; in both cases
    an adder weight moves by about ``lr * eta`` a step (times what momentum adds up).

    Args:
        parameters: of the network (and of the loss).
        adders: those of them that are adder weights.
        lr: peak learning rate.
        config: settled.
        device: where the loss is scaled, for ``precision="fp16"``.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        adders: Sequence[nn.Parameter],
        lr: float,
        config: DistillConfig,
        device: torch.device,
    ) -> None:
        assert config.weight_decay is not None and config.eta is not None, "not settled"
        self._adders, self._eta, self._clip = adders, config.eta, config.clip_grad
        self._normed = config.optimizer == "sgd"
        known = set(adders)
        self._rest = [p for p in parameters if p not in known and p.requires_grad]
        groups: list[dict[str, Any]] = [
            # Decay pulls a convolution towards doing nothing; an adder's neutral point is not zero: no decay there.
            {"params": list(adders), "weight_decay": 0.0, "lr": lr if self._normed else lr * config.eta},
            {"params": [p for p in self._rest if p.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in self._rest if p.dim() <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if self._normed:
            self._optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=lr, momentum=config.momentum)
        else:
            self._optimizer = torch.optim.AdamW(groups, lr=lr)
        self._peaks = [group["lr"] for group in self._optimizer.param_groups]
        # Without fp16 it passes everything through.
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that it moves."""
        return [*self._adders, *self._rest]

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``; several times a step where gradients accumulate."""
        backward(self._scaler.scale(loss))

    def step(self, factor: float) -> None:
        """Move by the gradients that are there (summed over parts and processes), at ``factor`` of the peak rate."""
        set_rates(self._optimizer, self._peaks, factor)
        self._scaler.unscale_(self._optimizer)
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self._rest, self._clip)
        if self._normed:
            adaptive_adder_step(self._adders, self._eta)
        self._scaler.step(self._optimizer)
        self._scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
