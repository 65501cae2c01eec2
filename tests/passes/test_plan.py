import dataclasses

import pytest
import torch.nn.functional as F
from networks import Auxiliary, Awkward, DeformConv2d, Mobile, Residual
from recorder import Recorder
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from anncvt.errors import AnncvtError
from anncvt.loading import load
from anncvt.passes.choice import Choice
from anncvt.passes.plan import plan
from anncvt.program import Plan


def planned(network, size, **options):
    return plan(load(network, input_size=size), Choice.of(**options)).plan


def by_name(found):
    return {layer.name: layer for layer in found.layers}


def test_default_decisions():
    layers = by_name(planned(Residual(), 8))
    assert {n: layer.action for n, layer in layers.items()} == {
        "stem": "keep",
        "conv1": "swap",
        "conv2": "swap",
        "down.0": "swap",
    }
    assert layers["stem"].reason.startswith("stem") and layers["conv1"].reason == "dense"
    assert layers["conv1"].bn == "bn1" and layers["down.0"].bn == "down.1" and not layers["conv1"].insert_bn


def test_reasons_of_a_mobile_network():
    layers = by_name(planned(Mobile(), 16))
    reasons = {name: layer.reason.partition(":")[0].partition(";")[0] for name, layer in layers.items()}
    assert reasons == {
        "stem": "stem",
        "expand": "pointwise",
        "depthwise": "depthwise",
        "squeeze": "gate",
        "excite": "gate",
        "grouped": "grouped",
        "classifier": "classifier",
    }
    assert layers["expand"].insert_bn and layers["expand"].bn is None
    assert layers["grouped"].bn == "norm" and not layers["grouped"].insert_bn
    assert not layers["squeeze"].insert_bn


def test_reasons_of_an_awkward_network():
    layers = by_name(planned(Awkward(), 6))
    assert layers["branch.conv"].bn == "branch.bn"  # no graph shows it, the forward pass does
    assert layers["shared"].swapped and layers["shared"].insert_bn and "alias" not in layers
    for name, reason in {
        "conv2d": "functional",
        "up": "transposed",
        "idle": "runs in training only",
    }.items():
        assert layers[name].action == "keep" and reason in layers[name].reason, name


def test_deep_layers_of_small_images_are_not_gates():
    layers = [
        nn.Conv2d(3, 4, 3, 2, 1),
        nn.Conv2d(4, 4, 1, 2),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 1),
    ]
    found = by_name(planned(nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 9)), 4))
    assert found["2"].in_shape == (1, 4, 1, 1) and found["2"].swapped
    assert found["4"].action == "keep" and found["4"].reason.startswith("gate")


def test_cost_of_the_planned_layers():
    found = planned(Residual(), 8)
    layers, totals = by_name(found), found.totals()
    stem, conv = layers["stem"], layers["conv1"]
    assert (stem.adds, stem.muls) == (stem.macs, stem.macs)
    assert (conv.adds, conv.muls) == (2 * conv.macs, 0)
    assert found.other_macs == 40 and totals["muls"] == stem.macs + 40
    assert totals["swapped_share"] == pytest.approx(1 - (stem.macs + 40) / totals["macs"])


def test_globs_overrule_the_defaults():
    layers = by_name(planned(Mobile(), 16, swap=["depth*", "s*"], keep=["squeeze"]))
    assert layers["depthwise"].swapped and layers["depthwise"].reason.startswith("--swap depth*")
    assert layers["stem"].swapped and layers["squeeze"].reason == "--keep squeeze"
    layers = by_name(planned(Residual(), 8, keep=["down.*"]))
    assert layers["down.0"].action == "keep"


@pytest.mark.parametrize("option", ["keep", "swap"])
def test_a_glob_that_matches_nothing_lists_close_names(option):
    with pytest.raises(AnncvtError, match="matches no layer") as error:
        planned(Residual(), 8, **{option: ["layer.conv1"]})
    assert "conv1" in error.value.fix


def test_a_glob_for_linear_layers_points_to_the_option():
    with pytest.raises(AnncvtError, match="matches Linear layers alone") as error:
        planned(Residual(), 8, swap=["head"])
    assert "--linear" in error.value.fix
    with pytest.raises(AnncvtError, match="matches no layer"):
        planned(Residual(), 8, linear=True, swap=["heads"])


def test_what_has_no_counterpart_cannot_be_swapped_by_name_and_is_passed_over_by_a_pattern():
    with pytest.raises(AnncvtError, match="up cannot be swapped: transposed"):
        planned(Awkward(), 6, swap=["up"])
    assert by_name(planned(Awkward(), 6, swap=["*"]))["up"].action == "keep"


