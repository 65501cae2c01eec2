"""A network for inference on a device: each 2-d adder, with what follows it, as one call of the fused op.

``adder [-> BatchNorm] [-> + residual] [-> ReLU, ReLU6]`` becomes one :class:`anncvt.fused.FusedAdder2d`, in a copy that
shares the network's tensors. timm's BatchNorm that ends with an activation counts as the two. What cannot be traced
stays as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from anncvt.copies import sharing
from anncvt.fused import FusedAdder2d
from anncvt.modes import eval_mode
from anncvt.nn import AdderConv2d
from anncvt.passes.joining import Limits, Line, Same, Sum, Unjoinable, joining, line
from anncvt.passes.trace import trace
from anncvt.passes.walk import may_change_inputs, reader
from anncvt.progress import SILENT, Progress

#: How far the fused network's outputs may be from the network's, in parts of the largest.
TOLERANCE = 1e-3


def pays(device: torch.device) -> bool:
    """Whether a fused network is faster there: on CPUs the op computes in steps what the network does in steps."""
    return device.type == "cuda"


@torch.no_grad()
def for_inference(network: nn.Module, sample: Tensor, progress: Progress = SILENT) -> nn.Module:
    """``network`` with its adders fused, in eval mode; the network itself where that gains nothing.

    The network is left alone. The result is for the device, types and statistics that the network has now.

    Args:
        network: on the device that it is to run on.
        sample: a few images ``[N, C, H, W]`` there, on which both must agree: Python code may take other ways when it
            is traced. Where they do not, the network itself is what is returned, and ``progress`` is told.
    """
    if not pays(sample.device):
        return network
    result = fused(network)
    if not any(isinstance(module, FusedAdder2d) for module in result.modules()):
        return network
    with eval_mode(network):
        expected = network(sample)
    try:
        difference = _difference(result(sample), expected)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # what code that was traced wrongly raises
        difference = f"fails with {type(error).__name__}"
    if difference is None:
        return result
    progress.note(f"adders run one by one, not fused with what follows them: traced, the network {difference}")
    return network


def fused(network: nn.Module) -> nn.Module:
    """:func:`for_inference` without a look at what the result computes."""
    result = sharing(network).eval()
    for part in reversed(trace(result).parts):  # inner ones first
        graph = part.graph
        if graph is None or len(graph.find_nodes(op="placeholder")) != 1:
            continue
        module = result.get_submodule(part.path)
        view = fx.GraphModule(module, graph)
        if _fuse(view) == 0:
            continue
        if not part.path:
            return view
        # Not in the module's place: those around it may want more of it than to call it.
        vars(module)["forward"] = view.forward
        module.add_module("fused", view)
    return result


@dataclass(frozen=True)
class _Chain:
    """An adder's node and those that join it; ``scale``, ``shift`` ``[O]`` float64."""

    nodes: tuple[fx.Node, ...]
    scale: Tensor
    shift: Tensor
    residual: fx.Node | None = None
    low: float = -math.inf
    high: float = math.inf

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def limited(self) -> bool:
        return self.low > -math.inf or self.high < math.inf

    def joined(self, node: fx.Node, network: nn.Module) -> _Chain | None:
        """With ``node``, which alone reads its end; None where that cannot be."""
        try:
            found = joining(node, network)
        except Unjoinable:
            return None
        nodes, open_ = (*self.nodes, node), self.residual is None and not self.limited
        match found:
            case Same():
                return replace(self, nodes=nodes)
            case Line(_, scale, shift) if open_ and len(scale) == len(self.scale):
                return replace(self, nodes=nodes, scale=self.scale * scale, shift=self.shift * scale + shift)
            case Sum(first, second, in_place) if open_ and first is not second:
                if in_place and first is not self.end:
                    return None  # others may see what is overwritten
                return replace(self, nodes=nodes, residual=second if first is self.end else first)
            case Limits(_, low, high) if not self.limited:
                return replace(self, nodes=nodes, low=low, high=high)
        return None


def _fuse(view: fx.GraphModule) -> int:
    """Fuse the adders of a graph in place; how many."""
    _divide_norms(view)
    taken: set[fx.Node] = set()
    chains = []
    for node in view.graph.nodes:
        chain = _begun(node, view)
        while chain is not None and (after := reader(chain.end)) is not None and after not in taken:
            longer = chain.joined(after, view)
            if longer is None or not _movable(longer, view):
                break
            chain = longer
        if chain is not None:
            taken.update(chain.nodes)
            chains.append(chain)
    for number, chain in enumerate(chains):
        _replace(view, chain, f"fused_{number}")
    view.delete_all_unused_submodules()
    view.graph.lint()
    view.recompile()
    return len(chains)


