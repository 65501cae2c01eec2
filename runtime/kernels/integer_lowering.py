"""A whole integer network as one Relax module: bytes in blocked layout from the pixels to the logits.

Every step with an accumulator is one integer kernel with its epilogue. Sums over windows and rescaling are depthwise
convolutions whose weights are 1. Where filter groups read copies of an input of their own, each group is a kernel, and
their channels are put in order behind them. What a step repeats for adders is not copied: they read it so often.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import ir, relax

from anncvt.errors import AnncvtError
from anncvt.runtime.geometry import Padding, expand_padding
from anncvt.runtime.integer import Step
from anncvt.runtime.integer_network import INPUT, IntegerNetwork, sources
from anncvt.runtime.kernels import integer_data
from anncvt.runtime.kernels.deployment import Deployment
from anncvt.runtime.kernels.emitter import Emitter
from anncvt.runtime.kernels.fusion import Value, View
from anncvt.runtime.kernels.integer_layer import IntegerLayer
from anncvt.runtime.kernels.integer_pack import Requantisation, check, narrow, totals_of
from anncvt.runtime.kernels.integer_plan import Plan
from anncvt.runtime.kernels.layer import LANES
from anncvt.runtime.kernels.layout import blocked_shape
from anncvt.runtime.kernels.pooling import Pool


def lower(network: IntegerNetwork, batches: dict[str, int], target: Deployment) -> ir.IRModule:
    """Lower ``network`` to one module that shares kernels and constants.

    Args:
        network: whose last step has a range beyond bytes, and no other.
        batches: function name -> batch size.
        target: what the module will be compiled for.

    Returns:
        The module, with functions ``name(pixels[N, C, H, W] uint8) -> logits[N, classes] int32``.

    Raises:
        AnncvtError: a step does not fit the kernels' arithmetic, by its name.
    """
    builder = relax.BlockBuilder()
    emitter = Emitter(builder, target)
    for name, batch in batches.items():
        shape = (batch, *network.input_shape)
        pixels = relax.Var("pixels", relax.TensorType(shape, "uint8"))
        with builder.function(name, [pixels]):
            with builder.dataflow():
                output = builder.emit_output(_Function(emitter, network, pixels, shape).logits())
            builder.emit_func_output(output)
    return builder.get()


@dataclass(frozen=True)
class _Part:
    """The filters of a step that read one input: what an integer kernel takes."""

    mode: str
    source: str
    weight: np.ndarray  # [O, C/groups, kh, kw]
    zero: int
    groups: int
    filters: np.ndarray  # which of the step's, ascending


class _Function:
    """The steps of a network on their way into one function."""

    def __init__(self, emitter: Emitter, network: IntegerNetwork, pixels: relax.Var, shape: tuple[int, ...]) -> None:
        self.emitter, self.network, self.batch = emitter, network, shape[0]
        arguments = [pixels, emitter.constant(network.table)]
        features = emitter.target.features
        entered = emitter.call(("enter", shape), lambda: integer_data.enter(shape, features), arguments, shape, "uint8")
        self._values = {INPUT: Value(entered, shape, False, "uint8")}
        #: Steps that repeat a tensor for adders alone, which read it so often: they have no value.
        self._repeated = {step.name: step.inputs for step in network.steps if _repeats(step, network)}

    def logits(self) -> relax.Expr:
        """Emit all steps; the result of the last one, ``[N, classes]`` int32."""
        *steps, last = self.network.steps
        for step in steps:
            if step.name in self._repeated:
                continue
            self._values[step.name] = self._rearranged(step) if step.epilogue is None else self._requantised(step)
        return self._finished(last)

    def _blocked(self, name: str) -> Value:
        self._values[name] = self.emitter.blocked(self._values[name])
        return self._values[name]

    def _rearranged(self, step: Step) -> Value:
        if step.op == "concatenate":
            return self.emitter.concatenate([self._blocked(name) for name in step.inputs])
        x, shape = self._blocked(step.inputs[0]), (self.batch, *step.shape)
        if step.op == "shuffle":
            return self._selected(x, np.arange(x.shape[1]).reshape(step.window.groups, -1).T.reshape(-1))
        if step.op == "max_pool":
            size, out, window = (x.shape[2], x.shape[3]), (step.shape[1], step.shape[2]), step.window
            padding = expand_padding(window.padding)
            spec = Pool("max", self.batch, x.shape[1], size, out, step.kernel, window.stride, padding, window.dilation)
            return self.emitter.pool(spec, x, shape)
        if step.op == "flatten":
            return self._flat(x, shape)
        return self.emitter.view(_view(step, x))

    def _flat(self, x: Value, shape: tuple[int, ...]) -> Value:
        if x.shape == shape:
            return x
        out = blocked_shape(shape)
        flat = self.emitter.call(("flatten", x.shape), lambda: integer_data.flatten(x.shape), [x.expr], out, "uint8")
        return Value(flat, shape, True, "uint8")

    def _requantised(self, step: Step) -> Value:
        """A step whose result are bytes: its epilogue is in the kernels."""
        residual = None if step.residual is None else self._blocked(step.residual)
        return self._joined([(part, self._layer(step, part, residual)) for part in _parts(step)])

    def _finished(self, step: Step) -> relax.Expr:
        """The last step, whose results are wide: its kernels end with the sums."""
        epilogue = step.epilogue
        assert epilogue is not None
        sums = self._joined([(part, self._layer(step, part, None, ends=False)) for part in _parts(step)])
        parameters = [epilogue.shift, epilogue.low, epilogue.high, epilogue.residual_multiplier]
        rounded = _bias(step) + (1 << (epilogue.shift - 1))
        arrays = (epilogue.multiplier.astype(np.int64), rounded, np.array(parameters, np.int64))
        residual = [] if step.residual is None else [self._blocked(step.residual).expr]
        arguments, shape = [sums.expr, *map(self.emitter.constant, arrays), *residual], (self.batch, step.shape[0])
        return self.emitter.call(
            ("logits", shape, len(residual)),
            lambda: integer_data.logits(*shape, bool(residual)),
            arguments,
            shape,
            "int32",
        )

    def _layer(self, step: Step, part: _Part, residual: Value | None, *, ends: bool = True) -> Value:
        """The kernel of a part; ``ends``: with the step's epilogue, else its sums."""
        names = self._repeated.get(part.source, (part.source,))
        x, shape = self._source(names[0], part.groups), (self.batch, len(part.filters), *step.shape[1:])
        end = _requantisation(step, part) if ends else None
        check(part.weight, part.zero)
        layer = IntegerLayer(
            part.mode,
            x.shape[1],
            (x.shape[2], x.shape[3]),
            shape[1],
            (part.weight.shape[2], part.weight.shape[3]),
            step.window.stride,
            Padding(*step.window.padding),
            step.window.dilation,
            part.groups,
            copies=len(names),
            doubling=_doubles(part.weight, len(names)),
            result="uint8" if ends else "int32",
            residual=residual is not None,
            clamped=end is not None and end.narrow,
            totals="long" if end is None else totals_of(part.mode, part.weight, end),
            narrow=end is not None and narrow(part.mode, part.weight, end),
            blocked=x.blocked,
        )
        plan = Plan.of(layer, self.emitter.target)
        arguments = [x.expr, *map(self.emitter.constant, plan.pack(part.weight, part.zero, end))]
        if residual is not None:
            arguments.append(self._selected(residual, part.filters).expr)
        result = self.emitter.call(layer, plan.build, arguments, blocked_shape(shape), layer.result)
        return Value(result, shape, True, layer.result)

    def _source(self, name: str, groups: int) -> Value:
        """What a layer reads: as it comes where that are the plain pixels of a dense layer, else blocked."""
        value = self._values[name]
        plain = not value.blocked and value.shape[1] < LANES and groups == 1
        return value if plain else self._blocked(name)

    def _joined(self, parts: list[tuple[_Part, Value]]) -> Value:
        """The filters of all parts in the order of the step."""
        if len(parts) == 1:
            return parts[0][1]
        order = np.concatenate([part.filters for part, _ in parts]).argsort()
        return self._selected(self.emitter.concatenate([value for _, value in parts]), order)

    def _selected(self, x: Value, channels: np.ndarray) -> Value:
        if np.array_equal(channels, np.arange(x.shape[1])):
            return x
        count = len(channels)
        shape, arguments = (x.shape[0], count, *x.shape[2:]), [x.expr, self.emitter.constant(channels.astype(np.int32))]
        selected = self.emitter.call(
            ("select", x.shape, count, x.dtype),
            lambda: integer_data.select(x.shape, count, x.dtype),
            arguments,
            blocked_shape(shape),
            x.dtype,
        )
        return Value(selected, shape, True, x.dtype)


