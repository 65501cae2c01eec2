"""The command line as its users meet it: output, errors, exit codes."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import nn

from anncvt import api, pipeline
from anncvt.cli import cli
from anncvt.runtime import processor
from anncvt.runtime.artifact import read_manifest

EXAMPLES = Path(__file__).parent.parent / "examples"
WEIGHTS = EXAMPLES / "digits_net.safetensors"
DIGITS = [str(WEIGHTS), "--arch", "digits_net:DigitsNet", "--input-size", "1x16x16", "--mean", "0.5", "--std", "0.5"]
BRIEF = ["--calibrate", "digits", "--limit", "64", "--budget", "1s"]


def anncvt(*args: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="anncvt")
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result


def answered(*args: object, code: int = 0):
    """The verb's one JSON object; anything else on stdout would not parse."""
    return json.loads(anncvt(*args, "--json", code=code).stdout)


class TestHelp:
    def test_is_fast_and_imports_nothing_heavy(self):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        heavy = "{'torch', 'numpy', 'rich', 'onnx', 'tvm', 'PIL'} & set(sys.modules)"
        code = (
            f"import sys\nfrom anncvt.cli import cli\ncli(['-h'], standalone_mode=False)\nassert not {heavy}, {heavy}"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time, so that a busy machine does not decide.
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5

    def test_verbs_come_in_the_order_of_use(self):
        shown = anncvt("--help").stdout
        places = [shown.index(f"\n  {verb} ") for verb in ("plan", "convert", "distill", "export", "check", "report")]
        assert places == sorted(places)

    @pytest.mark.parametrize("verb", cli.commands)
    def test_every_verb_has_an_example_and_the_common_options(self, verb):
        shown = anncvt(verb, "--help").stdout
        assert f"Example: anncvt {verb}" in shown
        for option in ("--json", "--quiet", "--verbose", "--config"):
            assert option in shown

    def test_version(self):
        assert anncvt("-V").stdout.startswith("anncvt 0.")


class TestChain:
    def test_from_a_cnn_to_every_backend(self, tmp_path, picture):
        folder = tmp_path / "digits.ann"
        done = answered("convert", *DIGITS, *BRIEF, "--distill", "digits", "--batch-size", 32, "-o", folder)
        assert done["stage"] == "distilled" and done["accuracy"]["images"] == 64

        measured = answered("evaluate", folder, "--limit", 64)
        assert set(measured) >= {"student", "teacher", "images"}
        assert set(measured["student"]) == set(measured["teacher"]) == {"top1", "top5"}
        assert measured["teacher"]["top1"] > 95

        assert answered("export", folder)["path"] == str(folder / "model.onnx")
        assert answered("compile", folder)["bytes"] == (folder / "model.so").stat().st_size
        checked = answered("check", folder, "--limit", 40)
        assert checked["ok"] is True and checked["images"] == 40
        for name in ("onnxruntime", "tvm"):
            assert checked["backends"][name]["max_rel"] < 1e-3
            assert checked["backends"][name]["top1_agreement"] == 100

        seen = [answered("run", folder, "--input", picture, "--backend", b) for b in ("torch", "onnxruntime", "tvm")]
        classes = [[row["class"] for row in one["images"][0]["top"]] for one in seen]
        assert classes[0] == classes[1] == classes[2] and len(classes[0]) == 5

        rows = answered("bench", folder, "--repeats", 3)["rows"]
        assert {"network", "backend", "dtype", "batch", "threads", "p50_ms", "p90_ms"} <= set(rows[0])
        assert {(row["network"], row["backend"]) for row in rows} >= {("teacher", "onnxruntime"), ("student", "tvm")}

        reported = answered("report", folder)
        stages = [row["stage"] for row in reported["history"] if row["stage"] not in ("data", "evaluated")]
        assert stages == ["loaded", "planned", "rewritten", "calibrated", "distilled"]

    @pytest.mark.skipif("avx2" not in (processor.features() or ()), reason="needs AVX2")
    def test_fixed_point(self, converted):
        path = answered("compile", converted, "--fixed16")["path"]
        assert read_manifest(Path(path))["target"]["fixed"] is True
        found = answered("check", converted, "--limit", 40)["backends"]["tvm"]
        assert 1e-8 < found["max_rel"] < 1e-3 and found["top1_agreement"] == 100

    @pytest.mark.skipif(processor.architecture() != "x86_64", reason="needs a linker for x86-64")
    def test_fixed_point_is_the_default_with_avx512_and_told(self, converted, tmp_path):
        path = tmp_path / "model.so"
        (tmp_path / "options.toml").write_text("fixed16 = false")
        switched_off = ("avx512", "--config", tmp_path / "options.toml")
        here = not processor.missing(["avx512f", "avx512bw"])  # elsewhere nobody could compare what it computes
        for (target, *options), expected in ((["avx512"], here), (["avx2"], False), (switched_off, False)):
            found = answered("compile", converted, "-o", path, "--target", target, *options)
            assert found == {"path": str(path), "bytes": path.stat().st_size, "fixed": expected}
            assert read_manifest(path)["target"]["fixed"] is expected
        for options, told in (((), here), (("--fixed16",), True), (("--no-fixed16",), False)):
            said = anncvt("compile", converted, "-o", path, "--target", "avx512", *options).stdout
            assert ("16-bit fixed point" in " ".join(said.split())) == told

    def test_a_library_for_onnxruntime(self, converted):
        answered("export", converted, "--fuse")
        path = answered("compile", converted, "--for", "onnxruntime", "--target", "cpu")["path"]
        assert path == str(converted / "libanncvt_ort.so")
        checked = answered("check", converted, "--limit", 4)
        assert checked["ok"] is True and set(checked["backends"]) == {"onnxruntime"}

    @pytest.mark.skipif("avx2" not in (processor.features() or ()), reason="needs AVX2")
    def test_a_library_in_fixed_point(self, converted):
        answered("export", converted, "--fuse")
        built = answered("compile", converted, "--for", "onnxruntime", "--target", "cpu", "--fixed16")
        assert built["fixed"] is read_manifest(Path(built["path"]))["fixed"] is True
        found = answered("check", converted, "--limit", 40)["backends"]["onnxruntime"]
        assert 1e-8 < found["max_rel"] < 1e-3 and found["top1_agreement"] == 100

    def test_people_see_tables(self, converted, picture):
        assert "teacher (CNN)" in anncvt("evaluate", converted, "--limit", 20).stdout
        assert "layer3.conv2" in anncvt("plan", converted).stdout
        assert "calibrated" in anncvt("report", converted).stdout
        assert "seven.png" in anncvt("run", converted, "--input", picture).stdout

    def test_plan_of_a_checkpoint(self):
        planned = answered("plan", *DIGITS, "--keep", "layer1.*")
        assert {"name", "kind", "action", "reason", "macs", "adds", "muls"} <= set(planned["layers"][0])
        actions = {layer["name"]: layer["action"] for layer in planned["layers"]}
        assert actions["layer1.conv1"] == "keep" and actions["layer2.conv1"] == "swap"
        assert planned["totals"]["swapped"] == 5

    def test_dry_run_writes_nothing(self, tmp_path):
        answered("convert", *DIGITS, *BRIEF, "-o", tmp_path / "x.ann", "--dry-run")
        assert not any(tmp_path.iterdir())

    def test_distilling_removes_what_was_exported_before(self, converted):
        answered("export", converted)
        (converted / "model.int8.so").touch()
        answered("distill", converted, "--limit", 64, "--batch-size", 32)
        assert not (converted / "model.onnx").exists() and not (converted / "model.int8.so").exists()

    def test_quiet_says_nothing(self, converted):
        assert anncvt("evaluate", converted, "--limit", 20, "-q").stderr == ""

    def test_what_a_network_prints_does_not_reach_stdout(self, tmp_path):
        source = (EXAMPLES / "digits_net.py").read_text()
        (tmp_path / "chatty.py").write_text(source + "\nprint('hello from the architecture')\n")
        shutil.copy(WEIGHTS, tmp_path / "net.safetensors")
        result = anncvt("plan", tmp_path / "net.safetensors", "--arch", "chatty:DigitsNet", "--json")
        assert json.loads(result.stdout)["layers"]
        assert "hello from the architecture" in result.stderr


class TestGates:
    def test_accuracy(self, converted):
        weights = load_file(converted / "student.safetensors")
        anncvt("evaluate", converted, "--limit", 64, "--max-drop", 100)
        save_file({**weights, "fc.weight": -weights["fc.weight"]}, converted / "student.safetensors")
        result = anncvt("evaluate", converted, "--limit", 64, "--max-drop", 0, "--json", code=3)
        assert json.loads(result.stdout)["images"] == 64
        assert "points below its teacher" in result.stderr

    def test_parity(self, converted):
        anncvt("export", converted)
        weights = load_file(converted / "student.safetensors")
        save_file({**weights, "fc.bias": weights["fc.bias"] + 1}, converted / "student.safetensors")
        result = anncvt("check", converted, "--limit", 8, "--json", code=3)
        assert json.loads(result.stdout)["ok"] is False
        assert "onnxruntime differ from torch" in result.stderr


class TestInterruption:
    def test_leaves_a_folder_to_resume_from(self, tmp_path, monkeypatch):
        folder = tmp_path / "digits.ann"
        command = ["convert", *DIGITS, *BRIEF, "-o", folder]
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "calibrate", _interrupted)
            result = anncvt(*command, code=130)
        assert f"-o {folder} --resume" in result.stderr
        assert answered("report", folder)["stage"] == "rewritten"

        again = anncvt(*command, code=1)
        assert "--resume" in again.stderr and "--force" in again.stderr

        assert answered(*command, "--resume")["stage"] == "calibrated"
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "calibrate", _interrupted)  # a finished stage does not run again
            assert answered(*command, "--resume")["stage"] == "calibrated"

    def test_before_anything_was_written(self, tmp_path, monkeypatch):
        monkeypatch.setattr(pipeline, "plan", _interrupted)
        result = anncvt("convert", *DIGITS, *BRIEF, "-o", tmp_path / "x.ann", code=130)
        assert result.stderr.strip().endswith("interrupted")
        assert not any(tmp_path.iterdir())

    def test_resuming_something_else_is_refused(self, converted):
        other = anncvt("convert", *DIGITS, *BRIEF, "-o", converted, "--resume", "--keep", "layer1.*", code=1)
        assert "--keep" in other.stderr
        weights = load_file(WEIGHTS)
        changed = converted.parent / "changed.safetensors"
        save_file({**weights, "fc.bias": weights["fc.bias"] + 1}, changed)
        result = anncvt("convert", changed, *DIGITS[1:], *BRIEF, "-o", converted, "--resume", code=1)
        assert "another checkpoint" in result.stderr

    def test_force_starts_anew(self, converted):
        (converted / "model.onnx").write_bytes(b"old")
        answered("convert", *DIGITS, *BRIEF, "-o", converted, "--force")
        assert not (converted / "model.onnx").exists()


