import pytest
import torch
from networks import Awkward, Mobile, Residual, Same
from torch import fx, nn

from anncvt.errors import AnncvtError
from anncvt.loading import load
from anncvt.nn import AdderConv2d
from anncvt.passes.choice import Choice
from anncvt.passes.plan import plan
from anncvt.passes.rewrite import rewrite
from anncvt.swap import swap


def rewritten(network, size, **options):
    return rewrite(plan(load(network, input_size=size), Choice.of(**options)))


@pytest.mark.parametrize(("network", "size"), [(Residual, 8), (Mobile, 16), (Awkward, 6)])
def test_planned_layers_are_adders_and_the_rest_is_the_teacher(network, size):
    program = rewritten(network(), size)
    for layer in program.plan.layers:
        if layer.swapped:
            adder = program.student.get_submodule(layer.name)
            assert isinstance(adder, AdderConv2d) and (adder.norm is not None) == layer.insert_bn
    before, after = program.teacher.state_dict(), program.student.state_dict()
    assert set(before) <= set(after)
    assert all(".norm." in name for name in set(after) - set(before))
    folded = {"standardised.weight"}
    assert all(torch.equal(after[name], value) for name, value in before.items() if name not in folded)
    assert all(a is not b for a, b in zip(program.teacher.parameters(), program.student.parameters(), strict=False))


@pytest.mark.parametrize(("network", "size"), [(Residual, 8), (Mobile, 16), (Awkward, 6)])
def test_the_student_computes_and_trains(network, size):
    program = rewritten(network(), size)
    x = torch.randn(2, 3, size, size)
    y = program.student.train()(x)
    assert y.shape == program.teacher(x).shape and bool(torch.isfinite(y).all())
    y.sum().backward()
    first = program.plan.swapped[0].name
    assert program.student.get_submodule(first).weight.grad is not None
    assert all(parameter.grad is None for parameter in program.teacher.parameters())


def test_a_shared_convolution_stays_shared():
    student = rewritten(Awkward(), 6).student
    assert isinstance(student.shared, AdderConv2d) and student.alias is student.shared


def test_layers_that_share_a_weight_alone_get_one_each():
    network = nn.Sequential(*(nn.Conv2d(c, 4, 3, padding=1) for c in (3, 4, 4, 4)), nn.Flatten(), nn.Linear(256, 2))
    for tied in network[2:4]:
        tied.weight, tied.bias = network[1].weight, network[1].bias
    done = rewrite(plan(load(network, input_size=8), Choice(keep=("1",))))
    held = [done.student[at] for at in (1, 2, 3)]
    assert len({layer.weight for layer in held}) == len({layer.bias for layer in held}) == 3
    assert all(torch.equal(layer.weight, network[1].weight) for layer in held)


def test_a_graph_module_is_a_network_like_others():
    graph = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten()))
    done = rewrite(plan(load(graph, input_size=8)))
    assert isinstance(done.student.get_submodule("2"), AdderConv2d) and isinstance(done.student, fx.GraphModule)
    assert done.student(torch.rand(2, 3, 8, 8)).shape == (2, 64)


def test_rewriting_again_changes_nothing():
    program = rewritten(Residual(), 8)
    with torch.no_grad():
        program.student.conv1.weight.add_(1)
    again = rewrite(program)
    assert again is program and rewrite(plan(program)).student is program.student