def test_a_norm_is_a_partner_only_if_it_alone_reads_and_can_be_refitted():
    class Skip(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.stem, self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), norm, nn.Linear(4, 4)
            self.skip = isinstance(norm, nn.BatchNorm2d) and norm.affine

        def forward(self, x):
            y = self.conv(self.stem(x))
            y = self.norm(y) + y if self.skip else self.norm(y)
            return self.head(y.mean((2, 3)))

    for norm in (nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.GroupNorm(2, 4)):
        layer = by_name(planned(Skip(norm), 8))["conv"]
        assert layer.bn is None and layer.insert_bn


def test_computed_weights_are_folded_and_hooks_keep_a_layer():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), weight_norm(nn.Conv2d(4, 4, 3)), nn.Conv2d(4, 4, 3))
    network[3].register_forward_hook(lambda module, inputs, output: F.relu(output))
    network.append(nn.Conv2d(4, 2, 1))
    layers = by_name(planned(network, 12))
    assert layers["1"].swapped and layers["2"].swapped and "weights folded" in layers["2"].reason
    assert layers["3"].action == "keep" and "hooks" in layers["3"].reason


def test_output_layers_before_pooling_are_classifiers():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 9, 1), nn.AdaptiveAvgPool2d(1))
    network.append(nn.Flatten())
    assert "classifier" in by_name(planned(network, 12))["2"].reason


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv3d])
def test_other_dimensions(conv):
    network = nn.Sequential(conv(2, 4, 3), nn.ReLU(), conv(4, 4, 3), nn.ReLU(), conv(4, 3, 1))
    found = planned(network, 8)
    assert [layer.action for layer in found.layers] == ["keep", "swap", "keep"]


def test_networks_with_nothing_to_swap_are_refused():
    with pytest.raises(AnncvtError, match="no convolutions"):
        planned(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), 8)
    with pytest.raises(AnncvtError, match=r"kept \(stem.*Linear"):
        planned(nn.Sequential(nn.Conv2d(3, 2, 4, 4), nn.Flatten(), nn.Linear(8, 500)), 8)
    with pytest.raises(AnncvtError, match=r"are kept \(--keep") as error:
        planned(Residual(), 8, keep=["*"])
    assert "keep fewer layers" in error.value.fix


def test_a_network_that_gains_little_is_told_so():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(144, 500))
    notes = Recorder()
    plan(load(network, input_size=8), progress=notes)
    assert len(notes.notes) == 1 and "Linear" in notes.notes[0]
    notes = Recorder()
    plan(load(Residual(), input_size=8), progress=notes)
    assert notes.notes == []


def test_the_program_passed_in_stays_as_it_was():
    program = load(Residual(), input_size=8)
    after = plan(program)
    assert program.plan is None and len(program.history) == 1
    assert after.stage == "planned" and after.teacher is program.teacher


def test_plans_round_trip_through_json():
    found = planned(Awkward(), 6)
    assert Plan.from_json(found.to_json()) == found
    newer = found.to_json()
    newer["layers"][0]["from_the_future"] = 1
    assert Plan.from_json(newer) == found


@pytest.mark.parametrize("data", [{}, {"layers": [{"name": "a"}]}, {"layers": 3}, {"layers": [3]}, []])
def test_other_json_is_not_a_plan(data):
    with pytest.raises(AnncvtError, match="not a plan"):
        Plan.from_json(data)


def test_planning_again_drops_only_an_outdated_student():
    program = plan(load(Residual(), input_size=8))
    program = dataclasses.replace(program, student=Residual())
    assert plan(program).student is program.student
    assert plan(program, Choice(keep=("conv1",))).student is None


def test_a_norm_that_shares_its_input_in_training_is_no_partner():
    layers = by_name(planned(nn.Sequential(nn.Conv2d(3, 3, 1), Auxiliary()), 4, policy="all"))
    assert layers["1.conv"].bn is None and layers["1.conv"].insert_bn
    assert layers["1.aux"].reason == "runs in training only"


def test_deformable_convolutions_are_kept():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1), DeformConv2d(), nn.Flatten())
    layer = by_name(planned(network, 4))["2"]
    assert layer.action == "keep" and layer.reason == "deformable: no adder counterpart"


def test_planning_needs_no_memory_for_activations(monkeypatch):
    """A network whose activations would not fit anywhere is planned on shapes alone."""
    network = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1), nn.AdaptiveAvgPool2d(1))
    network.extend([nn.Flatten(), nn.Linear(64, 2)])
    side = 1 << 17
    conv = planned(network, side).layers[1]
    assert conv.out_shape == (1, 64, side, side) and conv.swapped
