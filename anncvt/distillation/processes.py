"""Several processes as one: sums over all of them, and statistics of BatchNorm over all their images.

Built on ``torch.distributed`` itself: two networks and a loss with parameters share one step here, and the adaptive
step has to see summed gradients, which the wrappers that hide the all-reduce in backward make harder, not easier.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from anncvt import launch
from anncvt.errors import AnncvtError
from anncvt.nn import LastNorm, channels_first

Value = TypeVar("Value")

#: How long the others wait while the first one evaluates or writes.
PATIENCE = datetime.timedelta(hours=2)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, LastNorm)


class Processes:
    """The processes of a run; with one of them every method does nothing."""

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    @torch.no_grad()
    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))

    def share(self, value: Value) -> Value:
        """What the first process has for ``value``, in all of them."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean ``[C]``, ``x`` ``[N, C, *]`` minus it, and variance ``[C]``, over the ``x`` of all processes.

        Differentiable. In two passes: an adder's sums are far from zero, where a mean of squares would lose digits.
        """
        over = [at for at in range(x.dim()) if at != 1]
        mean = self._mean(x.mean(over))
        centred = x - mean.view(1, -1, *(1,) * (x.dim() - 2))
        return mean, centred, self._mean(centred.square().mean(over))

    def _mean(self, x: Tensor) -> Tensor:
        return x if self.count == 1 else all_reduce(x) / self.count


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """The processes that were launched with this one; the group is left at the end if it was not there before."""
    if launch.count() == 1:
        yield Processes()
        return
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        if mine:
            dist.destroy_process_group()


@contextlib.contextmanager
def synchronised(network: nn.Module, processes: Processes) -> Iterator[None]:
    """BatchNorm in training mode takes the statistics of all processes' images inside the block.

    ``torch.nn.SyncBatchNorm`` would replace the modules, and does not run on CPUs.

    Raises:
        AnncvtError: a BatchNorm of an unknown class, which may do more than normalise.
    """
    changed = []
    try:
        for name, module in network.named_modules():
            if type(module) in _NORMS:
                vars(module)["forward"] = functools.partial(_forward, module, processes)
                changed.append(module)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise AnncvtError(
                    f"{type(module).__name__} cannot be synchronised", where=name, fix="leave out --sync-bn"
                )
        yield
    finally:
        for module in changed:
            del vars(module)["forward"]


def _forward(module: Any, processes: Processes, x: Tensor) -> Tensor:
    if not module.training:
        return type(module).forward(module, x)
    x = channels_first(module, x)
    mean, centred, variance = processes.moments(x)
    _track(module, mean, variance, processes.count * x[:, 0].numel())
    shape = (1, -1, *(1,) * (x.dim() - 2))
    y = centred * torch.rsqrt(variance + module.eps).view(shape)
    if module.affine:
        y = y * module.weight.view(shape) + module.bias.view(shape)
    return y.movedim(1, -1) if isinstance(module, LastNorm) else y


@torch.no_grad()
def _track(module: Any, mean: Tensor, variance: Tensor, count: int) -> None:
    if not module.track_running_stats:
        return
    module.num_batches_tracked += 1
    weight = 1 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
    module.running_mean.lerp_(mean, weight)
    module.running_var.lerp_(variance * count / (count - 1), weight)


def running_statistics(network: nn.Module) -> list[Tensor]:
    """Mean and variance of every BatchNorm."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    return [value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None]
