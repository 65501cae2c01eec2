import json
import shutil

import pytest
from conftest import EXAMPLES

import anncvt
from anncvt.cli import cli
from anncvt.errors import AnncvtError
from anncvt.measure import DataChoice
from anncvt.runtime import integer_network, integer_tvm


def test_quantize_keeps_measures_and_remembers(converted):
    result = anncvt.quantize(converted, DataChoice("digits", limit=64), bits=6)
    assert result["settings"]["bits"] == 6 and result["accuracy"]["integer"]["bits"] == 6
    difference = result["accuracy"]["integer"]["top1"] - result["accuracy"]["student"]["top1"]
    assert abs(difference) <= 10
    network = integer_network.load(converted)
    assert len(network.steps) == len(result["layers"])
    record = anncvt.load(converted).history[-1]
    assert record.stage == "quantized" and record.metrics["bits"] == 6
    again = anncvt.evaluate(converted, DataChoice("digits", limit=64))
    assert again["integer"] == result["accuracy"]["integer"]


def test_other_bits_replace_the_integers(converted):
    for bits in (8, 4):
        anncvt.quantize(converted, DataChoice("digits", limit=32), bits=bits)
        assert integer_network.load(converted).settings["bits"] == bits


def test_distilling_further_drops_the_integers(converted):
    anncvt.quantize(converted, DataChoice("digits", limit=32))
    anncvt.distill(converted, DataChoice("digits", limit=64), epochs=1, batch_size=32)
    assert not integer_network.exists(converted)


def test_a_program_without_a_folder_is_told(converted):
    program = anncvt.load(converted)
    program.folder = None
    with pytest.raises(AnncvtError, match="no folder"):
        anncvt.quantize(program, "digits")


def test_the_verb_shows_layers_and_accuracy(converted):
    from click.testing import CliRunner

    arguments = ["quantize", str(converted), "--limit", "32", "--bits", "4", "--range", "percentile"]
    shown = CliRunner().invoke(cli, arguments)
    assert shown.exit_code == 0, shown.output
    assert "integers, 4 bits" in shown.output and "accumulator bits" in shown.output
    told = CliRunner().invoke(cli, ["evaluate", str(converted), "--limit", "32", "--json"])
    assert json.loads(told.stdout)["integer"]["bits"] == 4


def test_the_package_for_hardware(converted, tmp_path):
    from click.testing import CliRunner

    out = tmp_path / "out"
    arguments = ["export", str(converted), "--format", "hardware", "-o", str(out), "--golden", "1", "--json"]
    refused = CliRunner().invoke(cli, arguments)
    assert refused.exit_code == 1 and "anncvt quantize" in refused.stderr
    anncvt.quantize(converted, DataChoice("digits", limit=32))
    shown = CliRunner().invoke(cli, arguments)
    assert shown.exit_code == 0, shown.output
    assert "reference.c" in json.loads(shown.stdout)["files"]
    assert json.loads((out / "manifest.json").read_text())["images"] == 1


def test_check_compares_integers_layer_by_layer(converted):
    from click.testing import CliRunner

    refused = CliRunner().invoke(cli, ["check", str(converted), "--int8"])
    assert refused.exit_code == 1 and "anncvt quantize" in refused.stderr
    anncvt.quantize(converted, DataChoice("digits", limit=32))
    shown = CliRunner().invoke(cli, ["check", str(converted), "--int8", "--layers"])
    assert shown.exit_code == 0 and "bit for bit, on 2 images" in shown.output
    assert all(step.name in shown.output for step in integer_network.load(converted).steps)
    if integer_tvm.usable():
        anncvt.compile(converted, integers=True)
    shown = CliRunner().invoke(cli, ["check", str(converted), "--int8", "--limit", "1"]).output
    assert "layers equal" in shown and ("1 of 1" in shown) == integer_tvm.usable()
    assert CliRunner().invoke(cli, ["check", str(converted), "--layers"]).exit_code == 2


