"""Which piece of an integer network each operator of a float network is, or why it is none."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anncvt.nn import AdderConv2d, AdderLinear, _AdderNd
from anncvt.passes.joining import Joining, Limits, Line, Same, Sum, Unjoinable, argument, joining, line, source_of
from anncvt.passes.pieces import Fuser, Piece, Pieces, flat_graph, node_values, refused
from anncvt.program import Program
from anncvt.runtime.integer import Window
from anncvt.runtime.integer_network import INPUT


def pieces_of(program: Program) -> Pieces:
    """The pieces of the student.

    Raises:
        AnncvtError: the network cannot be traced, or has an operator that integer networks do not have.
    """
    assert program.student is not None
    graph = flat_graph(program.student)
    dtype = next(program.student.parameters()).dtype
    sample = torch.zeros(1, *program.preprocess.input_size, dtype=dtype)
    fuser = Fuser(graph, node_values(graph, program.student, sample))
    for node in graph.nodes:
        if node.op == "placeholder":
            if fuser.tensors:
                raise refused(node, "is a second input")
            fuser.tensors[node] = INPUT
        elif node.op == "output":
            _finish(fuser, node)
        elif node.op == "get_attr" or not isinstance(fuser.values[node], Tensor) or _in_groups(fuser, node):
            continue  # who reads it knows it
        else:
            _add(fuser, node, program.student)
    return fuser.pieces


def _finish(fuser: Fuser, node: fx.Node) -> None:
    result = node.args[0]
    if not isinstance(result, fx.Node) or not isinstance(fuser.values.get(result), Tensor):
        raise refused(node, "returns something else than one tensor")
    last = fuser.pieces.order[-1] if fuser.pieces.order else None
    if last is None or fuser.tensors[result] != last.name or last.scale is None or last.shape[1:] != (1, 1):
        raise refused(result, "is the output and no row of class scores")


def _add(fuser: Fuser, node: fx.Node, network: nn.Module) -> None:
    try:
        joined = joining(node, network)
        if joined is not None:
            _join(fuser, node, joined)
        else:
            _begin(fuser, node, network)
    except Unjoinable as error:
        raise refused(node, str(error)) from None


def _join(fuser: Fuser, node: fx.Node, joined: Joining) -> None:
    match joined:
        case Line(source, scale, shift):
            fuser.affine(node, source, scale, shift)
        case Limits(source, low, high):
            fuser.clip(node, source, low, high)
        case Sum(first, second):
            fuser.add(node, first, second)
        case Same(source):
            fuser.same(node, source)


def _begin(fuser: Fuser, node: fx.Node, network: nn.Module) -> None:
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        for kind, handler in _MODULES:
            if isinstance(module, kind):
                handler(fuser, node, source_of(node), module)
                return
        raise refused(node, f"is a {type(module).__name__}")
    function = _METHODS.get(str(node.target)) if node.op == "call_method" else _FUNCTIONS.get(cast(Any, node.target))
    if function is None:
        raise refused(node, "is not an operator that integer networks have")
    function(fuser, node)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double()


def _window(module: Any, padding: tuple[int, int, int, int]) -> Window:
    return Window(_pair(module.stride), padding, _pair(module.dilation), module.groups)


def _adder(fuser: Fuser, node: fx.Node, source: fx.Node, module: _AdderNd) -> None:
    if isinstance(module, AdderLinear):
        _row(fuser, node, source)
        window = Window()
    elif isinstance(module, AdderConv2d) and module.padding_mode == "zeros":
        (top, bottom), (left, right) = module.sides_for(fuser.values[source])
        window = _window(module, (top, left, bottom, right))
    else:
        raise refused(node, f"is a {type(module).__name__} with padding_mode {module.padding_mode!r}")
    read = fuser.repeated(source, module.repeats)
    piece = _layer(fuser, node, source, "adder", module, window)
    piece.inputs = (read,)
    if module.norm is not None:
        scale, shift = line(cast(_BatchNorm, module.norm))
        assert piece.scale is not None and piece.shift is not None
        piece.scale, piece.shift = piece.scale * scale, piece.shift * scale + shift


def _convolution(fuser: Fuser, node: fx.Node, source: fx.Node, module: nn.Conv2d) -> None:
    if type(module).forward is not nn.Conv2d.forward or module.padding_mode != "zeros":
        raise refused(node, f"is a {type(module).__name__} with padding_mode {module.padding_mode!r}")
    if isinstance(module.padding, str):  # "same" puts the odd pixel behind
        reach = [d * (k - 1) for d, k in zip(_pair(module.dilation), module.kernel_size, strict=True)]
        reach = reach if module.padding == "same" else [0, 0]
        sides = (reach[0] // 2, reach[1] // 2, reach[0] - reach[0] // 2, reach[1] - reach[1] // 2)
    else:
        sides = _pair(module.padding) * 2
    _layer(fuser, node, source, "convolution", module, _window(module, sides))


def _linear(fuser: Fuser, node: fx.Node, source: fx.Node, module: nn.Linear) -> None:
    _row(fuser, node, source)
    _layer(fuser, node, source, "convolution", module, Window())


def _row(fuser: Fuser, node: fx.Node, source: fx.Node) -> None:
    if fuser.values[source].ndim != 2:
        raise refused(node, "is a Linear layer over something else than a row an image")


def _layer(fuser: Fuser, node: fx.Node, source: fx.Node, op: str, module: Any, window: Window) -> Piece:
    weight = _double(module.repeated(module.weight) if isinstance(module, _AdderNd) else module.weight)
    weight = weight[:, :, None, None] if weight.ndim == 2 else weight
    shift = torch.zeros(len(weight), dtype=torch.float64) if module.bias is None else _double(module.bias)
    scale = torch.ones(len(weight), dtype=torch.float64)
    kernel = (weight.shape[2], weight.shape[3])
    return fuser.begin(node, op, source, window=window, kernel=kernel, weight=weight, scale=scale, shift=shift)


def _mean(fuser: Fuser, node: fx.Node) -> None:
    dims = argument(node, 1, "dim")
    source = source_of(node)
    ndim = fuser.values[source].ndim
    if ndim != 4 or not isinstance(dims, (tuple, list)) or sorted(d % 4 for d in dims) != [2, 3]:
        raise refused(node, "is a mean over other dimensions than height and width")
    _average(fuser, node, source, fuser.shape(source)[1:], Window())


def _average(fuser: Fuser, node: fx.Node, source: fx.Node, kernel: tuple[int, int], window: Window) -> None:
    channels = fuser.shape(source)[0]
    scale = torch.full((channels,), 1 / (kernel[0] * kernel[1]), dtype=torch.float64)
    shift = torch.zeros(channels, dtype=torch.float64)
    fuser.begin(node, "sum_pool", source, window=window, kernel=kernel, scale=scale, shift=shift)


def _adaptive(fuser: Fuser, node: fx.Node, source: fx.Node) -> None:
    size, wanted = fuser.shape(source)[1:], fuser.shape(node)[1:]
    if size[0] % wanted[0] or size[1] % wanted[1]:
        raise refused(node, f"averages {size[0]}x{size[1]} pixels to {wanted[0]}x{wanted[1]}, windows of unequal size")
    kernel = (size[0] // wanted[0], size[1] // wanted[1])
    _average(fuser, node, source, kernel, Window(stride=kernel))


def _average_pool(fuser: Fuser, node: fx.Node, source: fx.Node, options: dict[str, Any]) -> None:
    kernel, padding = _pair(options["kernel_size"]), _pair(options["padding"])
    if options["ceil_mode"] or options["divisor_override"] or (any(padding) and not options["count_include_pad"]):
        raise refused(node, "averages windows of unequal size")
    _average(fuser, node, source, kernel, Window(_pair(options["stride"] or kernel), padding * 2))


def _max_pool(fuser: Fuser, node: fx.Node, source: fx.Node, options: dict[str, Any]) -> None:
    kernel, padding = _pair(options["kernel_size"]), _pair(options["padding"])
    stride, dilation = _pair(options["stride"] or kernel), _pair(options["dilation"])
    # With ceil_mode the last window may reach beyond the padding: then there is more of it, which never wins.
    behind = tuple(
        max(before, (out - 1) * s + d * (k - 1) + 1 - size - before)
        for out, s, d, k, size, before in zip(
            fuser.shape(node)[1:], stride, dilation, kernel, fuser.shape(source)[1:], padding, strict=True
        )
    )
    window = Window(stride, (*padding, behind[0], behind[1]), dilation)
    fuser.begin(node, "max_pool", source, window=window, kernel=kernel)


_AVERAGE = {
    "kernel_size": None,
    "stride": None,
    "padding": 0,
    "ceil_mode": False,
    "count_include_pad": True,
    "divisor_override": None,
}
_MAX = {
    "kernel_size": None,
    "stride": None,
    "padding": 0,
    "dilation": 1,
    "ceil_mode": False,
}
_Pool = Callable[[Fuser, fx.Node, fx.Node, dict[str, Any]], None]


def _pool_module(handler: _Pool, options: dict[str, Any]) -> Callable[..., None]:
    def from_module(fuser: Fuser, node: fx.Node, source: fx.Node, module: nn.Module) -> None:
        handler(fuser, node, source, {name: getattr(module, name) for name in options})

    return from_module


def _pool_function(handler: _Pool, options: dict[str, Any]) -> Callable[..., None]:
    def from_call(fuser: Fuser, node: fx.Node) -> None:
        given = {name: argument(node, at, name, default) for at, (name, default) in enumerate(options.items(), 1)}
        handler(fuser, node, source_of(node), given)

    return from_call


def _reshape(fuser: Fuser, node: fx.Node, source: fx.Node | None = None, module: Any = None) -> None:
    """Any view that keeps the batch: ``[N, C, H, W]`` to ``[N, C*H*W]``, or nothing but ones appear or vanish."""
    source = source or source_of(node)
    if _in_groups(fuser, source):
        _channels_exchanged(fuser, node, source)
        return
    before, after = fuser.shape(source), fuser.shape(node)
    if fuser.values[source].shape[0] != fuser.values[node].shape[0] or after not in (before, (math.prod(before), 1, 1)):
        raise refused(node, "is another view than flattening to a row an image")
    if before == after:
        fuser.same(node, source)
    else:
        fuser.begin(node, "flatten", source)


_VIEWS = {"view", "reshape", torch.reshape}
_TURNS = {"transpose", "permute", torch.transpose, torch.permute}


def _in_groups(fuser: Fuser, node: fx.Node) -> bool:
    """Whether a node is a step on the way of :func:`_channels_exchanged`."""
    value = fuser.values[node]
    return isinstance(value, Tensor) and value.ndim == 5 and _calls(node, {*_VIEWS, *_TURNS, "contiguous"})


def _calls(node: fx.Node, targets: Collection[Any]) -> bool:
    """Whether a node calls one of some functions and methods; a module may have the name of a method."""
    return node.op != "call_module" and node.target in targets


def _channels_exchanged(fuser: Fuser, node: fx.Node, source: fx.Node) -> None:
    """Channels as ``[groups, C/groups]``, turned, and in one row again."""
    turned = source_of(source) if source.target == "contiguous" else source
    split = source_of(turned)
    x = source_of(split)
    axes = turned.args[1:]
    axes = tuple(axes[0]) if axes and isinstance(axes[0], (tuple, list)) else axes
    if not _calls(turned, _TURNS) or axes not in ((1, 2), (2, 1), (0, 2, 1, 3, 4)) or not _calls(split, _VIEWS):
        raise refused(node, "rearranges something else than groups of channels")
    before, parts = fuser.values[x].shape, fuser.values[split].shape
    if parts[:1] + parts[3:] != before[:1] + before[2:] or fuser.values[node].shape != before:
        raise refused(node, "rearranges channels and their shape")
    _shuffle(fuser, node, x, int(parts[1]))


def _shuffle(fuser: Fuser, node: fx.Node, source: fx.Node, groups: int) -> None:
    fuser.begin(node, "shuffle", source, window=Window(groups=groups))


def _pad(fuser: Fuser, node: fx.Node) -> None:
    sides, mode, value = (argument(node, *a) for a in ((1, "pad"), (2, "mode", "constant"), (3, "value", 0)))
    _zeros(fuser, node, source_of(node), sides, mode == "constant" and not value)


def _pad_module(fuser: Fuser, node: fx.Node, source: fx.Node, module: nn.ConstantPad2d) -> None:
    _zeros(fuser, node, source, module.padding, not module.value)


def _zeros(fuser: Fuser, node: fx.Node, source: fx.Node, sides: Any, zero: bool) -> None:
    left, right, top, bottom, front, behind = (*sides, 0, 0, 0, 0)[:6]
    if not zero or len(sides) > 6 or min(sides) < 0 or fuser.values[source].ndim != 4:
        raise refused(node, "pads with something else than zeros, or crops")
    window = Window(padding=(top, left, bottom, right))
    fuser.begin(node, "pad", source, window=window, channels=(front, behind))


def _concatenation(fuser: Fuser, node: fx.Node) -> None:
    parts, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    if not isinstance(parts, (tuple, list)) or not all(isinstance(part, fx.Node) for part in parts):
        raise refused(node, "joins something else than tensors of the network")
    if dim not in (1, 1 - fuser.values[node].ndim):
        raise refused(node, "joins tensors along another dimension than channels")
    fuser.concatenate(node, parts)


def _item(fuser: Fuser, node: fx.Node) -> None:
    """``x[:, 4:8]``, ``x[:, :, ::2, ::2]``, or one of the parts of a tensor."""
    source, index = source_of(node), cast(Any, fx.map_arg(node.args[1], lambda number: fuser.values[number]))
    if not isinstance(fuser.values[source], Tensor):
        _part(fuser, node, source, index)
        return
    whole = slice(None)
    index = index if isinstance(index, tuple) else (index,)
    index = (*index, *(whole,) * (4 - len(index)))
    steps = [part.step or 1 for part in index[2:] if isinstance(part, slice) and part.start in (None, 0)]
    ends = [part.stop is None for part in index[2:] if isinstance(part, slice)]
    side_by_side = isinstance(index[1], slice) and index[1].step in (None, 1)
    if index[0] != whole or not side_by_side or len(steps) != 2 or ends != [True, True] or min(steps) < 1:
        raise refused(node, "takes a part of a tensor other than channels side by side or every n-th pixel")
    channels = fuser.shape(source)[0]
    first, last, _ = index[1].indices(channels)
    window = Window(stride=(steps[0], steps[1]))
    fuser.begin(node, "slice", source, window=window, channels=(first, channels - last))


def _part(fuser: Fuser, node: fx.Node, parts: fx.Node, index: Any) -> None:
    """One of the parts that ``chunk`` or ``split`` makes of the channels."""
    found = fuser.values[parts]
    dim = argument(parts, 2, "dim", 0)
    if not _calls(parts, {"chunk", "split", torch.chunk, torch.split}) or dim not in (1, 1 - found[0].ndim):
        raise refused(node, "takes a part of a tensor that is no row of channels")
    index = range(len(found))[index]
    before, behind = (sum(part.shape[1] for part in some) for some in (found[:index], found[index + 1 :]))
    fuser.begin(node, "slice", source_of(parts), channels=(before, behind))


_MODULES: list[tuple[Any, Callable[..., None]]] = [
    (_AdderNd, _adder),
    (nn.Conv2d, _convolution),
    (nn.Linear, _linear),
    (nn.Flatten, _reshape),
    (nn.AdaptiveAvgPool2d, lambda fuser, node, source, module: _adaptive(fuser, node, source)),
    (nn.AvgPool2d, _pool_module(_average_pool, _AVERAGE)),
    (nn.MaxPool2d, _pool_module(_max_pool, _MAX)),
    (nn.ConstantPad2d, _pad_module),
    (nn.ChannelShuffle, lambda fuser, node, source, module: _shuffle(fuser, node, source, module.groups)),
]
_FUNCTIONS: dict[Any, Callable[[Fuser, fx.Node], None]] = {
    torch.mean: _mean,
    **dict.fromkeys((torch.flatten, torch.reshape, torch.squeeze), _reshape),
    F.adaptive_avg_pool2d: lambda fuser, node: _adaptive(fuser, node, source_of(node)),
    **dict.fromkeys((F.avg_pool2d, torch._C._nn.avg_pool2d), _pool_function(_average_pool, _AVERAGE)),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _pool_function(_max_pool, _MAX)),
    **dict.fromkeys((F.pad, torch._C._nn.pad), _pad),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _concatenation),
    operator.getitem: _item,
}
_METHODS: dict[str, Callable[[Fuser, fx.Node], None]] = {
    "mean": _mean,
    **dict.fromkeys(("flatten", "view", "reshape", "squeeze"), _reshape),
}
