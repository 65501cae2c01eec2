"""What other ONNX tools make of an exported file: the table of docs/onnx.md.

    pip install openvino onnxsim onnxslim netron    (and node, for Netron)
    python benchmarks/interoperability.py

A small network is exported in floats and in integers, and every tool is let loose on both files. What comes out is run
in stock onnxruntime (or in the tool, if it runs networks), and the logits are compared with torch's and with those of
the integer reference. The table is written into docs/onnx.md; tests/test_interoperability.py checks that it is current.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import inliner
from torch import Tensor, nn

from anncvt.files import write_text
from anncvt.images import Images
from anncvt.nn import AdderConv2d
from anncvt.passes.quantize import quantize
from anncvt.program import Preprocess, Program, Source
from anncvt.runtime import integer_network
from anncvt.runtime.onnx import export, export_integers, run, session
from anncvt.runtime.onnx_body import DOMAIN

DOCS = Path(__file__).parent.parent / "docs" / "onnx.md"
BEGIN, END = "<!-- written by benchmarks/interoperability.py -->", "<!-- end of what was written -->"
SIZE = (3, 12, 12)
Logits = np.ndarray


class Network(nn.Module):
    """A stem, a residual block of two adders with padding, a classifier: ``[N, 3, 12, 12] -> [N, 5]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.first, self.first_bn = AdderConv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.second_bn = AdderConv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).relu()
        y = self.second_bn(self.second(self.first_bn(self.first(x)).relu()))
        return self.head((x + y).relu().mean((2, 3)))


@dataclass(frozen=True)
class Case:
    """One exported file and what it has to compute.

    Attributes:
        path: by body of the op, "scan" (what export writes) and "one".
        images: ``[2, 3, 12, 12]`` float32.
        logits: ``[2, 5]`` float32.
    """

    path: dict[str, Path]
    images: np.ndarray
    logits: Logits
    exact: bool

    def judge(self, found: Logits) -> str:
        if np.array_equal(found, self.logits):
            return "bit for bit" if self.exact else "same logits"
        difference = np.abs(found.astype(np.float64) - self.logits).max() / np.abs(self.logits).max()
        if difference < 1e-4 and not self.exact:
            return "same logits"
        return "logits within a tenth" if difference < 0.1 else "**wrong logits**"


