import pytest
import torch
import torch.nn.functional as F
from networks import Awkward, Inverted, Joined, Mobile, NormAct, Residual, Shuffled, ZeroPadded
from quantized import adder_program, noise
from torch import nn

from anncvt.errors import AnncvtError
from anncvt.passes.choice import Choice
from anncvt.passes.pieces_of import pieces_of
from anncvt.runtime import fallback
from anncvt.runtime.integer_network import INPUT


def evaluated(pieces, x):
    """The pieces in real numbers: what fusing must not have changed."""
    values = {INPUT: x.double()}
    for piece in pieces.order:
        source = torch.cat([values[name] for name in piece.inputs], 1)
        top, left, bottom, right = piece.window.padding
        padded = F.pad(source, (left, right, top, bottom, *piece.channels))
        geometry = (piece.window.stride, (0, 0), piece.window.dilation, piece.window.groups)
        if piece.op == "adder":
            y = fallback.forward(padded, piece.weight, *geometry)
        elif piece.op == "convolution":
            y = F.conv2d(padded, piece.weight, None, geometry[0], 0, geometry[2], geometry[3])
        elif piece.op == "sum_pool":
            y = F.avg_pool2d(padded, piece.kernel, piece.window.stride) * piece.kernel[0] * piece.kernel[1]
        elif piece.op == "max_pool":
            padded = F.pad(source, (left, right, top, bottom), value=-torch.inf)
            y = F.max_pool2d(padded, piece.kernel, piece.window.stride)
        elif piece.op == "slice":
            chosen = source[:, piece.channels[0] : source.shape[1] - piece.channels[1]]
            y = chosen[:, :, :: piece.window.stride[0], :: piece.window.stride[1]]
        elif piece.op == "shuffle":
            y = F.channel_shuffle(source, piece.window.groups)
        else:
            y = source.flatten(1)[:, :, None, None] if piece.op == "flatten" else padded
        if piece.scale is not None:
            y = y * piece.scale.view(-1, 1, 1) + piece.shift.view(-1, 1, 1)
            y = y if piece.residual is None else y + values[piece.residual]
            y = y.clamp(piece.low, piece.high)
        values[piece.name] = y
    return y.flatten(1)


