"""Modules on the adder op, drop-in for ``torch.nn.Conv1d/2d/3d`` and ``Linear``: same ``state_dict`` keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

import anncvt.runtime.op  # noqa: F401  (registers torch.ops.anncvt.adder2d)


class LastNorm(nn.BatchNorm1d):
    """BatchNorm over the last dimension, ``[..., C] -> [..., C]``: what follows a Linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view_as(x)


_NORMS: dict[int, type[nn.Module]] = {0: LastNorm, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def channels_first(module: nn.Module, x: Tensor) -> Tensor:
    """``x`` ``[N, C, *]`` as it is, or ``[N, *, C]`` turned so, for what goes into or comes out of ``module``."""
    return x.movedim(-1, 1) if isinstance(module, (LastNorm, AdderLinear)) else x


def op_padding(sides: tuple[tuple[int, int], ...]) -> list[int]:
    """Per dimension (before, after), as the op takes it."""
    (top, bottom), (left, right) = sides
    return [top, left] if (top, left) == (bottom, right) else [top, left, bottom, right]


class _AdderNd(nn.Module):
    """Shared by all: parameters, padding, bias, optional norm.

    ``weight`` is ``[O, C/groups, *kernel_size]``. With ``copies`` a layer compares every input with so many weights, at
    1, 2, 4, ... times its size, ``y = -sum_k sum |2^k x - w_k|``: ``[O, copies * C, *kernel_size]``, first all ``w_0``.
    """

    ndim: int
    norm: nn.Module | None
    #: Computes the sum in its stead, from it and its two operands: :class:`anncvt.fake_quant.FakeQuant`. For 2-d adders
    #: and Linear ones.
    fake: Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], Tensor] | None = None
    #: Pads as TensorFlow's SAME does, by the size of each input, instead of by ``padding``.
    same: bool = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | str | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        *,
        norm: bool = False,
        gradient: str = "full",
        copies: int = 1,
    ) -> None:
        super().__init__()
        if copies < 1:
            raise ValueError(f"copies={copies} is less than 1")
        if copies > 1 and groups > 1:
            raise ValueError(f"a layer with several weights per input has one group, not {groups}")
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"groups={groups} divides neither or not both of {in_channels} and {out_channels}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = self._tuple(kernel_size), self._tuple(stride)
        self.dilation, self.padding_mode, self.gradient = self._tuple(dilation), padding_mode, gradient
        self.copies = copies
        self.padding = self._sides(padding)
        self.weight = nn.Parameter(torch.empty(out_channels, copies * in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.norm = _NORMS[self.ndim](out_channels) if norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """AdderNet's own initialisation: weights on the scale of normalised activations."""
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _tuple(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        return (value,) * self.ndim if isinstance(value, int) else tuple(value)

    def _sides(self, padding: int | str | tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """Per dimension (before, after). 'same' puts the odd pixel behind, as torch does."""
        if padding == "valid":
            return ((0, 0),) * self.ndim
        if padding == "same":
            if any(s != 1 for s in self.stride):
                raise ValueError("padding='same' needs stride 1")
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return tuple((t // 2, t - t // 2) for t in total)
        return tuple((p, p) for p in self._tuple(cast("int | tuple[int, ...]", padding)))

    @classmethod
    def from_conv(
        cls,
        conv: _ConvNd,
        *,
        weight: nn.Parameter | None = None,
        norm: bool = False,
        gradient: str = "full",
        copies: int = 1,
    ) -> _AdderNd:
        """An adder of the same geometry on the convolution's own Parameter objects (with ``copies`` the weight is new).

        Args:
            weight: takes the place of the convolution's, where that is computed from others.
        """
        adder = cls(
            conv.in_channels,
            conv.out_channels,
            cast("tuple[int, ...]", conv.kernel_size),
            cast("tuple[int, ...]", conv.stride),
            cast("str | tuple[int, ...]", conv.padding),
            cast("tuple[int, ...]", conv.dilation),
            conv.groups,
            False,
            conv.padding_mode,
            norm=norm,
            gradient=gradient,
            copies=copies,
        )
        return adder._adopt(conv, cast(nn.Parameter, conv.weight) if weight is None else weight)

    def _adopt(self, layer: _ConvNd | nn.Linear, weight: nn.Parameter) -> Any:
        self.weight = weight if self.copies == 1 else nn.Parameter(self.copied(weight.detach()))
        self.bias = cast("nn.Parameter | None", layer.bias)
        return self.train(layer.training).to(weight.device)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, gradient={self.gradient!r}"
            + (f", copies={self.copies}" if self.copies > 1 else "")
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.response(x)
        return y if self.norm is None else self.norm(y)

    def response(self, x: Tensor, *, is_padded: bool = False) -> Tensor:
        """The adder's own output (with its bias), before a norm of its own. ``is_padded``: ``x`` comes padded."""
        y = self._adder(x, ((0, 0),) * self.ndim) if is_padded else self._adder(*self.operand(x))
        if self.bias is not None:
            y = y + self.bias.view(-1, *(1,) * self.ndim)
        return y

    def copied(self, x: Tensor) -> Tensor:
        """``x`` ``[N, C, *]`` as the weights of a layer with ``copies`` meet it: ``[x, 2x, 4x, ...]`` by channels."""
        copies = [x]
        while len(copies) < self.copies:
            copies.append(copies[-1] + copies[-1])
        return x if self.copies == 1 else torch.cat(copies, 1)

    @property
    def repeats(self) -> int:
        """How many weights of an input's own size do the same: ``|2^k x - w|`` is ``2^k`` times ``|x - w / 2^k|``."""
        return 2**self.copies - 1

    def repeated(self, weight: Tensor) -> Tensor:
        """``weight`` for ``repeats`` plain copies of the input: ``[O, repeats * C/groups, *kernel]``."""
        if self.copies == 1:
            return weight
        parts = weight.chunk(self.copies, 1)
        return torch.cat([part / 2**k for k, part in enumerate(parts) for _ in range(2**k)], 1)

    def operand(self, x: Tensor) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
        """What the op gets for ``x``, and the zeros around it per dimension (before, after)."""
        if self.padding_mode == "zeros":
            return x, self.sides_for(x)
        return self.padded(x), ((0, 0),) * self.ndim

    def padded(self, x: Tensor) -> Tensor:
        """``x`` with the layer's padding around it."""
        flat = [side for pair in reversed(self.sides_for(x)) for side in pair]
        return F.pad(x, flat, mode="constant" if self.padding_mode == "zeros" else self.padding_mode) if flat else x

    def sides_for(self, x: Tensor) -> tuple[tuple[int, int], ...]:
        """Per dimension (before, after); with ``same`` TensorFlow's SAME: ``ceil(size / stride)`` outputs."""
        if not self.same:
            return self.padding
        geometry = zip(x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True)
        total = [max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0) for size, k, s, d in geometry]
        return tuple((t // 2, t - t // 2) for t in total)

    def _adder(self, x: Tensor, padding: tuple[tuple[int, int], ...]) -> Tensor:
        raise NotImplementedError

    def _fakeable(self, x: Tensor, weight: Tensor, *geometry: Any) -> Tensor:
        """:meth:`_adder2d`, or what :attr:`fake` makes of it, which has one grid for an input and all its weights."""
        if self.fake is None:
            return self._adder2d(x, weight, *geometry)

        def plain(x: Tensor, weight: Tensor) -> Tensor:
            return self._op(torch.cat([x] * self.repeats, 1), weight, *geometry)

        return self.fake(plain, x, self.repeated(weight))

    def _adder2d(self, x: Tensor, weight: Tensor, *geometry: Any) -> Tensor:
        return self._op(self.copied(x), weight, *geometry)

    def _op(
        self,
        x: Tensor,
        weight: Tensor,
        stride: tuple[int, ...],
        padding: tuple[tuple[int, int], ...],
        dilation: tuple[int, ...],
    ) -> Tensor:
        geometry = (list(stride), op_padding(padding), list(dilation), self.groups)
        return torch.ops.anncvt.adder2d(x, weight, *geometry, self.gradient)


class AdderConv2d(_AdderNd):
    """``y = -sum |x - w|`` over 2-d windows, ``[N, C, H, W] -> [N, O, H', W']``."""

    ndim = 2

    def _adder(self, x: Tensor, padding: tuple[tuple[int, int], ...]) -> Tensor:
        return self._fakeable(x, self.weight, self.stride, padding, self.dilation)


class AdderConv1d(_AdderNd):
    """``y = -sum |x - w|`` over 1-d windows, ``[N, C, L] -> [N, O, L']``: the 2-d op on one row."""

    ndim = 1

    def _adder(self, x: Tensor, padding: tuple[tuple[int, int], ...]) -> Tensor:
        y = self._adder2d(
            x.unsqueeze(2),
            self.weight.unsqueeze(2),
            (1, *self.stride),
            ((0, 0), *padding),
            (1, *self.dilation),
        )
        return y.squeeze(2)


class AdderConv3d(_AdderNd):
    """``y = -sum |x - w|`` over 3-d windows, ``[N, C, D, H, W] -> [N, O, D', H', W']``: a sum of 2-d ops over depth."""

    ndim = 3

    def _adder(self, x: Tensor, padding: tuple[tuple[int, int], ...]) -> Tensor:
        # Depth is padded explicitly: its padded taps count as |0 - w| like any other.
        x = F.pad(x, (0, 0, 0, 0, *padding[0]))
        reach, (step, *stride), (gap, *dilation) = self.kernel_size[0], self.stride, self.dilation
        depth = (x.shape[2] - gap * (reach - 1) - 1) // step + 1
        total: Tensor | None = None
        for k in range(reach):
            slab = x[:, :, k * gap : k * gap + (depth - 1) * step + 1 : step].transpose(1, 2)
            y = self._adder2d(
                slab.flatten(0, 1), self.weight[:, :, k], tuple(stride), padding[1:], tuple(dilation)
            ).unflatten(0, (x.shape[0], depth))
            total = y if total is None else total + y
        assert total is not None
        return total.transpose(1, 2)


class AdderLinear(_AdderNd):
    """``y = -sum |x - w|`` over the last dimension, ``[N, ..., C] -> [N, ..., O]``: the op with a 1x1 kernel."""

    ndim = 0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        norm: bool = False,
        gradient: str = "full",
        copies: int = 1,
    ) -> None:
        super().__init__(
            in_features, out_features, (), (), (), (), 1, bias, norm=norm, gradient=gradient, copies=copies
        )

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, norm: bool = False, gradient: str = "full", copies: int = 1
    ) -> AdderLinear:
        """An adder on the Linear layer's own Parameter objects (with ``copies`` the weight is new)."""
        adder = cls(linear.in_features, linear.out_features, norm=norm, gradient=gradient, copies=copies)
        return adder._adopt(linear, cast(nn.Parameter, linear.weight))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, gradient={self.gradient!r}" + (
            f", copies={self.copies}" if self.copies > 1 else ""
        )

    def _adder(self, x: Tensor, padding: tuple[tuple[int, int], ...]) -> Tensor:
        first = x.movedim(-1, 1)
        maps = first if first.dim() == 4 else first.reshape(first.shape[0], first.shape[1], 1, -1)
        y = self._fakeable(maps, self.weight[:, :, None, None], (1, 1), ((0, 0), (0, 0)), (1, 1))
        return y.reshape(y.shape[0], y.shape[1], *first.shape[2:]).movedim(1, -1)


def adder_class(ndim: int) -> type[_AdderNd]:
    """The adder module for convolutions over ``ndim`` spatial dimensions."""
    return {1: AdderConv1d, 2: AdderConv2d, 3: AdderConv3d}[ndim]
