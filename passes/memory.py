"""How much memory a training step of the adder network takes, from what autograd keeps of one on the "meta" device."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from anncvt.copies import outline
from anncvt.program import LayerPlan, Plan, TrainingMemory

#: Images of the examined step: BatchNorm wants more than one value per channel.
_BATCH = 2


def training_memory(network: nn.Module, input_size: tuple[int, ...], plan: Plan) -> TrainingMemory:
    """Bytes of a distillation step: SGD with momentum on the student, a frozen teacher, float32.

    Fixed: the student's parameters, gradients and momenta and the teacher's parameters. Per image: what backward needs
    (the op keeps its input, as a convolution does), the input of every inserted norm, copies of inputs, and the
    teacher's outputs that the features are compared with. Kernels' scratch space and the data are not counted.
    """
    parameters = sum(p.numel() * p.element_size() for p in network.parameters())
    outputs = sum(_elements(layer) * (2 if layer.insert_bn else 1) for layer in plan.swapped)
    outputs += sum(layer.copies * math.prod(layer.in_shape) for layer in plan.swapped if layer.copies > 1)
    kept = _kept_for_backward(network, input_size)
    if kept is None:  # its Python wants real data: what the layers read and write, and as much for what lies between
        kept = 2 * 4 * sum(math.prod(layer.in_shape) + _elements(layer) for layer in plan.layers)
    return TrainingMemory(4 * parameters + 3 * 4 * _more_weights(plan), kept + 4 * outputs)


def _more_weights(plan: Plan) -> int:
    """What the student has and the teacher has not: further weights per input, and norms."""
    rows = ((layer, (layer.copies - 1) * layer.taps + (2 if layer.insert_bn else 0)) for layer in plan.swapped)
    return sum(layer.out_shape[1] * weights for layer, weights in rows)


def _elements(layer: LayerPlan) -> int:
    return math.prod(layer.out_shape)


def _kept_for_backward(network: nn.Module, input_size: tuple[int, ...]) -> int | None:
    """Bytes an image that autograd saves in the CNN's forward pass, its parameters apart."""
    storages: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor  # kept alive, so that its key stays its own
        return tensor

    try:
        copy = outline(network).train().requires_grad_(True)
        own = {value.untyped_storage()._cdata for value in (*copy.parameters(), *copy.buffers())}
        image = torch.zeros(_BATCH, *input_size, dtype=next(copy.parameters()).dtype, device="meta")
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            copy(image)
    except Exception:  # arbitrary Python code runs here
        return None
    return sum(value.untyped_storage().nbytes() for key, value in storages.items() if key not in own) // _BATCH
