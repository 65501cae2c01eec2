"""The package as its users get it: wheel, sdist and editable, used from outside the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"anncvt": ROOT / "anncvt", "anncvt/passes": ROOT / "passes", "anncvt/runtime": ROOT / "runtime"}


def sources() -> set[str]:
    """Every module as a path inside a wheel."""
    found = set()
    for place, folder in ROOMS.items():
        for path in folder.rglob("*.py"):
            inside = path.relative_to(folder)
            if not (place == "anncvt" and inside.parts[0] in ("passes", "runtime")):
                found.add(f"{place}/{inside}")
    return found


def test_every_folder_of_modules_is_a_package():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(listed) == {str(Path(path).parent).replace("/", ".") for path in sources()}


def test_the_links_are_links():
    for name in ("passes", "runtime"):
        assert os.readlink(ROOT / "anncvt" / name) == f"../{name}"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A clean copy, so that building leaves nothing in the real one."""
    folder = tmp_path_factory.mktemp("checkout") / "anncvt"
    names = ("anncvt", "passes", "runtime", "pyproject.toml", "README.md", "LICENSE")
    folder.mkdir()
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory):
    """A wheel and an sdist."""
    output = tmp_path_factory.mktemp("dist")
    for hook in ("build_wheel", "build_sdist"):
        code = f"from setuptools import build_meta; build_meta.{hook}({str(output)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=checkout, check=True, capture_output=True)
    (wheel,), (sdist,) = output.glob("*.whl"), output.glob("*.tar.gz")
    return wheel, sdist


def fresh(folder: Path) -> Path:
    """The interpreter of a new environment that sees the dependencies installed here, but not this package."""
    venv.create(folder)
    (site,) = folder.glob("lib/python*/site-packages")
    here = next(path for path in sys.path if path.endswith("site-packages"))
    # A directory that is merely on the path, so that an editable install in it has no effect.
    (site / "dependencies.pth").write_text(f"{here}\n")
    return folder / "bin" / "python"


def install(python: Path, *what: object) -> None:
    pip = [sys.executable, "-m", "pip", "--python", python, "install"]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--ignore-installed"]
    done = subprocess.run([*pip, *options, *map(str, what)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def used(python: Path, outside: Path) -> str:
    """Import every room from ``outside``; returns where the package is."""
    code = (
        "import anncvt.passes.plan, anncvt.runtime.kernels, anncvt.nn, anncvt.cli, anncvt;"
        "print(anncvt.__file__); print(anncvt.passes.__file__); print(anncvt.runtime.kernels.__file__)"
    )
    done = subprocess.run([python, "-c", code], cwd=outside, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    subprocess.run([python.parent / "anncvt", "--version"], cwd=outside, check=True, capture_output=True)
    return done.stdout


@pytest.mark.slow
def test_contents(built):
    wheel, sdist = built
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert sources() <= inside and {"anncvt/py.typed", "anncvt/page.css"} <= inside
    for folder in ("chip", "ort"):
        assert {f"anncvt/runtime/{folder}/{path.name}" for path in (ROOT / "runtime" / folder).iterdir()} <= inside
    assert not any(name.startswith(("passes/", "runtime/", "tests/")) for name in inside)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"passes/plan.py", "runtime/op.py", "pyproject.toml", "LICENSE", "README.md"} <= names


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_installed(built, checkout, tmp_path, kind):
    python = fresh(tmp_path / "env")
    wheel, sdist = built
    install(python, *{"wheel": [wheel], "sdist": [sdist], "editable": ["-e", checkout]}[kind])
    place = used(python, tmp_path)
    expected = checkout if kind == "editable" else tmp_path / "env"
    assert all(line.startswith(str(expected)) for line in place.splitlines()), place
