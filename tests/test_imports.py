"""The rooms of the house: imports point down only, heavy packages stay where they belong."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"anncvt": ROOT / "anncvt", "anncvt.passes": ROOT / "passes", "anncvt.runtime": ROOT / "runtime"}


def files():
    for package, folder in ROOMS.items():
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder)
            if not (package == "anncvt" and inside.parts[0] in ("passes", "runtime")):
                parts = [p for p in inside.with_suffix("").parts if p != "__init__"]
                yield ".".join([package, *parts]), path


MODULES = dict(files())


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """Every module a file imports, in functions too, but not under ``if TYPE_CHECKING``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & set(MODULES)) | ({str(node.module)} if names - set(MODULES) else set())
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant)}
    return frozenset(found)


def ours(path: Path) -> set[str]:
    return {name for name in imported(path) if name in MODULES}


def outside(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def test_there_are_no_cycles():
    state: dict[str, str] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert state.get(name) != "open", " -> ".join([*trail, name])
        if name not in state:
            state[name] = "open"
            # The package's own __init__ re-exports names lazily; everything is "above" it and "below" it.
            for other in ours(MODULES[name]) - {"anncvt", name}:
                visit(other, (*trail, name))
            state[name] = "done"

    for name in MODULES:
        if name != "anncvt":
            visit(name, ())


#: Compiles whole networks, so it knows the op; the other kernels are what the op is made of.
NETWORK = "anncvt.runtime.kernels.network"
#: From the top down; a module may import from its own floor and from those below.
FLOORS = [
    {"anncvt.cli", "anncvt.__main__"},
    {"anncvt.api"},
    {"anncvt.shipping"},
    {"anncvt.precision"},
    {"anncvt.arguments"},
    {"anncvt.page"},
    {"anncvt.facts", "anncvt.quantization"},
    {"anncvt.report", "anncvt.pkkd", "anncvt.pipeline"},
    {name for name in MODULES if name.startswith("anncvt.distillation.") and not name.endswith(".config")},
    {
        "anncvt.runtime.onnx",
        "anncvt.runtime.onnx_session",
        "anncvt.runtime.onnx_native",
        "anncvt.runtime.onnx_fuse",
        "anncvt.runtime.check",
        "anncvt.runtime.check_integers",
        "anncvt.runtime.bench",
        "anncvt.runtime.contestants",
        "anncvt.runtime.tvm",
        NETWORK,
    },
    {name for name in MODULES if name.startswith("anncvt.passes")},
    {"anncvt.folder"},
    {"anncvt.loading", "anncvt.data"},
    {"anncvt.program"},
    {"anncvt.nn"},
    {"anncvt.runtime.op"},
    {name for name in MODULES if name.startswith("anncvt.runtime.kernels")} - {NETWORK},
]
LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}


def below(name: str, seen: set[str]) -> set[str]:
    """Everything a module imports, directly or not."""
    for other in ours(MODULES[name]) - {"anncvt"} - seen:
        seen.add(other)
        below(other, seen)
    return seen


@pytest.mark.parametrize("name", sorted(set(LEVEL) & set(MODULES)))
def test_imports_point_down(name):
    upward = {other for other in below(name, set()) if LEVEL.get(other, LEVEL[name]) < LEVEL[name]}
    assert not upward


@pytest.mark.parametrize("name", [n for n in sorted(MODULES) if n.startswith("anncvt.passes")])
def test_passes_know_no_front_end_and_no_back_end(name):
    everything = set().union(*(outside(MODULES[m]) for m in below(name, {name}) if m.startswith("anncvt.passes")))
    assert not everything & {"click", "rich", "onnx", "onnxruntime", "onnxscript", "tvm"}


def test_only_the_kernels_and_the_compiler_import_tvm():
    users = {name for name, path in MODULES.items() if "tvm" in outside(path)}
    assert users and all(n == "anncvt.runtime.tvm" or n.startswith("anncvt.runtime.kernels") for n in users)


def test_the_package_itself_is_light():
    heavy = "{'torch', 'onnx', 'onnxruntime', 'tvm', 'click', 'rich', 'numpy'}"
    code = f"import sys, anncvt, anncvt.progress, anncvt.errors; print(sorted({heavy} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"
