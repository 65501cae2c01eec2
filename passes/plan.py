"""Decide what happens to every convolution, and why."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from anncvt.errors import AnncvtError
from anncvt.passes.observe import Call, Observation, observe
from anncvt.passes.trace import Trace, trace
from anncvt.program import LayerPlan, Plan, Program
from anncvt.progress import SILENT, Progress

#: Below this share of multiply-accumulates in swapped layers a network gains little.
LITTLE = 0.3


def plan(
    program: Program, *, keep: Sequence[str] = (), swap: Sequence[str] = (), progress: Progress = SILENT
) -> Program:
    """Decide for every convolution whether it becomes an adder.

    By default dense k x k, pointwise and grouped convolutions are swapped. Kept are the stem (it reads the image), the
    classifier, gates that see a single pixel (squeeze-and-excitation), depthwise convolutions (an adder of one channel
    has little to add up), and what has no exact counterpart.

    Args:
        keep: GLOBs over qualified names to keep, against the defaults.
        swap: GLOBs to swap, against the defaults; what has no counterpart cannot be. ``keep`` wins over ``swap``.
        progress: told where little can be gained.

    Returns:
        The program with its plan. A student of a different plan is dropped.

    Raises:
        AnncvtError: a GLOB matches nothing or asks for the impossible, the network does not run, or nothing is left
            to swap.
    """
    begin = time.monotonic()
    observation = observe(program.teacher, program.preprocess.input_size)
    traced = trace(program.teacher)
    decided = decide(program.teacher, observation, traced, keep=keep, swap=swap)
    if not decided.swapped:
        raise _nothing(program.source.model, decided)
    totals = decided.totals()
    if totals["swapped_share"] < LITTLE:
        other = decided.other_macs / totals["macs"]
        progress.note(
            f"only {totals['swapped_share']:.0%} of the multiply-accumulates are in layers to swap"
            + (f" ({other:.0%} are in Linear layers)" if other > 0.1 else "")
            + ": this network gains little as an adder network"
        )
    same = program.plan is not None and program.plan.layers == decided.layers
    planned = dataclasses.replace(
        program, plan=decided, student=program.student if same else None, history=[*program.history]
    )
    planned.record("planned", time.monotonic() - begin, {**totals, "keep": list(keep), "swap": list(swap)})
    return planned


def _nothing(model: str, decided: Plan) -> AnncvtError:
    if not decided.layers:
        return AnncvtError(
            "nothing to convert: it has no convolutions",
            where=model,
            fix="adder layers replace convolutions: use a CNN",
        )
    reasons = sorted({layer.reason for layer in decided.layers})
    share = decided.other_macs / max(1, decided.totals()["macs"])
    return AnncvtError(
        f"nothing to convert: its convolutions ({len(decided.layers)}) are kept ({'; '.join(reasons[:3])})"
        + (f", and {share:.0%} of the multiply-accumulates are in Linear layers" if share > 0.1 else ""),
        where=model,
        fix="name layers to convert all the same with --swap GLOB, or use a CNN",
    )


def decide(
    network: nn.Module, observation: Observation, traced: Trace, *, keep: Sequence[str] = (), swap: Sequence[str] = ()
) -> Plan:
    """The plan alone. Same errors as :func:`plan`, apart from an empty result."""
    choice = _Choice(keep, swap, [*observation.calls, *_never_called(network, observation)])
    modules = dict(network.named_modules(remove_duplicate=False))
    policy = _Policy(network, observation)
    layers = []
    for call in observation.calls.values():
        partner = _partner(call, traced, modules)
        layers.append(_layer(call, *choice.apply(call.name, policy.default(call, partner)), partner))
    for name, module in _never_called(network, observation).items():
        action, reason = choice.apply(name, _Verdict(False, "does not run at inference", fixed=True))
        layers.append(_unused(name, module, action, reason))
    return Plan(tuple(layers), observation.linear_macs)


@dataclass(frozen=True)
class _Verdict:
    swap: bool
    reason: str
    fixed: bool = False  # cannot be overruled


class _Policy:
    """The default decision for each convolution."""

    def __init__(self, network: nn.Module, observation: Observation) -> None:
        self.network, self.observation = network, observation
        calls = list(observation.calls.values())
        self.first = calls[0].name if calls else None
        last = calls[-1] if calls else None
        self.classifier = last.name if last is not None and _is_classifier(last, observation) else None

    def default(self, call: Call, partner: str | None) -> _Verdict:
        impossible = _impossible(call)
        if impossible is not None:
            return _Verdict(False, impossible, fixed=True)
        if call.reads_image or call.name == self.first:
            return _Verdict(False, "stem: it reads the image")
        if call.name == self.classifier:
            return _Verdict(False, "classifier: it makes the network's output")
        # Deep layers on small images see one pixel too; those are normalised, gates are not.
        if all(side == 1 for side in (*call.in_shape[2:], *call.kernel)) and partner is None:
            return _Verdict(False, "gate: its input is a single pixel")
        if call.groups == call.in_shape[1] > 1:
            return _Verdict(False, "depthwise")
        return _Verdict(True, _form(call))


def _is_classifier(last: Call, observation: Observation) -> bool:
    """The last convolution, if its channels are the network's outputs and no Linear layer comes after it."""
    output = observation.output_shape
    return len(output) > 1 and last.out_shape[1] == output[1] and not last.linear_after


