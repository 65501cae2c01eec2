"""The default decision for each layer, and the reason given for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from anncvt.convolution import NoForm, form_of
from anncvt.passes.choice import POLICIES
from anncvt.passes.observe import Call, Observation


@dataclass(frozen=True)
class Verdict:
    """Whether a layer becomes an adder by default."""

    swap: bool
    reason: str
    fixed: bool = False  # cannot be overruled


class Policy:
    """Judges the layers of one network.

    Args:
        modules: of the network, by qualified name.
        name: one of :data:`anncvt.passes.choice.POLICIES`.
    """

    def __init__(self, modules: Mapping[str, nn.Module], observation: Observation, name: str) -> None:
        self.modules, self.observation, self.kept = modules, observation, POLICIES[name]
        self.order = {module: at for at, module in enumerate(observation.order)}
        calls = list(observation.calls.values())
        self.first = calls[0].name if calls else None
        self.last = calls[-1] if calls else None

    def judge(self, call: Call, partner: str | None) -> Verdict:
        """The verdict on a layer whose output the BatchNorm ``partner`` reads."""
        impossible = self._impossible(call)
        if impossible is not None:
            return Verdict(False, impossible, fixed=True)
        role = self._role(call, partner)
        if role is not None and role.partition(":")[0] in self.kept:
            return Verdict(False, role)
        return Verdict(True, "linear" if call.kind == "Linear" else self._form(call))

    def _role(self, call: Call, partner: str | None) -> str | None:
        """What makes a layer special."""
        linear = call.kind == "Linear"
        if call.reads_image or call.name == self.first:
            return "stem: it reads the image"
        if (self._is_linear_classifier if linear else self._is_classifier)(call):
            return "classifier: it makes the network's output"
        if linear:
            gate = len(call.in_shape) == 2 and self.last is not None and self._before(call, self.last)
            return "gate: its input is a single pixel" if gate else None
        # Deep layers on small images see one pixel too; those are normalised, gates are not.
        if all(side == 1 for side in (*call.in_shape[2:], *call.kernel)) and partner is None:
            return "gate: its input is a single pixel"
        return "depthwise" if call.groups == call.in_shape[1] > 1 else None

    def _is_classifier(self, call: Call) -> bool:
        """The last convolution, if its channels are the network's outputs and no Linear layer comes after it."""
        output = self.observation.output_shape
        return call is self.last and len(output) > 1 and call.out_shape[1] == output[1] and not call.linear_after

    def _is_linear_classifier(self, call: Call) -> bool:
        after_all = self.last is None or not self._before(call, self.last)
        return after_all and call.out_shape in self.observation.output_shapes

    def _before(self, call: Call, other: Call) -> bool:
        # A function has no place of its own in the order of modules; its owner's comes before it.
        return self.order.get(call.name, -1) < self.order.get(other.name, len(self.order))

    def _impossible(self, call: Call) -> str | None:
        if "DeformConv" in call.kind:
            return "deformable: no adder counterpart"
        if not call.is_module:
            return f"functional {call.kind}: no module to replace"
        module = self.modules[call.name]
        if call.kind == "Linear":
            return _impossible_linear(module, call)
        try:
            form_of(module)
        except NoForm as reason:
            return str(reason)
        return None

    def _form(self, call: Call) -> str:
        if call.groups == call.in_shape[1] > 1:
            form = "depthwise"
        elif call.groups > 1:
            form = "grouped"
        else:
            form = "pointwise" if all(k == 1 for k in call.kernel) else "dense"
        return form + (f"; {call.kind}'s weights folded" if form_of(self.modules[call.name]).folded else "")


def _impossible_linear(module: nn.Module, call: Call) -> str | None:
    if type(module) is not nn.Linear or "weight" not in module._parameters:
        return f"{type(module).__name__}: its own forward may differ from a plain Linear layer"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has hooks that a replacement would lose"
    return "its input is a single vector" if len(call.in_shape) < 2 else None