class Preactivated(nn.Module):
    """BatchNorm and ReLU before the layers, sums that are read twice, a tensor added to itself."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding="same")
        self.bn2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv1(self.bn1(x).relu())
        x = torch.add(x, self.conv2(F.hardtanh(self.bn2(x))))
        x = (x + x).clamp(min=-2)
        return self.head(x.mean((-1, -2), keepdim=True).flatten(1))


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("cnn", [Residual, ZeroPadded, Inverted, Joined, Shuffled, Preactivated, NormAct])
def test_pieces_compute_what_the_network_does(cnn, copies):
    program = adder_program(cnn(), 8, choice=Choice.of(copies=copies))
    pieces = pieces_of(program)
    x = noise(4, (3, 8, 8)).batch(torch.arange(4), program.preprocess)
    with torch.no_grad():
        torch.testing.assert_close(evaluated(pieces, x).float(), program.student(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cnn", [Residual, NormAct])
def test_norm_residual_and_activation_are_fused(cnn):
    pieces = pieces_of(adder_program(cnn(), 8))
    assert [piece.op for piece in pieces.order] == [
        "convolution", "adder", "adder", "adder", "sum_pool", "convolution"
    ]  # fmt: skip
    last_adder = pieces["down.0"]
    assert last_adder.residual == "conv2" and last_adder.low == 0 and not pieces["conv2"].active


def test_memory_operations_keep_the_grid_of_their_input():
    pieces = pieces_of(adder_program(ZeroPadded(), 8))
    residual = pieces["conv2"].residual
    assert pieces[residual].op == "pad" and pieces.owners(residual) == ("stem",)


def test_arguments_with_defaults_are_no_inputs():
    class Optional(Residual):
        def forward(self, x, features=False, scale=1):
            return super().forward(x)

    program = adder_program(Optional(), 8)
    assert [piece.name for piece in pieces_of(program).order] == [
        piece.name for piece in pieces_of(adder_program(Residual(), 8)).order
    ]


class Refused(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.body = body
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(self.conv(self.stem(x))).mean((2, 3)))


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (nn.Hardswish(), "Hardswish"),
        (nn.GroupNorm(2, 4), "GroupNorm"),
        (Call(lambda x: F.max_pool2d(x, 2, return_indices=True)[0]), "getitem"),
        (nn.AvgPool2d(3, 2, 1, count_include_pad=False), "unequal"),
        (nn.AdaptiveAvgPool2d(3), "unequal"),
        (Call(lambda x: torch.cat([x, x], 2)), "another dimension"),
        (Call(lambda x: torch.cat(torch.chunk(x, 2, 1), 1)), "tensors of the network"),
        (Call(lambda x: x * 2), "mul"),
        (Call(lambda x: x + 1), "two tensors"),
        (Call(lambda x: x[:, :, 1:]), "every n-th pixel"),
        (Call(lambda x: torch.chunk(x, 1, 2)[0]), "getitem"),
        (Call(lambda x: x.view(-1, 2, 2, 8, 8).transpose(1, 3).reshape(-1, 4, 8, 8)), "groups of channels"),
        (Call(lambda x: x.view(-1, 2, 2, 8, 8).contiguous().contiguous().view(-1, 4, 8, 8)), "groups of channels"),
        (Call(lambda x: x.view(-1, 2, 2, 8, 8).transpose(1, 2).reshape(-1, 4, 4, 16)), "their shape"),
        (Call(lambda x: x.view(-1, 2, 2, 8, 8).relu().view(-1, 4, 8, 8)), "view"),
        (Call(lambda x: x + x.mean((2, 3), keepdim=True)), "different shapes"),
        (nn.Linear(8, 8), "Linear layer over"),
        (Call(lambda x: F.pad(x, (1, 1), value=2.0)), "zeros"),
        (Call(lambda x: x.relu() + x.relu_()), "overwrites"),
        (Call(lambda x: x.mean(1, keepdim=True).expand(-1, 4, -1, -1)), "mean"),
        (Call(lambda x: x if x.sum() > 0 else -x), "cannot be traced"),
    ],
)
def test_what_integers_do_not_have_is_refused_by_name(body, named):
    with pytest.raises(AnncvtError, match=named) as raised:
        pieces_of(adder_program(Refused(body), 8))
    assert raised.value.fix


@pytest.mark.parametrize(("cnn", "size"), [(Mobile, 16), (Awkward, 6)])
def test_gates_and_control_flow_are_refused(cnn, size):
    with pytest.raises(AnncvtError, match=r"integer networks|traced"):
        pieces_of(adder_program(cnn(), size))


def test_what_is_concatenated_shares_a_grid():
    pieces = pieces_of(adder_program(Joined(), 8))
    assert [piece.op for piece in pieces.order].count("concatenate") == 3  # of one tensor there is none
    last = pieces[pieces["last.0"].inputs[0]]
    owners = ("left.0", "right.0", "stem.0", "first.2", "second.2", "getitem.rescaled")
    assert last.op == "concatenate" and pieces.owners(last.name) == owners
    assert pieces["getitem.rescaled"].op == "rescale" and pieces.owners("getitem") == (INPUT,)
    sharing = pieces.sharing()
    assert set(sharing) == set(owners) and {frozenset(group) for group in sharing.values()} == {frozenset(owners)}


def test_adders_of_one_tensor_read_its_copies_in_one_place():
    pieces = pieces_of(adder_program(Residual(), 8, choice=Choice.of(copies={"conv1": 2, "down.0": 2})))
    assert [piece.op for piece in pieces.order].count("concatenate") == 1
    copies = pieces["conv1"].inputs[0]
    assert pieces["down.0"].inputs == (copies,) and pieces[copies].inputs == ("stem",) * 3
    assert pieces[copies].shape == (12, 8, 8) and pieces["conv1"].weight.shape == (8, 12, 3, 3)
    assert pieces.owners(copies) == ("stem",) and pieces["conv2"].inputs == ("conv1",)