def _impossible(call: Call) -> str | None:
    conv = call.module
    if conv is None:
        return f"functional {call.kind}: no module to replace"
    if isinstance(conv, _ConvTransposeNd):
        return "transposed: no adder counterpart"
    if type(conv) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return f"{type(conv).__name__}: its own forward differs from a plain convolution"
    if "weight" not in conv._parameters:
        return "its weight is computed from other parameters (weight norm)"
    if conv._forward_hooks or conv._forward_pre_hooks:
        return "has hooks that a replacement would lose"
    return None


def _form(call: Call) -> str:
    if call.groups > 1:
        return "grouped"
    return "pointwise" if all(k == 1 for k in call.kernel) else "dense"


def _partner(call: Call, traced: Trace, modules: dict[str, nn.Module]) -> str | None:
    """The BatchNorm that is the only reader of a convolution's output, if it can be refitted."""
    readers = set(traced.readers.get(call.name) or call.readers)
    if len(readers) != 1:
        return None
    name = readers.pop()
    norm = modules.get(name)
    if not isinstance(norm, _BatchNorm) or not norm.affine or not norm.track_running_stats:
        return None
    return name if norm.num_features == call.out_shape[1] else None


def _layer(call: Call, action: str, reason: str, partner: str | None) -> LayerPlan:
    swapped = action == "swap"
    if swapped and partner is None:
        reason += "; no BatchNorm follows, one is inserted"
    return LayerPlan(
        name=call.name,
        kind=call.kind,
        action=action,
        reason=reason,
        in_shape=call.in_shape,
        out_shape=call.out_shape,
        kernel=call.kernel,
        stride=call.stride,
        groups=call.groups,
        macs=call.macs,
        adds=2 * call.macs if swapped else call.macs,
        muls=0 if swapped else call.macs,
        bn=partner,
        insert_bn=swapped and partner is None,
    )


def _never_called(network: nn.Module, observation: Observation) -> dict[str, _ConvNd]:
    return {n: m for n, m in network.named_modules() if isinstance(m, _ConvNd) and n not in observation.calls}


def _unused(name: str, conv: _ConvNd, action: str, reason: str) -> LayerPlan:
    return LayerPlan(
        name=name,
        kind=type(conv).__name__,
        action=action,
        reason=reason,
        in_shape=(),
        out_shape=(),
        kernel=tuple(conv.kernel_size),
        stride=tuple(conv.stride),
        groups=conv.groups,
        macs=0,
        adds=0,
        muls=0,
    )


class _Choice:
    """The user's GLOBs."""

    def __init__(self, keep: Sequence[str], swap: Sequence[str], names: Sequence[str]) -> None:
        self.keep, self.swap = tuple(keep), tuple(swap)
        for flag, patterns in (("--keep", keep), ("--swap", swap)):
            for pattern in patterns:
                if not fnmatch.filter(names, pattern):
                    close = difflib.get_close_matches(pattern, names, 5, 0.3) or list(names)[:5]
                    raise AnncvtError(
                        f"{flag} {pattern!r} matches no convolution", fix=f"names are: {', '.join(close)}"
                    )

    def apply(self, name: str, default: _Verdict) -> tuple[str, str]:
        kept = _matching(name, self.keep)
        wanted = _matching(name, self.swap)
        if kept is not None:
            return "keep", f"--keep {kept}"
        if wanted is not None and not default.swap:
            if not default.fixed:
                return "swap", f"--swap {wanted}"
            if wanted == name:
                raise AnncvtError(f"{name} cannot be swapped: {default.reason}", fix=f"leave out --swap {wanted}")
        return ("swap" if default.swap else "keep"), default.reason


def _matching(name: str, patterns: Sequence[str]) -> str | None:
    return next((pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)), None)