def cases(folder: Path) -> dict[str, Case]:
    """The network exported into ``folder``: "floats" and "integers"."""
    torch.manual_seed(0)
    student, preprocess = Network(), Preprocess(SIZE, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
    pixels = torch.randint(0, 256, (64, *SIZE), dtype=torch.uint8)
    noise = Images(pixels, None, None, "noise")
    for norm in student.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    with torch.no_grad():
        student(noise.batch(torch.arange(64), preprocess))
        images = noise.batch(torch.arange(2), preprocess)
        logits = student.eval()(images).numpy()
    program = Program(Source("network"), preprocess, nn.Identity(), student, folder=str(folder))
    network = quantize(program, noise)
    integer_network.save(network, folder)
    integers = integer_network.run(network, pixels[:2].numpy()) * np.float32(network.steps[-1].grid.scale)
    paths = {
        name: {body: write(program, folder / f"{name}-{body}.onnx", body=body) for body in ("scan", "one")}
        for name, write in (("floats", export), ("integers", export_integers))
    }
    return {
        "floats": Case(paths["floats"], images.numpy(), logits, False),
        "integers": Case(paths["integers"], images.numpy(), integers, True),
    }


#: From the file to another one.
Rewriting = Callable[[Path, Path, Case], None]
#: From the file to logits, or to nothing where there is nothing to run.
Reading = Callable[[Path, Case], "Logits | None"]


@dataclass(frozen=True)
class Tool:
    """One row of the table.

    Attributes:
        package: what to install.
        apply: what it does to a file. Exactly one of ``rewrite`` and ``read`` is there.
        body: of the file it gets.
        inlined: whether the functions are inlined before.
        remark: what to know, and the work-around where something is wrong.
    """

    name: str
    package: str
    rewrite: Rewriting | None = None
    read: Reading | None = None
    body: str = "scan"
    inlined: bool = False
    remark: str = ""

    @property
    def usable(self) -> bool:
        """Whether the package is installed."""
        try:
            importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return False
        return self.package != "netron" or shutil.which("node") is not None

    def cell(self, case: Case, folder: Path) -> str:
        """What becomes of the op, and of the logits."""
        source = case.path[self.body]
        if self.inlined:
            source = folder / "inlined.onnx"
            onnx.save(inliner.inline_local_functions(onnx.load(case.path[self.body])), source)
        try:
            if self.read is not None:
                found = self.read(source, case)
                return "valid" if found is None else case.judge(found)
            assert self.rewrite is not None
            self.rewrite(source, folder / "after.onnx", case)
        except Exception:  # whatever a tool raises means that it does not take the file
            return "refused"
        model = onnx.load(folder / "after.onnx")
        if not any(node.domain == DOMAIN for node in model.graph.node):
            kept = "inlined"
        elif model.functions:
            kept = "kept"
        else:
            return "kept, **definition dropped**"
        return f"{kept}, {case.judge(run(session(folder / 'after.onnx'), case.images))}"


def _check(path: Path, case: Case) -> None:
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def _reference(path: Path, case: Case) -> Logits:
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(onnx.load(path)).run(None, {"image": case.images})[0]


def _extract(source: Path, target: Path, case: Case) -> None:
    onnx.utils.extract_model(source, target, ["image"], ["logits"])


def _inline(source: Path, target: Path, case: Case) -> None:
    onnx.save(inliner.inline_local_functions(onnx.load(source)), target)


def _convert_version(source: Path, target: Path, case: Case) -> None:
    from onnx import version_converter

    onnx.save(version_converter.convert_version(onnx.load(source), 21), target)


def _with_ir(change: Callable[..., object], source: Path, target: Path, case: Case) -> None:
    """Load, change and save with onnx-ir; a pass returns the model it made."""
    import onnx_ir

    model = onnx_ir.load(source)
    changed = change(model)
    onnx_ir.save(getattr(changed, "model", model), target)


def _tidy(model: object) -> object:
    from onnx_ir.passes import Sequential, common

    return Sequential(
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.DeduplicateInitializersPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.TopologicalSortPass(),
        common.ShapeInferencePass(),
        common.NameFixPass(),
    )(model)


def _inline_pass(model: object) -> object:
    from onnx_ir.passes.common import InlinePass

    return InlinePass()(model)


def _optimize(inline: bool, model: object) -> None:
    import onnxscript.optimizer

    onnxscript.optimizer.optimize(model, inline=inline)


def _convert_ir(model: object) -> None:
    import onnxscript.version_converter

    onnxscript.version_converter.convert_version(model, 21)


def _quantize_static(source: Path, target: Path, case: Case) -> None:
    from onnxruntime import quantization

    class Calibration(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{"image": case.images}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    quantization.quantize_static(source, target, Calibration(), reduce_range=True)


def _quantize_dynamic(source: Path, target: Path, case: Case) -> None:
    from onnxruntime import quantization

    quantization.quantize_dynamic(source, target, reduce_range=True)


def _pre_process(source: Path, target: Path, case: Case) -> None:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(source, target, skip_symbolic_shape=True)


def _float16(source: Path, target: Path, case: Case) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), target)


def _save_optimised(source: Path, target: Path, case: Case) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _onnxsim(source: Path, target: Path, case: Case) -> None:
    import onnxsim

    model, _ = onnxsim.simplify(onnx.load(source))
    onnx.save(model, target)


def _onnxslim(source: Path, target: Path, case: Case) -> None:
    import onnxslim

    onnx.save(onnxslim.slim(onnx.load(source)), target)


def _openvino(path: Path, case: Case) -> Logits:
    import openvino

    model = openvino.Core().read_model(path)
    # It would compute in bfloat16 on processors that have it.
    return np.array(openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(case.images)[0])


def _tvm(fixed: bool, path: Path, case: Case) -> Logits:
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    model = onnx.load(path)
    if fixed:
        import onnxsim

        model, _ = onnxsim.simplify(model, overwrite_input_shapes={"image": list(case.images.shape)})
    module = from_onnx(model, shape_dict={"image": list(case.images.shape)})
    machine = relax.VirtualMachine(tvm.compile(module, tvm.target.Target({"kind": "llvm"})), tvm.cpu())
    return machine["main"](tvm.runtime.tensor(case.images)).numpy()


