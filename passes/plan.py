"""Decide what happens to every convolution, and why."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from anncvt.errors import AnncvtError
from anncvt.passes.choice import Choice
from anncvt.passes.memory import training_memory
from anncvt.passes.observe import Call, Observation, observe_outline
from anncvt.passes.policy import Policy, Verdict
from anncvt.passes.trace import Trace, trace
from anncvt.program import LayerPlan, Plan, Program
from anncvt.progress import SILENT, Progress

#: Below this share of multiply-accumulates in swapped layers a network gains little.
LITTLE = 0.3


def plan(program: Program, choice: Choice | None = None, *, progress: Progress = SILENT) -> Program:
    """Decide for every convolution (and, if ``choice`` says so, Linear layer) whether it becomes an adder.

    By default dense k x k, pointwise and grouped convolutions are swapped. Kept are the stem (it reads the image), the
    classifier, gates that see a single pixel (squeeze-and-excitation), depthwise convolutions (an adder of one channel
    has little to add up), and what has no exact counterpart.

    Args:
        choice: the user's wishes; what has no counterpart cannot be swapped.
        progress: told where little can be gained, and of layers that a plan file leaves out.

    Returns:
        The program with its plan. A student of a different plan is dropped.

    Raises:
        AnncvtError: a GLOB matches nothing or asks for the impossible, a plan file is of another network, the network
            does not run, or nothing is left to swap.
    """
    begin = time.monotonic()
    choice = choice or Choice()
    size = program.preprocess.input_size
    observation = observe_outline(program.teacher, size)
    graphs = trace(program.teacher), trace(program.teacher, training=True)
    decided = decide(program.teacher, observation, *graphs, choice)
    if not decided.swapped:
        raise _nothing(program.source.model, decided)
    silent = [layer.name for layer in decided.layers if choice.file and layer.name not in choice.file]
    if silent:
        some = ", ".join(silent[:3]) + (", ..." if len(silent) > 3 else "")
        progress.note(f"the plan file says nothing of {len(silent)} layers ({some}): decided as without it")
    decided = dataclasses.replace(decided, memory=training_memory(program.teacher, size, decided))
    totals = decided.totals()
    if totals["swapped_share"] < LITTLE:
        other = decided.other_macs / totals["macs"]
        progress.note(
            f"only {totals['swapped_share']:.0%} of the multiply-accumulates are in layers to swap"
            + (f" ({other:.0%} are in Linear layers{'' if choice.linear else ', see --linear'})" if other > 0.1 else "")
            + ": this network gains little as an adder network"
        )
    same = program.plan is not None and program.plan.layers == decided.layers
    planned = dataclasses.replace(
        program, plan=decided, student=program.student if same else None, history=[*program.history]
    )
    planned.record("planned", time.monotonic() - begin, {**totals, **choice.to_json()})
    return planned


def _nothing(model: str, decided: Plan) -> AnncvtError:
    if not decided.layers:
        return AnncvtError(
            "nothing to convert: it has no convolutions",
            where=model,
            fix="adder layers replace convolutions: use a CNN (or --linear, for Linear layers)",
        )
    reasons = sorted({layer.reason for layer in decided.layers})
    share = decided.other_macs / max(1, decided.totals()["macs"])
    fix = "use a CNN, or name layers to convert all the same with --swap GLOB, --policy or --linear"
    if any(reason.startswith(("--keep", "plan file")) for reason in reasons):
        fix = "keep fewer layers with --keep and --plan"
    return AnncvtError(
        f"nothing to convert: its convolutions ({len(decided.layers)}) are kept ({'; '.join(reasons[:3])})"
        + (f", and {share:.0%} of the multiply-accumulates are in Linear layers" if share > 0.1 else ""),
        where=model,
        fix=fix,
    )


def decide(network: nn.Module, observation: Observation, traced: Trace, training: Trace, choice: Choice) -> Plan:
    """The plan alone. Same errors as :func:`plan`, apart from an empty result.

    Args:
        traced, training: graphs of the network in eval and in training mode.
    """
    modules = dict(network.named_modules(remove_duplicate=False))
    idle = {n: m for n, m in network.named_modules() if isinstance(m, _ConvNd) and n not in observation.calls}
    calls = observation.calls | (observation.linears if choice.linear else {})
    choice.check([*calls, *idle], observation.linears)
    place = {name: at for at, name in enumerate(observation.order)}
    if choice.linear:  # convolutions that are functions stay behind the one that ran before them
        calls = dict(sorted(calls.items(), key=lambda item: place.get(item[0], place.get(_owner(item[0]), 0))))
    policy = Policy(modules, observation, choice.policy)
    layers = []
    for call in calls.values():
        _check_geometry(call, choice.file.get(call.name, {}))
        partner = _partner(call, traced, training, modules)
        settled = _settled(call.name, policy.judge(call, partner), choice)
        layers.append(_layer(call, *settled, partner, choice.copies_of(call.name)))
    for name, conv in idle.items():
        reason = "runs in training only" if name in training.readers else "does not run at inference"
        layers.append(_unused(name, conv, *_settled(name, Verdict(False, reason, fixed=True), choice)))
    planned = sum(call.macs for call in observation.linears.values()) if choice.linear else 0
    return Plan(tuple(layers), observation.linear_macs - planned)


def _owner(function: str) -> str:
    return function.rpartition(".")[0]


def _settled(name: str, default: Verdict, choice: Choice) -> tuple[str, str]:
    """Action and reason, the user's wish against the default."""
    own = "swap" if default.swap else "keep"
    wish = choice.overruled(name)
    if wish is None or (wish[0] == own and own == "swap"):
        return own, default.reason
    action, reason, by_name = wish
    if action == "swap" and default.fixed:
        if by_name:
            raise AnncvtError(
                f"{name} cannot be swapped: {default.reason}",
                fix=f"leave out {reason}" if reason.startswith("--") else 'write "action": "keep" for it',
            )
        return own, default.reason
    return action, default.reason if action == own and reason == "plan file" else reason


