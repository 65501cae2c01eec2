"""The feature term of PKKD (arXiv 2009.13044, section 3.2): teacher and student compared in a kernel space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anncvt.distillation.processes import Processes

#: Pixels per layer that are compared. More of a batch says the same, and would cost more than the network itself.
POSITIONS = 4096


class FeatureLoss(nn.Module):
    """``L_mid``, the mean over layers of ``MSE(rho(g(adder)), h(conv))``.

    The inner product ``x*f`` of a convolution and the distance ``|x-f|`` of an adder are moved to comparable scales by
    a Gaussian-type kernel ``h = exp(u_c / (2 sigma_c^2))`` and a Laplace-type kernel ``g = exp(u_a / (2 sigma_a^2))``.
    ``u`` is the raw output of the layer, standardised per channel: the raw sums grow with the fan-in and would make
    exp overflow or vanish. ``sigma`` is learned per layer, ``rho`` is a learned 1x1 convolution that is dropped at
    inference. Only the student's side has a ``rho``, and both sides are standardised again: with a map on each side
    the loss is minimised by two maps to zero.

    Args:
        channels: output channels of every layer.
        kind: ``"kernel"``, or ``"mse"`` for the same comparison without the kernels.
        processes: over whose images statistics are taken; None: over this one's.
    """

    def __init__(self, channels: Sequence[int], kind: str = "kernel", processes: Processes | None = None) -> None:
        super().__init__()
        self.kind = kind
        self._processes = processes or Processes()
        self.rho = nn.ParameterList(nn.Parameter(torch.eye(count)) for count in channels)
        self.log_sigma_adder = nn.Parameter(torch.zeros(len(channels)))
        self.log_sigma_conv = nn.Parameter(torch.zeros(len(channels)))

    def forward(self, adders: Sequence[Tensor], convolutions: Sequence[Tensor]) -> Tensor:
        """Raw outputs per layer, ``[N, C, *]`` each; the convolutions' get no gradient. Returns a scalar."""
        losses = []
        for at, (adder, convolution) in enumerate(zip(adders, convolutions, strict=True)):
            every = max(1, self._processes.count * adder[:, 0].numel() // POSITIONS)
            g = self._standardise(_rows(adder[::every]))
            h = self._standardise(_rows(convolution[::every].detach()))
            if self.kind == "kernel":
                g = torch.exp(g * (0.5 * torch.exp(-2 * self.log_sigma_adder[at])))
                h = torch.exp(h * (0.5 * torch.exp(-2 * self.log_sigma_conv[at])))
            losses.append(F.mse_loss(self._standardise(g @ self.rho[at].T), self._standardise(h)))
        return torch.stack(losses).mean()

    def _standardise(self, x: Tensor) -> Tensor:
        """Zero mean and unit variance per channel, of ``[rows, C]``."""
        if self._processes.count == 1:
            return F.batch_norm(x, None, None, training=True)
        _, centred, variance = self._processes.moments(x)
        return centred * torch.rsqrt(variance + 1e-5)


def _rows(x: Tensor) -> Tensor:
    """``[N, C, *]`` as ``[rows, C]``, a row for each pixel: matrices are what is fastest, and free in channels_last."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])