def _interrupted(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


class TestBadInput:
    """One message with a fix, the exit code, and nothing half-written."""

    def refused(self, tmp_path: Path, *args: object, code: int = 1) -> str:
        before = sorted(tmp_path.rglob("*"))
        result = anncvt(*args, code=code)
        assert sorted(tmp_path.rglob("*")) == before
        assert "Traceback" not in result.stderr and result.stdout == ""
        return result.stderr

    def test_missing_file(self, tmp_path):
        said = self.refused(tmp_path, "convert", tmp_path / "no.pth", *BRIEF, "-o", tmp_path / "x.ann")
        assert "no.pth: no such file" in said and "fix:" in said

    def test_wrong_architecture_names_keys(self, tmp_path):
        args = [WEIGHTS, "--arch", "torch.nn:Conv2d", "--arch-args", "in_channels=1", "--arch-args", "out_channels=16"]
        args += ["--arch-args", "kernel_size=3"]
        said = self.refused(tmp_path, "convert", *args, *BRIEF, "-o", tmp_path / "x.ann")
        assert "do not fit torch.nn:Conv2d" in said and "layer1.bn1" in said

    def test_truncated_checkpoint(self, tmp_path):
        cut = tmp_path / "cut.pth"
        torch.save({"weight": torch.zeros(64, 64)}, cut)
        cut.write_bytes(cut.read_bytes()[:-500])
        said = self.refused(tmp_path, "convert", cut, *DIGITS[1:], *BRIEF, "-o", tmp_path / "x.ann")
        assert "cut.pth" in said and "fix:" in said

    def test_hostile_checkpoint_is_not_run(self, tmp_path):
        hostile = tmp_path / "hostile.pth"
        torch.save(_Hostile(tmp_path / "pwned"), hostile)
        said = self.refused(tmp_path, "convert", hostile, *DIGITS[1:], *BRIEF, "-o", tmp_path / "x.ann")
        assert "hostile.pth" in said and not (tmp_path / "pwned").exists()

    def test_data_without_images(self, tmp_path):
        (tmp_path / "empty").mkdir()
        data = f"folder:{tmp_path / 'empty'}"
        said = self.refused(tmp_path, "convert", *DIGITS, "--calibrate", data, "-o", tmp_path / "x.ann")
        assert "empty" in said and "fix:" in said

    def test_unknown_data(self, tmp_path):
        said = self.refused(tmp_path, "convert", *DIGITS, "--calibrate", "cifar11", "-o", tmp_path / "x.ann")
        assert "cifar11" in said and "cifar10" in said

    def test_wrong_image_size(self, tmp_path):
        args = [*DIGITS, "--input-size", "3x16x16"]
        said = self.refused(tmp_path, "convert", *args, *BRIEF, "-o", tmp_path / "x.ann")
        assert "channels" in said and "--input-size" in said

    def test_unwritable_output(self, tmp_path):
        (tmp_path / "file").write_text("")
        for output in (tmp_path / "file", tmp_path / "file" / "x.ann"):
            assert "-o" in self.refused(tmp_path, "convert", *DIGITS, *BRIEF, "-o", output)

    def test_output_that_is_not_ours(self, tmp_path):
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "cat.jpg").write_text("precious")
        for flags in ([], ["--force"], ["--resume"]):
            said = self.refused(tmp_path, "convert", *DIGITS, *BRIEF, *flags, "-o", tmp_path / "photos")
            assert "not a program folder" in said

    def test_full_disk(self, tmp_path, monkeypatch):
        def full(handle: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        said = self.refused(tmp_path, "convert", *DIGITS, *BRIEF, "-o", tmp_path / "x.ann")
        assert "No space left on device" in said

    def test_no_data(self, tmp_path):
        assert "--calibrate" in self.refused(tmp_path, "convert", *DIGITS, "-o", tmp_path / "x.ann")

    def test_no_output(self, tmp_path):
        assert "-o" in self.refused(tmp_path, "convert", *DIGITS, *BRIEF, code=2)

    def test_unknown_flag(self, tmp_path):
        said = self.refused(tmp_path, "convert", *DIGITS, "--calibrat", "digits", code=2)
        assert "--calibrate" in said

    def test_bad_values(self, tmp_path):
        for flag, value in (("--input-size", "big"), ("--mean", "a,b"), ("--arch-args", "n"), ("--budget", "soon")):
            assert flag in self.refused(tmp_path, "convert", *DIGITS, flag, value, "-o", tmp_path / "x", code=2)

    @pytest.mark.parametrize("verb", ["distill", "export", "compile", "check", "bench", "report"])
    def test_not_a_folder(self, tmp_path, verb):
        assert "nothing.ann" in self.refused(tmp_path, verb, tmp_path / "nothing.ann")

    def test_fixed_point_is_of_floats_and_needs_instructions(self, converted):
        baseline = ("--fixed16", "--target", "llvm -mcpu=x86-64")
        assert "AVX2" in self.refused(converted.parent, "compile", converted, *baseline)
        for flag in ("--fixed16", "--no-fixed16"):
            self.refused(converted.parent, "compile", converted, flag, "--int8", code=2)

    def test_nothing_to_build_a_library_for(self, converted):
        assert "anncvt export" in self.refused(converted.parent, "compile", converted, "--for", "onnxruntime")
        for flag in (["--int8"], ["--batch", 8]):
            message = self.refused(converted.parent, "compile", converted, "--for", "onnxruntime", *flag, code=2)
            assert "are for TVM" in message
        assert "anncvt quantize" in self.refused(converted.parent, "export", converted, "--int8", "--fuse")

    def test_nothing_to_check(self, converted):
        assert "anncvt export" in self.refused(converted.parent, "check", converted, "--limit", 4)

    def test_nothing_to_run(self, converted, picture):
        args = ["run", converted, "--input", picture, "--backend"]
        assert "anncvt export" in self.refused(converted.parent, *args, "onnxruntime")
        assert "anncvt compile" in self.refused(converted.parent, *args, "tvm")

    def test_picture_that_is_none(self, converted):
        assert "program.json" in self.refused(converted, "run", converted, "--input", converted / "program.json")
        assert "no.png" in self.refused(converted, "run", converted, "--input", "no.png")

    def test_as_json(self, tmp_path):
        result = anncvt("plan", tmp_path / "no.pth", "--json", code=1)
        error = json.loads(result.stdout)["error"]
        assert error["what"] == "no such file" and error["where"] == str(tmp_path / "no.pth") and error["fix"]


class _Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class TestUnforeseen:
    @pytest.fixture(autouse=True)
    def _broken(self, monkeypatch):
        def plan(*args: object, **kwargs: object) -> None:
            raise RuntimeError("the unforeseen")

        monkeypatch.setattr(api, "plan", plan)

    def test_is_one_line_and_how_to_see_more(self):
        said = anncvt("plan", *DIGITS, code=1).stderr
        assert "RuntimeError: the unforeseen" in said and "-v" in said and "Traceback" not in said

    def test_verbose_shows_where(self):
        assert "Traceback" in anncvt("plan", *DIGITS, "-v", code=1).stderr


class TestConfig:
    def test_command_line_wins(self, tmp_path):
        config = tmp_path / "run.toml"
        config.write_text('arch = "digits_net:DigitsNet"\nkeep = ["layer1.*"]\ninput-size = [1, 16, 16]\nmean = 0.5\n')
        planned = answered("plan", WEIGHTS, "-c", config)
        assert planned["totals"]["swapped"] == 5
        planned = answered("plan", WEIGHTS, "-c", config, "--keep", "layer2.conv1")
        assert planned["totals"]["swapped"] == 6

    def test_arguments_and_tables(self, tmp_path):
        torch.save(nn.Conv2d(2, 3, 1).state_dict(), tmp_path / "conv.pth")
        config = tmp_path / "run.toml"
        config.write_text(
            f'model = "{tmp_path / "conv.pth"}"\narch = "torch.nn:Conv2d"\nswap = ["*"]\n'
            "[arch-args]\nin_channels = 2\nout_channels = 3\nkernel_size = 1\n"
        )
        (layer,) = answered("plan", "-c", config)["layers"]
        assert layer["action"] == "swap" and layer["kernel"] == [1, 1]

    def test_one_value_of_what_can_be_repeated(self, tmp_path):
        config = tmp_path / "run.toml"
        for copies in ("copies = 2\n", "copies = [2]\n", '[copies]\n"*" = 2\n'):
            config.write_text(f'keep = "layer1.*"\n{copies}')
            layers = answered("plan", *DIGITS, "-c", config)["layers"]
            assert sum(layer["action"] == "swap" for layer in layers) == 5
            assert {layer["copies"] for layer in layers if layer["action"] == "swap"} == {2}

    def test_unknown_key(self, tmp_path):
        config = tmp_path / "run.toml"
        config.write_text("epoch = 3\n")
        said = anncvt("convert", *DIGITS, "-c", config, code=2).stderr
        assert "'epoch'" in said and "epochs" in said

    def test_bad_value_and_bad_file(self, tmp_path):
        config = tmp_path / "run.toml"
        config.write_text('epochs = "many"\n')
        assert "--epochs" in anncvt("convert", *DIGITS, "-c", config, code=2).stderr
        config.write_text("epochs = ")
        assert "TOML" in anncvt("convert", *DIGITS, "-c", config, code=2).stderr


def test_a_closed_pipe_is_silent(converted):
    command = f"{sys.executable} -m anncvt report -q {converted} | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=converted.parent)
    assert done.stderr == "" and done.stdout == ""


@pytest.mark.parametrize("option", [("--epochs", 2), ("--ema", 0.9), ("--no-augment",)])
def test_options_of_a_training_that_is_not_asked_for_are_refused(tmp_path, option):
    shown = anncvt("convert", *DIGITS, *BRIEF, "-o", tmp_path / "x.ann", *option, code=2).stderr
    assert "is for the training of --distill" in shown and not any(tmp_path.iterdir())


def test_a_network_that_starts_afresh_is_not_calibrated(tmp_path):
    brief = ["--distill", "digits", "--limit", "64", "--batch-size", "32", "--init", "fresh", "--ema", "0.5"]
    done = answered("convert", *DIGITS, *brief, "-o", tmp_path / "x.ann")
    stages = [row["stage"] for row in done["history"]]
    assert "distilled" in stages and "calibrated" not in stages
    config = next(row["metrics"]["config"] for row in done["history"] if row["stage"] == "distilled")
    assert config["init"] == "fresh" and config["ema"] == 0.5
    assert 'init = "fresh"' in (tmp_path / "x.ann" / "train" / "config.toml").read_text()