def _check_geometry(call: Call, row: Mapping[str, object]) -> None:
    """An entry of a plan file is for this layer."""
    for name, value in (("kernel", call.kernel), ("stride", call.stride), ("groups", call.groups)):
        written = row.get(name, value)
        if (tuple(written) if isinstance(written, list) else written) != value:
            raise AnncvtError(
                f"the plan file is for another network: {call.name} has {name} {_shown(written)} there, "
                f"{_shown(value)} here",
                fix="write a plan of this network with `anncvt plan MODEL --json > plan.json`",
            )


def _shown(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _partner(call: Call, traced: Trace, training: Trace, modules: Mapping[str, nn.Module]) -> str | None:
    """The BatchNorm that is the only reader of a layer's output, in either mode, if it can be refitted."""
    readers = {*(traced.readers.get(call.name) or call.readers), *training.readers.get(call.name, ())}
    if len(readers) != 1:
        return None
    name = readers.pop()
    norm = modules.get(name)
    if not isinstance(norm, _BatchNorm) or not norm.affine or not norm.track_running_stats:
        return None
    if call.kind == "Linear" and len(call.out_shape) != 2:
        return None  # it would normalise over another dimension
    return name if norm.num_features == call.out_shape[1] else None


def _layer(call: Call, action: str, reason: str, partner: str | None, copies: tuple[int, bool]) -> LayerPlan:
    swapped = action == "swap"
    if swapped and call.groups > 1 and copies[0] > 1 and copies[1]:
        raise AnncvtError(
            f"{call.name} cannot have {copies[0]} weights per input: it has {call.groups} groups",
            fix='leave out --copies for it, or write "copies": 1 in the plan file',
        )
    number = copies[0] if swapped and call.groups == 1 else 1
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
        adds=(2 * number if swapped else 1) * call.macs,
        muls=0 if swapped else call.macs,
        bn=partner,
        insert_bn=swapped and partner is None,
        copies=number,
    )


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