def _repeats(step: Step, network: IntegerNetwork) -> bool:
    """Whether a step puts a tensor behind itself, for dense adders to read."""
    readers = [other for other in network.steps if step.name in sources(other)]
    dense = all(other.op == "adder" and other.window.groups == 1 and other.residual != step.name for other in readers)
    return step.op == "concatenate" and len(set(step.inputs)) == 1 and dense


def _doubles(weight: np.ndarray, copies: int) -> bool:
    """Whether the weights of copies 1 and 2 are the same, those of 3 to 6, ...: adders of 2, 4, ... times the input."""
    if copies == 1 or (copies + 1) & copies:
        return False
    each = np.split(weight, copies, 1)
    return all(np.array_equal(each[at], each[at - 1]) for at in range(1, copies) if (at + 1) & at)


def _parts(step: Step) -> list[_Part]:
    everything = np.arange(step.shape[0])
    if step.op == "adder":
        assert step.weight is not None and step.filter_group is not None
        chosen = [np.flatnonzero(step.filter_group == at) for at in range(len(step.inputs))]
        return [
            _Part("adder", source, step.weight[filters], zero, step.window.groups, filters)
            for source, zero, filters in zip(step.inputs, step.pad_values, chosen, strict=True)
            if len(filters)
        ]
    if step.op == "convolution":
        assert step.weight is not None
        return [_Part("conv", step.inputs[0], step.weight, step.pad_values[0], step.window.groups, everything)]
    ones = np.ones((len(everything), 1, *step.kernel), np.int8)
    zero = step.pad_values[0] if step.op == "sum_pool" else 0
    return [_Part("conv", step.inputs[0], ones, zero, len(everything), everything)]