def test_the_teacher_and_its_statistics_are_untouched():
    program = plan(load(Residual(), input_size=8))
    before = {name: value.clone() for name, value in program.teacher.state_dict().items()}
    state = torch.get_rng_state()
    after = rewrite(program)
    assert program.student is None and after.stage == "rewritten"
    assert all(torch.equal(value, before[name]) for name, value in program.teacher.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert int(after.student.bn1.num_batches_tracked) == 0 and not after.student.training


def test_a_rewrite_needs_a_plan():
    with pytest.raises(AnncvtError, match="no plan"):
        rewrite(load(Residual(), input_size=8))


class Hidden(nn.Module):
    """Keeps a second reference to its convolution where no replacement can reach it."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1)
        self.list = [self.conv]

    def forward(self, x):
        return self.head(self.list[0](self.stem(x)))


class Reads(nn.Module):
    """Uses an attribute that convolutions have and adders do not, in training only."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.conv(self.stem(x))
        return self.head(x * self.conv.output_padding[0] if self.training else x)


@pytest.mark.parametrize(("network", "message"), [(Hidden, "never called"), (Reads, "training mode")])
def test_a_student_that_does_not_behave_is_refused_with_the_way_out(network, message):
    program = plan(load(network(), input_size=12))
    with pytest.raises(AnncvtError, match=message) as error:
        rewrite(program)
    assert program.student is None and "--keep" in error.value.fix


def test_trouble_of_the_teacher_is_not_the_student_s():
    class OnlyEval(Residual):
        def forward(self, x):
            if self.training:
                raise RuntimeError("not at this size")
            return super().forward(x)

    assert rewritten(OnlyEval(), 8).student is not None


def test_one_and_three_dimensions():
    for conv in (nn.Conv1d, nn.Conv3d):
        network = nn.Sequential(conv(2, 4, 3), nn.ReLU(), conv(4, 4, 3), nn.ReLU(), conv(4, 3, 1))
        program = rewritten(network, 8)
        x = torch.randn(2, *program.preprocess.input_size)
        assert program.student(x).shape == program.teacher(x).shape


class Folded(nn.Module):
    """Computed weights and padding by the size of the input."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))
        self.standardised = Awkward.Standardised(4, 4, 3, padding=1)
        self.same = Same(4, 4, 3, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.same(self.standardised(self.normed(self.stem(x)))).mean((2, 3)))


def test_computed_weights_become_plain_ones_and_padding_follows_the_size():
    program = rewritten(Folded(), 8)
    student, teacher = program.student, program.teacher
    assert torch.equal(student.normed.weight, teacher.normed.weight) and "normed.weight" in student.state_dict()
    mean = teacher.standardised.weight.mean((1, 2, 3), keepdim=True)
    assert torch.equal(student.standardised.weight, teacher.standardised.weight - mean)
    assert student.same.same and torch.equal(student.same.weight, teacher.same.weight)
    for size in (7, 8, 9, 12):
        x = torch.randn(1, 4, size, size)
        assert student.same(x).shape == teacher.same(x).shape
    student.train()(torch.randn(2, 3, 8, 8)).sum().backward()
    assert student.normed.weight.grad is not None


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_weight_norm():
    network = Folded()
    network.normed = torch.nn.utils.weight_norm(nn.Conv2d(4, 4, 3, padding=1))
    program = rewritten(network, 8)
    assert torch.equal(program.student.normed.weight, program.teacher.normed.weight)


@pytest.mark.parametrize("broken", ["swap", "verify"])
def test_nothing_is_changed_where_the_pass_fails(monkeypatch, broken):
    from anncvt.passes import rewrite as module

    program = plan(load(Residual(), input_size=8))
    before = {name: value.clone() for name, value in program.teacher.state_dict().items()}
    kinds = {name: type(part) for name, part in program.teacher.named_modules()}

    def fail(*arguments):
        if broken == "swap":
            swap(*arguments)  # half of the work is done when it fails
        raise AnncvtError("no")

    monkeypatch.setattr(module, "swap", fail) if broken == "swap" else monkeypatch.setattr(
        module.verify, "rewritten", fail
    )
    history = list(program.history)
    with pytest.raises(AnncvtError, match="no"):
        rewrite(program)
    assert program.student is None and program.history == history
    assert kinds == {name: type(part) for name, part in program.teacher.named_modules()}
    assert all(torch.equal(value, before[name]) for name, value in program.teacher.state_dict().items())