def test_integers_are_compiled_run_and_checked_as_a_whole(converted, picture):
    pytest.importorskip("tvm")
    from click.testing import CliRunner

    def answered(*arguments):
        return json.loads(CliRunner().invoke(cli, [*map(str, arguments), "--json"]).stdout)

    refused = CliRunner().invoke(cli, ["compile", str(converted), "--int8"])
    assert refused.exit_code == 1 and "anncvt quantize" in refused.stderr
    anncvt.quantize(converted, DataChoice("digits", limit=32))
    run = ("run", converted, "--input", picture, "--int8")
    assert "anncvt compile DIR --int8" in answered(*run, "--backend", "tvm")["error"]["fix"]
    assert "anncvt export DIR --int8" in answered(*run, "--backend", "onnxruntime")["error"]["fix"]
    compiled = answered("compile", converted, "--int8")
    assert compiled["path"] == str(converted / "model.int8.so") and compiled["fixed"] is False
    answered("export", converted, "--int8", "--body", "one")
    found = [answered(*run, "--backend", name)["images"] for name in ("tvm", "onnxruntime", "torch")]
    assert found[0] == found[1] == found[2] and len(found[0][0]["top"]) == 5


def test_two_weights_per_input_by_the_command_line(tmp_path, picture):
    """From the CNN to integers that every backend computes alike."""
    pytest.importorskip("tvm")
    from click.testing import CliRunner

    def answered(*arguments):
        shown = CliRunner().invoke(cli, [*map(str, arguments), "--json"])
        assert shown.exit_code == 0, shown.output
        return json.loads(shown.stdout)

    folder, data = tmp_path / "double.ann", ("--calibrate", "digits", "--limit", 64)
    network = ("--arch", "digits_net:DigitsNet", "--input-size", 16, "--mean", 0.5, "--std", 0.5)
    weights = EXAMPLES / "digits_net.safetensors"
    answered("convert", weights, *network, *data, "--budget", 1, "--copies", 2, "-o", folder)
    assert any(layer.copies == 2 for layer in anncvt.load(folder).plan.layers)
    answered("quantize", folder, *data)
    assert any(step.op == "concatenate" for step in integer_network.load(folder).steps)
    answered("export", folder, "--int8", "--fuse")
    answered("compile", folder, "--int8")
    checked = answered("check", folder, "--int8", "--layers")
    assert all(row["ok"] for row in checked["backends"].values())
    assert {"torch", "TVM", "TVM library", "onnxruntime"} <= set(checked["backends"])
    run = ("run", folder, "--input", picture, "--int8", "--backend")
    found = [answered(*run, name)["images"] for name in ("tvm", "onnxruntime", "torch")]
    assert found[0] == found[1] == found[2]


def test_the_integers_as_onnx(converted):
    from click.testing import CliRunner

    def call(*arguments):
        return CliRunner().invoke(cli, [*arguments, "--json"])

    file = converted / "model.int8.onnx"
    refused = call("export", str(converted), "--int8")
    assert refused.exit_code == 1 and "anncvt quantize" in refused.stderr and not file.exists()
    anncvt.quantize(converted, DataChoice("digits", limit=32))
    assert call("export", str(converted), "--int8", "--opset", "14").exit_code == 1 and not file.exists()
    written = call("export", str(converted), "--int8", "--body", "one")
    assert written.exit_code == 0 and json.loads(written.stdout)["path"] == str(file)
    checked = call("check", str(converted), "--int8", "--layers")
    assert checked.exit_code == 0 and json.loads(checked.stdout)["backends"]["onnxruntime"]["ok"]
    kept = shutil.copy(file, converted.parent / "kept.onnx")
    anncvt.quantize(converted, DataChoice("digits", limit=32), bits=4)
    assert not file.exists(), "it was that of the integers before"
    stale = call("check", str(converted), "--int8", "--onnx", kept)
    assert stale.exit_code == 1 and "anncvt export DIR --int8" in stale.stderr
