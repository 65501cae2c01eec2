import pytest
import torch
from networks import Mobile, Residual
from torch import nn

from anncvt.loading import load
from anncvt.passes.choice import Choice
from anncvt.passes.plan import plan
from anncvt.passes.rewrite import rewrite


def kept_in_a_real_step(network, size, batch):
    """Bytes that autograd holds after a forward pass, measured on real tensors."""
    own = {value.data_ptr() for value in (*network.parameters(), *network.buffers())}
    held = {}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            held[tensor.data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network.train()(torch.randn(batch, *size))
    assert output.requires_grad
    return sum(size for _, size in held.values()) / batch


@pytest.mark.parametrize(("network", "size", "copies"), [(Residual, 32, 1), (Mobile, 64, 1), (Residual, 32, 3)])
def test_the_estimate_is_close_to_a_real_step(network, size, copies):
    program = rewrite(plan(load(network(), input_size=size), Choice.of(copies=copies)))
    memory = program.plan.memory
    real = kept_in_a_real_step(program.student, program.preprocess.input_size, 8)
    features = sum(4 * torch.Size(layer.out_shape).numel() for layer in program.plan.swapped)
    assert memory.per_image - features == pytest.approx(real, rel=0.25)
    teacher, student = (sum(p.numel() for p in net.parameters()) for net in (program.teacher, program.student))
    assert memory.fixed == 4 * (teacher + 3 * student)


def test_networks_that_need_real_data_are_estimated_from_their_layers():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Residual()

        def forward(self, x):
            return self.net(x if float(x.sum()) < 1e9 else -x)

    looks = plan(load(Looks(), input_size=32)).plan.memory
    plain = plan(load(Residual(), input_size=32)).plan.memory
    assert looks.fixed == plain.fixed and 0.5 < looks.per_image / plain.per_image < 2
