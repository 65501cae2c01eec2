"""What the texts say can be typed, can be typed."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anncvt.cli import cli

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: Path, fence: str) -> list[str]:
    return re.findall(rf"^```{fence}\n(.*?)^```", text.read_text(), re.MULTILINE | re.DOTALL)


def typed(text: Path, fence: str = "console[^\n]*") -> list[str]:
    """The lines after a prompt."""
    lines = [line for block in blocks(text, fence) for line in block.splitlines()]
    return [line.removeprefix("$ ").partition("#")[0].strip() for line in lines if line.startswith("$ ")]


def calls(text: Path) -> list[list[str]]:
    """Every call of ``anncvt``, in blocks and in running text."""
    inline = re.findall(r"`(anncvt [^`]+)`", text.read_text().replace("\n", " "))
    parts = [part for line in [*typed(text), *inline] for part in line.split("&&")]
    return [shlex.split(part)[1:] for part in parts if part.strip().startswith("anncvt ")]


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_verbs_and_options_exist(text):
    for verb, *arguments in calls(text):
        command = cli.commands[verb]
        known = {name for param in command.params for name in [*param.opts, *param.secondary_opts]}
        given = {argument for argument in arguments if argument.startswith("-")}
        assert given <= known, f"{verb} has no {given - known}"
        if any(not argument.startswith("-") for argument in arguments):
            command.make_context(verb, list(arguments), resilient_parsing=True)


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_targets_exist(text):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wanted = {line.split()[1] for line in typed(text) if line.startswith("make ")}
    assert wanted <= targets


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_links_lead_somewhere(text):
    for target in re.findall(r"\]\(([^)#]+)\)", text.read_text()):
        assert target.startswith("https://") or (text.parent / target).exists(), target


def test_every_verb_is_in_the_table():
    assert set(re.findall(r"^\| `(\w+) ", README.read_text(), re.MULTILINE)) == set(cli.commands)


@pytest.fixture
def examples(tmp_path, picture):
    folder = Path(shutil.copytree(ROOT / "examples", tmp_path / "examples"))
    shutil.copy(picture, folder / "seven.png")
    return folder


@pytest.mark.slow
def test_quick_start_runs(examples):
    commands = typed(README, "console test")
    assert len(commands) >= 5
    script = "set -e\n" + "\n".join(commands)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=examples, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "teacher (CNN)" in done.stdout and "equal to torch" in done.stdout


@pytest.mark.slow
def test_python_example_runs(examples):
    (code,) = blocks(README, "python")
    done = subprocess.run([sys.executable, "-c", code], cwd=examples.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True"


@pytest.mark.slow
def test_demo_runs(examples):
    done = subprocess.run([sys.executable, examples / "demo.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for row in ("teacher (CNN)", "distilled", "onnxruntime against torch", "tvm against torch", "multiplications"):
        assert row in done.stdout
    assert (examples.parent / "out" / "digits.ann" / "model.so").exists()