def _bias(step: Step) -> np.ndarray:
    """The bias of the epilogue, int64, for kernels that sum up ``x - zero`` where the step sums up ``x``."""
    assert step.epilogue is not None
    bias = step.epilogue.bias.astype(np.int64)
    if step.op != "sum_pool":
        return bias
    return bias + step.epilogue.multiplier.astype(np.int64) * (step.pad_values[0] * step.kernel[0] * step.kernel[1])


def _requantisation(step: Step, part: _Part) -> Requantisation:
    end = step.epilogue
    assert end is not None
    try:
        return Requantisation(
            end.multiplier[part.filters],
            _bias(step)[part.filters],
            end.shift,
            end.low,
            end.high,
            end.residual_multiplier,
        )
    except AnncvtError as error:
        raise AnncvtError(error.what, where=step.name, fix="quantize the network again") from error


def _view(step: Step, x: Value) -> View:
    """Every n-th pixel of some channels, or padding with a value."""
    view, window = View.of(x), step.window
    if step.op == "slice":
        first = step.channels[0]
        view = view.replaced(0, view.axes[0].slice(first, first + step.shape[0], 1))
        for axis, stride in ((1, window.stride[0]), (2, window.stride[1])):
            view = view.replaced(axis, view.axes[axis].slice(0, x.shape[axis + 1], stride))
        return view
    top, left, bottom, right = window.padding
    view = View(view.x, view.axes, step.pad_values[0])
    for axis, sides in enumerate((step.channels, (top, bottom), (left, right))):
        view = view.replaced(axis, view.axes[axis].pad(*sides))
    return view
