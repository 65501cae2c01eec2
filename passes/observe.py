"""One forward pass on zeros, watched: which layers run in which order, with which shapes, and who reads them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from anncvt.copies import outline
from anncvt.errors import AnncvtError, first_line
from anncvt.modes import eval_mode

#: Convolutions that are called as functions, by what torch calls them.
FUNCTIONAL: dict[Any, str] = {
    function: function.__name__
    for function in (
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.conv_transpose1d,
        F.conv_transpose2d,
        F.conv_transpose3d,
        torch.convolution,
    )
}
_LINEAR = (F.linear,)
#: Class names of deformable convolutions (torchvision's, mmcv's, ...): their op is no torch function.
_DEFORMABLE = "DeformConv"


@dataclass
class Call:
    """A convolution or Linear layer that ran, as a module or as a function."""

    name: str  # qualified name; for a function, its owner's with the function's name behind it
    kind: str
    is_module: bool
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    macs: int  # over all calls of a shared module
    calls: int = 1
    reads_image: bool = False
    readers: list[str] = field(default_factory=list)  # modules (by name) and functions that read its output
    linear_after: bool = False


@dataclass
class Observation:
    """What one image causes."""

    calls: dict[str, Call]  # convolutions, in execution order
    linears: dict[str, Call]  # Linear modules, in execution order
    linear_macs: int  # of these and of linear functions
    output_shape: tuple[int, ...]
    output_shapes: tuple[tuple[int, ...], ...]
    order: tuple[str, ...]  # names of the modules that ran, once each


def observe_outline(network: nn.Module, input_size: tuple[int, ...]) -> Observation:
    """:func:`observe` without data, in no time and memory, where the network's Python allows that."""
    try:
        return observe(outline(network), input_size)
    except Exception:  # a forward that looks at values, or makes tensors of its own, needs real ones
        return observe(network, input_size)


