import json

import pytest
from networks import Mobile, Residual
from recorder import Recorder

from anncvt.errors import AnncvtError
from anncvt.loading import load
from anncvt.passes.choice import Choice, read_plan_file
from anncvt.passes.plan import plan


def layers(network, size, **options):
    return {layer.name: layer for layer in plan(load(network, input_size=size), Choice.of(**options)).plan.layers}


def adders(network, size, **options):
    return {name for name, layer in layers(network, size, **options).items() if layer.swapped}


def written(tmp_path, network, size, **actions):
    data = plan(load(network, input_size=size)).plan.to_json()
    for row in data["layers"]:
        row["action"] = actions.get(row["name"].replace(".", "_"), row["action"])
    (tmp_path / "plan.json").write_text(json.dumps(data))
    return tmp_path / "plan.json"


def test_policies():
    every = {"stem", "expand", "depthwise", "squeeze", "excite", "grouped", "classifier"}
    assert adders(Mobile(), 16) == adders(Mobile(), 16, policy="no-depthwise") == {"expand", "grouped"}
    assert adders(Mobile(), 16, policy="paper") == every - {"stem", "classifier"}
    assert adders(Mobile(), 16, policy="all") == every
    with pytest.raises(AnncvtError, match="unknown policy 'none'"):
        Choice.of(policy="none")


def test_a_plan_file_that_was_not_edited_changes_nothing(tmp_path):
    file = written(tmp_path, Mobile(), 16)
    assert layers(Mobile(), 16, plan_file=file) == layers(Mobile(), 16)


def test_edited_actions_are_taken_and_globs_win_over_them(tmp_path):
    file = written(tmp_path, Mobile(), 16, depthwise="swap", expand="keep", stem="swap")
    found = layers(Mobile(), 16, plan_file=file)
    assert {name for name, layer in found.items() if layer.swapped} == {"stem", "depthwise", "grouped"}
    assert found["depthwise"].reason == "plan file" and found["squeeze"].reason.startswith("gate")
    assert adders(Mobile(), 16, plan_file=file, keep=["stem"], swap=["exp*"]) == {"depthwise", "grouped", "expand"}


def test_a_short_file_leaves_the_rest_to_the_policy(tmp_path):
    (tmp_path / "plan.json").write_text('{"layers": [{"name": "conv1", "action": "keep"}]}')
    assert adders(Residual(), 8, plan_file=tmp_path / "plan.json") == {"conv2", "down.0"}
    notes = Recorder()
    plan(load(Residual(), input_size=8), Choice.of(plan_file=tmp_path / "plan.json"), progress=notes)
    assert notes.notes == ["the plan file says nothing of 3 layers (stem, conv2, down.0): decided as without it"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("\udcff", "not JSON"),
        ("[]", "no list 'layers'"),
        ('{"layers": {}}', "no list 'layers'"),
        ('{"layers": []}', "an empty one"),
        ('{"layers": [3]}', r"layers\[0\] has no name"),
        ('{"layers": [{"action": "keep"}]}', r"layers\[0\] has no name"),
        ('{"layers": [{"name": "a"}]}', "a: no action None"),
        ('{"layers": [{"name": "a", "action": "drop"}]}', "a: no action 'drop'"),
        ('{"layers": [{"name": "a", "action": "keep"}, {"name": "a", "action": "swap"}]}', "a is there twice"),
    ],
)
def test_files_that_are_no_plan(tmp_path, content, message):
    (tmp_path / "plan.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(AnncvtError, match=message) as error:
        read_plan_file(tmp_path / "plan.json")
    assert error.value.fix and str(tmp_path) in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(AnncvtError, match="No such file"):
        read_plan_file(tmp_path / "plan.json")


def test_files_of_another_network(tmp_path):
    file = written(tmp_path, Mobile(), 16)
    with pytest.raises(AnncvtError, match="a layer 'expand', the network does not") as error:
        layers(Residual(), 8, plan_file=file)
    assert "names are:" in error.value.fix
    file.write_text(json.dumps({"layers": [{"name": "conv1", "action": "swap", "kernel": [5, 5]}]}))
    with pytest.raises(AnncvtError, match="conv1 has kernel 5x5 there, 3x3 here"):
        layers(Residual(), 8, plan_file=file)


def test_the_impossible_is_refused_where_it_is_asked_for_by_name(tmp_path):
    from networks import Awkward

    file = written(tmp_path, Awkward(), 6, up="swap")
    with pytest.raises(AnncvtError, match="up cannot be swapped: transposed") as error:
        layers(Awkward(), 6, plan_file=file)
    assert '"keep"' in error.value.fix


def test_the_history_says_what_was_chosen(tmp_path):
    file = written(tmp_path, Mobile(), 16, depthwise="swap")
    program = plan(load(Mobile(), input_size=16), Choice.of(plan_file=file, keep=["stem"], policy="paper"))
    metrics = program.history[-1].metrics
    assert metrics["keep"] == ["stem"] and metrics["policy"] == "paper" and metrics["file"]["depthwise"] == "swap"


def test_copies_by_glob_or_file_where_layers_become_adders(tmp_path):
    def copies(**options):
        return {name: layer.copies for name, layer in layers(Mobile(), 16, **options).items() if layer.copies > 1}

    assert copies() == {}
    assert copies(copies=2) == {"expand": 2}  # not what is kept, nor what has groups
    assert copies(copies={"*": 2, "exp*": 3}) == {"expand": 3} and copies(copies={"exp*": 3, "*": 1}) == {}
    assert layers(Mobile(), 16, copies=3)["expand"].adds == 3 * layers(Mobile(), 16)["expand"].adds
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"layers": [{"name": "expand", "action": "swap", "copies": 2}]}))
    assert copies(plan_file=file) == {"expand": 2} and copies(plan_file=file, copies=3) == {"expand": 3}
    program = plan(load(Mobile(), input_size=16), Choice.of(copies={"exp*": 4}))
    assert program.history[-1].metrics["copies"] == {"exp*": 4}


def test_copies_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(AnncvtError, match="grouped cannot have 2 weights per input: it has") as error:
        layers(Mobile(), 16, copies={"grouped": 2})
    assert "--copies" in error.value.fix
    with pytest.raises(AnncvtError, match="--copies 'nothing' matches no layer"):
        layers(Mobile(), 16, copies={"nothing": 2})
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"layers": [{"name": "expand", "action": "swap", "copies": "many"}]}))
    for options in ({"copies": 5}, {"copies": {"exp*": 0}}, {"plan_file": file}):
        with pytest.raises(AnncvtError) as error:
            layers(Mobile(), 16, **options)
        assert error.value.fix == "choose 1, 2, 3 or 4"