def _netron(path: Path, case: Case) -> None:
    """Netron's own reader, in Node: it has to find the op's attributes and definition, and the metadata."""
    spec = importlib.util.find_spec("netron")
    assert spec is not None and spec.origin is not None
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(Path(spec.origin).parent, Path(folder, "netron")))
        (copy / "package.json").write_text('{"type": "module"}')
        script = Path(__file__).with_name("netron_reads.mjs")
        done = subprocess.run(["node", script, copy, path], capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    model = onnx.load(path)
    adders = [node for node in model.graph.node if node.domain == DOMAIN]
    assert seen["metadata"] == sorted(entry.key for entry in model.metadata_props)
    assert [node["name"] for node in seen["adders"]] == [node.name for node in adders]
    for node, shown in zip(adders, seen["adders"], strict=True):
        assert shown["attributes"] == sorted(attribute.name for attribute in node.attribute)
        assert shown["definition"] > 0


_onnx = functools.partial(Tool, package="onnx")
_ort = functools.partial(Tool, package="onnxruntime")
_script = functools.partial(Tool, package="onnxscript")
_ir = functools.partial(Tool, package="onnx-ir")
_vino = functools.partial(Tool, package="openvino", read=_openvino)
_relax = functools.partial(Tool, package="apache-tvm")

TOOLS = (
    _onnx("checker (full), strict shape inference", read=_check),
    _onnx("ReferenceEvaluator", read=_reference),
    _ort("InferenceSession", read=lambda path, case: run(session(path), case.images)),
    _onnx("extract_model", rewrite=_extract),
    _onnx("inliner", rewrite=_inline, remark="a runtime with a kernel for the op no longer finds it"),
    _onnx("version_converter", rewrite=_convert_version, remark="export with the `--opset` you need, or inline first"),
    _onnx("version_converter, after inlining", rewrite=_convert_version, inlined=True),
    _ir("load, save", rewrite=functools.partial(_with_ir, lambda model: None)),
    _ir("passes that tidy up", rewrite=functools.partial(_with_ir, _tidy)),
    _ir("InlinePass", rewrite=functools.partial(_with_ir, _inline_pass)),
    _script("optimize", rewrite=functools.partial(_with_ir, functools.partial(_optimize, True)),
            remark="`inline=False` keeps the op"),
    _script("optimize(inline=False)", rewrite=functools.partial(_with_ir, functools.partial(_optimize, False))),
    _script("version_converter", rewrite=functools.partial(_with_ir, _convert_ir)),
    _ort("quantize_static", rewrite=_quantize_static, remark="quantises the layers that were kept, with "
         "`reduce_range=True`, because products of bytes may saturate. For integer adders: `anncvt quantize`"),
    _ort("quantize_dynamic", rewrite=_quantize_dynamic, remark="as above"),
    _ort("convert_float_to_float16", rewrite=_float16, remark="adders in float16"),
    _ort("quant_pre_process(skip_symbolic_shape=True)", rewrite=_pre_process),
    _ort("optimized_model_filepath", rewrite=_save_optimised, remark="the file is for the machine it was made on"),
    Tool("simplify", "onnxsim", rewrite=_onnxsim),
    Tool("slim", "onnxslim", rewrite=_onnxslim),
    _vino("read_model", remark="knows no model-local functions: inline first"),
    _vino("read_model, after inlining", inlined=True, remark="its importer does not take the Scan: `--body one`"),
    _vino("read_model, `--body one`, after inlining", body="one", inlined=True,
          remark="its CPU plugin computes 64-bit integers in 32 bits: not for integers"),
    _relax("from_onnx", read=functools.partial(_tvm, False), remark="knows no model-local functions; `anncvt compile` "
           "is the way to TVM"),
    _relax("from_onnx, `--body one`, inlined and fixed in size by onnxsim", body="one", inlined=True,
           read=functools.partial(_tvm, True), remark="it has no Loop and no ConvInteger"),
    Tool("reader (in Node)", "netron", read=_netron, remark="shows the op with its attributes and definition, and the "
         "metadata"),
)  # fmt: skip


def row(tool: Tool, found: dict[str, Case], folder: Path) -> list[str]:
    """The cells of a tool: package, name, floats, integers, remark."""
    return [tool.package, tool.name, *(tool.cell(found[kind], folder) for kind in ("floats", "integers")), tool.remark]


def documented() -> dict[tuple[str, str], list[str]]:
    """The rows of docs/onnx.md by package and name, the version apart from the package."""
    lines = DOCS.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip().splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {(cells[0].partition(" ")[0], cells[1]): [cells[0].partition(" ")[0], *cells[1:]] for cells in rows}


def table(rows: list[list[str]]) -> str:
    """As Markdown, with versions."""
    lines = ["| package | what | floats | integers | |", "|---|---|---|---|---|"]
    for package, *cells in rows:
        versioned = f"{package} {importlib.metadata.version(package)}"
        lines.append(f"| {' | '.join([versioned, *cells])} |".replace("|  |", "| |"))
    return "\n".join(lines)


def main() -> None:
    missing = sorted({tool.package for tool in TOOLS if not tool.usable})
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        found = cases(Path(folder))
        rows = []
        for tool in TOOLS:
            rows.append(row(tool, found, Path(folder)))
            print(" | ".join(rows[-1]), flush=True)
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    write_text(DOCS, f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