def observe(network: nn.Module, input_size: tuple[int, ...]) -> Observation:
    """Run ``network`` once in eval mode on zeros ``[1, *input_size]``.

    Its parameters, BatchNorm statistics, mode and the random number generator are left as they were.

    Raises:
        AnncvtError: the forward pass fails.
    """
    inputs = _required_inputs(network)
    if len(inputs) > 1:
        raise AnncvtError(
            f"the network takes {len(inputs)} inputs ({', '.join(inputs)})", fix="convert a network of one image"
        )
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise AnncvtError(
                f"{name or 'the network'} is TorchScript, which cannot be looked into",
                fix="use the Python module that it was made from",
            )
    watch = _Watch(network)
    parameter = next(network.parameters(), torch.empty(0))
    image = torch.zeros(1, *input_size, dtype=parameter.dtype, device=parameter.device)
    with eval_mode(network), torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            output = watch.run(image)
        except AnncvtError:
            raise
        except Exception as error:
            missing = "custom C++ ops" in str(error)
            raise AnncvtError(
                f"the forward pass on {list(image.shape)} failed: {type(error).__name__}: "
                + first_line(error).partition(". ")[0],
                fix="it needs compiled operators of torchvision, as detection networks do: install the torchvision "
                "built for this torch"
                if missing
                else "pass the network's input with --input-size CHANNELSxHEIGHTxWIDTH",
            ) from error
    shapes = tuple(tuple(leaf.shape) for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    if not shapes:
        raise AnncvtError("the network's forward returns no tensor", fix="convert the part of it that does")
    return Observation(watch.calls, watch.linears, watch.linear_macs, shapes[0], shapes, tuple(watch.order))


def _required_inputs(network: nn.Module) -> list[str]:
    parameters = inspect.signature(network.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind in positional]


class _Watch(TorchFunctionMode):
    """Hooks tell which module is running; the mode sees every torch function with its arguments."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.calls: dict[str, Call] = {}
        self.linears: dict[str, Call] = {}
        self.order: dict[str, None] = {}
        self.linear_macs = 0
        self._stack: list[tuple[str, nn.Module]] = []
        # Outputs of convolutions, kept alive so that their ids stay theirs.
        self._made: dict[int, tuple[Tensor, Call]] = {}
        self._hidden: list[tuple[Tensor, Call]] = []
        self._image: Tensor | None = None

    def run(self, image: Tensor) -> Any:
        self._image = image
        handles = []
        for name, module in self.network.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(name)))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            with self:
                return self.network(image)
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._stack.append((name, module))
            self.order.setdefault(name)

        return hook

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        name, _ = self._stack.pop()
        if _DEFORMABLE in type(module).__name__ and isinstance(output, Tensor):
            weight: Any = module.weight
            macs = output.numel() * math.prod(weight.shape[1:])
            groups = inputs[0].shape[1] // weight.shape[1]
            self._note(self.calls, name, module, (inputs[0], weight, output), macs, module.stride, groups)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if isinstance(output, Tensor) and getattr(func, "__name__", "") != "__get__":
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            name, module = self._stack[-1] if self._stack else ("", self.network)
            for tensor in inputs:
                if id(tensor) in self._made:
                    self._made[id(tensor)][1].readers.append(_reader(name, module, func))
            if id(output) in self._made:  # changed in place: what reads it from here on does not read the convolution
                self._hidden.append(self._made.pop(id(output)))
            if func in FUNCTIONAL:
                self._convolution(name, module, FUNCTIONAL[func], args, kwargs, output)
            elif func in _LINEAR:
                self._linear(name, module, inputs, output)
        return output

    def _linear(self, name: str, module: nn.Module, inputs: list[Tensor], output: Tensor) -> None:
        macs = output.numel() * inputs[0].shape[-1]
        self.linear_macs += macs
        for call in self.calls.values():
            call.linear_after = True
        if isinstance(module, nn.Linear):
            self._note(self.linears, name, module, (inputs[0], inputs[1], output), macs, (), 1)

    def _convolution(
        self, owner: str, module: nn.Module, function: str, args: Any, kwargs: dict[str, Any], output: Tensor
    ) -> None:
        x = args[0] if args else kwargs["input"]
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        transposed = "transpose" in function
        # Each output (transposed: each input) element of a channel meets the weights of one filter.
        macs = (x if transposed else output).numel() * math.prod(weight.shape[1:])
        groups = (output if transposed else x).shape[1] // weight.shape[1]
        if isinstance(module, _ConvNd):
            self._note(self.calls, owner, module, (x, weight, output), macs, module.stride, groups)
        else:
            name = f"{owner}.{function}" if owner else function
            self._note(self.calls, name, function, (x, weight, output), macs, _stride(args, kwargs), groups)

    def _note(
        self,
        calls: dict[str, Call],
        name: str,
        kind: nn.Module | str,
        tensors: tuple[Tensor, Tensor, Tensor],
        macs: int,
        stride: Any,
        groups: int,
    ) -> None:
        x, weight, output = tensors
        if name in calls:
            calls[name].macs += macs
            calls[name].calls += 1
        else:
            calls[name] = Call(
                name,
                kind if isinstance(kind, str) else type(kind).__name__,
                isinstance(kind, nn.Module),
                tuple(x.shape),
                tuple(output.shape),
                tuple(weight.shape[2:]),
                _tuple(stride, weight.dim() - 2),
                groups,
                macs,
                reads_image=x is self._image,
            )
        self._made[id(output)] = (output, calls[name])


def _reader(name: str, module: nn.Module, func: Any) -> str:
    """A leaf module reads as a whole; in a module with children it is the function that reads."""
    if isinstance(module, (_ConvNd, _BatchNorm)) or not any(True for _ in module.children()):
        return name
    return f"{name}.{getattr(func, '__name__', func)}()"


def _stride(args: Any, kwargs: dict[str, Any]) -> Any:
    return args[3] if len(args) > 3 else kwargs.get("stride", 1)


def _tuple(value: Any, ndim: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (int(value),) * ndim
