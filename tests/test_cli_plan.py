"""What the user sees of a plan, and the ways to change it."""

import json

import pytest
from test_cli import BRIEF, DIGITS, EXAMPLES, WEIGHTS, anncvt, answered

from anncvt import zoo


def swapped(*args: object) -> set[str]:
    return {layer["name"] for layer in answered("plan", *DIGITS, *args)["layers"] if layer["action"] == "swap"}


def test_the_table_says_what_why_and_what_it_costs():
    shown = anncvt("plan", *DIGITS).stdout
    for heading in ("layer", "kind", "output", "MACs", "action", "norm", "reason"):
        assert heading in shown.splitlines()[1]
    stem = next(line for line in shown.splitlines() if "stem: it reads the image" in line)
    assert "Conv2d 3x3" in stem and "keep" in stem
    assert "layer1.bn1" in next(line for line in shown.splitlines() if "layer1.conv1" in line)
    assert "7 of 8 convolutions become adders" in shown
    assert "multiply-accumulates" in shown and "additions" in shown
    assert "Horowitz" in shown and "J, the CNN" in shown
    assert "a training step takes about" in shown and "more per image" in shown


def test_figures_for_programs():
    planned = answered("plan", *DIGITS)
    totals = planned["totals"]
    assert totals["joules"] < totals["cnn_joules"] < 1e-3
    assert planned["memory"]["fixed"] > 0 and planned["memory"]["per_image"] > 0


def test_policies_and_linear():
    default = swapped()
    assert swapped("--policy", "paper") == default  # this network has no gates and no depthwise convolutions
    everything = swapped("--policy", "all")
    assert default < everything and len(everything) == len(default) + 1, "the stem, too"
    assert "become adders" in anncvt("plan", *DIGITS, "--linear").stdout
    assert "Linear layers" in anncvt("plan", *DIGITS, "--linear").stdout
    assert "--policy" in anncvt("plan", *DIGITS, "--policy", "none", code=2).stderr


def test_an_edited_plan_comes_back(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(anncvt("plan", *DIGITS, "--json").stdout)
    assert swapped("--plan", file) == swapped()
    planned = json.loads(file.read_text())
    name = next(layer["name"] for layer in planned["layers"] if layer["action"] == "swap")
    next(layer for layer in planned["layers"] if layer["name"] == name)["action"] = "keep"
    file.write_text(json.dumps(planned))
    assert swapped("--plan", file) == swapped() - {name}
    planned["layers"][0]["action"] = "replace"
    file.write_text(json.dumps(planned))
    said = anncvt("plan", *DIGITS, "--plan", file, code=1).stderr
    assert "no action 'replace'" in said and '"swap" or "keep"' in said
    assert "--plan" in anncvt("plan", *DIGITS, "--plan", tmp_path / "no.json", code=2).stderr


def test_a_conversion_takes_the_plan_dumps_graphs_and_resumes_only_with_the_same_choice(tmp_path):
    file, folder, graphs = tmp_path / "plan.json", tmp_path / "x.ann", tmp_path / "graphs"
    planned = answered("plan", *DIGITS)
    for layer in planned["layers"]:
        layer["action"] = "keep" if layer["name"].startswith("layer1") else layer["action"]
    file.write_text(json.dumps(planned))
    done = answered("convert", *DIGITS, *BRIEF, "--plan", file, "--dump", graphs, "-o", folder)
    assert done["totals"]["swapped"] == 5
    stages = ["1-plan", "2-rewrite", "3-calibrate"]
    assert sorted(f.name for f in graphs.iterdir()) == [f"{s}.{w}.txt" for s in stages for w in ("after", "before")]
    assert answered("convert", *DIGITS, *BRIEF, "--plan", file, "-o", folder, "--resume")["stage"] == "calibrated"
    for option in (["--policy", "all"], ["--linear"]):
        said = anncvt("convert", *DIGITS, *BRIEF, *option, "-o", folder, "--resume", code=1).stderr
        assert f"planned with another {option[0]}" in said


def test_little_to_gain_is_said(tmp_path):
    (tmp_path / "wide.py").write_text(
        "from torch import nn\n\n\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), "
        "nn.Flatten(), nn.Linear(144, 500))\n"
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path)
        said = anncvt("plan", "wide:net", "--input-size", 8).stderr
    assert "gains little" in said and "--linear" in said


def test_a_named_model_without_weights_says_so_and_torchvision_is_explained_once(monkeypatch):
    if not zoo.names("torchvision"):
        pytest.skip("torchvision is not installed")
    real = zoo.build

    def offline(name, *arguments, pretrained=False):
        if pretrained:
            raise OSError("no route to host. Retry later")
        return real(name, *arguments)

    monkeypatch.setattr(zoo, "build", offline)
    monkeypatch.setattr(zoo, "_untold", ["torchvision is built for CUDA"])
    said = anncvt("plan", "torchvision:squeezenet1_1").stderr
    assert "no pretrained weights (no route to host); RANDOM" in said and said.count("built for CUDA") == 1
    assert "built for CUDA" not in anncvt("plan", "torchvision:squeezenet1_1").stderr


def test_examples_in_the_help_are_real():
    assert (EXAMPLES / "digits_net.py").is_file() and WEIGHTS.is_file()
    shown = anncvt("plan", "--help").stdout
    for option in ("--policy", "--plan FILE", "--linear", "--dump DIR", "--keep GLOB"):
        assert option in shown