def _divide_norms(view: fx.GraphModule) -> None:
    """timm's ``BatchNormAct2d``, a BatchNorm that calls two modules of its own in the end, as three modules."""
    for node in list(view.graph.find_nodes(op="call_module")):
        norm = view.get_submodule(str(node.target))
        ends = [name for name, _ in norm.named_children()]
        if not isinstance(norm, nn.BatchNorm2d) or ends != ["drop", "act"] or node.kwargs or not _ends_so(norm):
            continue
        view.add_submodule(f"{node.name}_plain", _plain(norm))
        last, names = node, [f"{node.name}_plain", *(f"{node.target}.{name}" for name in ends)]
        for name in names:
            with view.graph.inserting_after(last):
                last = view.graph.call_module(name, node.args if last is node else (last,))
        node.replace_all_uses_with(last)
        view.graph.erase_node(node)


def _ends_so(norm: nn.BatchNorm2d) -> bool:
    """Whether it computes ``act(drop(norm(x)))``, on a probe: other classes may have modules of the same names."""
    owner = next(norm.parameters(), norm.running_mean)
    if owner is None:
        return False
    x = torch.linspace(-9, 9, 4 * norm.num_features, device=owner.device, dtype=owner.dtype)
    x = x.view(2, norm.num_features, 1, 2)
    drop, act = norm.get_submodule("drop"), norm.get_submodule("act")
    return torch.equal(norm(x.clone()), act(drop(_plain(norm)(x))))


def _plain(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """Its BatchNorm alone, in eval mode, on the same tensors."""
    plain = nn.BatchNorm2d(norm.num_features, norm.eps, None, norm.affine, norm.track_running_stats, device="meta")
    plain.weight, plain.bias = norm.weight, norm.bias
    for name, buffer in norm.named_buffers(recurse=False):
        setattr(plain, name, buffer)
    return plain.eval()


def _begun(node: fx.Node, view: fx.GraphModule) -> _Chain | None:
    """The chain of an adder alone, if ``node`` calls one that the fused op can stand for."""
    adder = view.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(adder, AdderConv2d) or adder.fake is not None or len(node.all_input_nodes) != 1:
        return None
    if adder.copies > 1:
        return None
    weight = adder.weight
    scale = torch.ones(len(weight), dtype=torch.float64, device=weight.device)
    shift = torch.zeros_like(scale) if adder.bias is None else adder.bias.detach().double()
    if adder.norm is not None:
        factor, constant = line(cast(_BatchNorm, adder.norm))
        scale, shift = scale * factor, shift * factor + constant
    return _Chain((node,), scale, shift)


def _movable(chain: _Chain, view: fx.GraphModule) -> bool:
    """Whether what the chain reads is the same where it ends: nothing in between works on it in place."""
    inputs = {chain.nodes[0].all_input_nodes[0], *([] if chain.residual is None else [chain.residual])}
    node = chain.nodes[0].next
    while node is not chain.end:
        module = view.get_submodule(str(node.target)) if node.op == "call_module" else None
        if node not in chain.nodes and inputs & set(node.all_input_nodes) and may_change_inputs(node, module):
            return False
        node = node.next
    return True


def _replace(view: fx.GraphModule, chain: _Chain, name: str) -> None:
    adder = cast(AdderConv2d, view.get_submodule(str(chain.nodes[0].target)))
    view.add_submodule(name, FusedAdder2d(adder, chain.scale, chain.shift, chain.low, chain.high))
    inputs = (chain.nodes[0].all_input_nodes[0], *([] if chain.residual is None else [chain.residual]))
    with view.graph.inserting_after(chain.end):
        node = view.graph.call_module(name, inputs)
    chain.end.replace_all_uses_with(node)
    for spent in reversed(chain.nodes):
        view.graph.erase_node(spent)


def _difference(actual: object, expected: object) -> str | None:
    """How what the fused network computes differs, or None."""
    pairs = [tree_leaves(actual), tree_leaves(expected)]
    if len(pairs[0]) != len(pairs[1]):
        return "has other outputs"
    for a, b in zip(*pairs, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
            return "has other outputs"
        limit = TOLERANCE * float(b.abs().max()) if b.numel() else 0.0
        if not torch.allclose(a.double(), b.double(), rtol=0, atol=limit, equal_nan=True):
            return f"differs by {float((a - b).abs().max()):.2g}"
    return None
