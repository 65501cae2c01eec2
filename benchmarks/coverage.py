"""Convert every architecture of torchvision and some of every timm family, with random weights; write docs/coverage.md.

    python benchmarks/coverage.py                       # goes on where an earlier run stopped
    python benchmarks/coverage.py --shapes              # quickly: everything but the runs on real numbers
    python benchmarks/coverage.py --only 'timm:resnet*' --again
    python benchmarks/coverage.py --table               # the document alone, from what was measured

Every network is planned, rewritten (which runs it in both modes on shapes alone and compares what was kept), saved and
opened again by its name, then run on real numbers in eval and in training mode; some are exported to ONNX. One JSON
line per network goes to out/coverage.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import functools
import json
import os
import select
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anncvt  # noqa: F401  (before torch: it sets the environment of the thread pools)

# isort: split
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from anncvt import folder, zoo
from anncvt.errors import AnncvtError
from anncvt.loading import load
from anncvt.nn import _AdderNd
from anncvt.passes.choice import Choice
from anncvt.passes.observe import observe_outline
from anncvt.passes.plan import plan
from anncvt.passes.rewrite import rewrite
from anncvt.passes.verify import trouble_in_training
from anncvt.preprocess import choose_preprocess
from anncvt.program import Program, Source

ROOT = Path(__file__).parent.parent
OUT = ROOT / "out"
ROWS, NAMES, DOCUMENT = OUT / "coverage.jsonl", OUT / "coverage-names.json", ROOT / "docs" / "coverage.md"
#: Larger networks are left out: they are built like smaller ones of their family.
LARGEST = 150e6
#: Where a network takes several sizes, the smallest of these that it runs at in both modes.
SIDES = (64, 96, 128, 160, 192, 224)
SECONDS = 900
#: One network in so many is exported to ONNX as well.
EXPORTED = 8


def architectures() -> list[str]:
    """torchvision's image, segmentation and video networks, then of each timm family the smallest and a middle one."""
    zoo.import_torchvision()
    from torchvision import models

    kinds = {name: models.get_model_builder(name).__module__.split(".")[2] for name in models.list_models()}
    chosen = [f"torchvision:{n}" for n, k in kinds.items() if k not in ("detection", "quantization", "optical_flow")]
    timm = zoo.import_timm()
    middle = []
    for family in timm.list_modules():
        sizes = {name: _parameters(name) for name in timm.list_models(module=family) if not name.startswith("test_")}
        ranked = sorted((size, name) for name, size in sizes.items() if size is not None)
        if ranked:
            chosen.append(f"timm:{ranked[0][1]}")
            usual = [entry for entry in ranked if entry[0] <= LARGEST / 3]
            middle += [f"timm:{usual[len(usual) // 2][1]}"] if len(usual) > 1 else []
    return list(dict.fromkeys(chosen + middle))


def _parameters(name: str) -> int | None:
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in zoo.build("timm", name, {}).parameters())
    except Exception:  # a few constructors look at values
        return None


def examine(name: str, *, run: bool = True) -> dict[str, Any]:
    """Convert one network and say how far it went: ``status`` is converted, refused, left out or failed.

    Args:
        run: on real numbers, too.
    """
    begin = time.monotonic()
    row: dict[str, Any] = {"model": name, "status": "failed"}
    try:
        row |= _examine(name, row, run)
    except AnncvtError as error:
        row |= {"status": "refused", "reason": error.what}
    except Exception as error:
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    return row | {"seconds": round(time.monotonic() - begin, 1)}


def _examine(name: str, row: dict[str, Any], run: bool) -> dict[str, Any]:
    collection, _, model = name.partition(":")
    row["step"] = "build"
    torch.manual_seed(0)
    network = zoo.build(collection, model, {})
    row["parameters"] = parameters = sum(p.numel() for p in network.parameters())
    if parameters > LARGEST:
        return {"status": "left out", "reason": f"more than {LARGEST / 1e6:.0f} M parameters"}
    row["step"] = "size"
    size = choose_preprocess(network, name).input_size
    size = _affordable(network, size) if run else size
    row["input"] = list(size)
    row["step"] = "plan"
    program = load(network, input_size=size)
    program.source = Source(name, name)
    try:
        planned = plan(program)
    except AnncvtError as error:
        return {"status": "refused", "reason": error.what} | _with_linear(program)
    totals = planned.plan.totals()
    row |= {key: totals[key] for key in ("convolutions", "swapped", "swapped_share")}
    row["inserted"] = sum(layer.insert_bn for layer in planned.plan.layers)
    kept = {layer.reason.partition(";")[0].partition(" (")[0] for layer in planned.plan.layers if not layer.swapped}
    row["kept"] = sorted(kept)
    row["step"] = "rewrite"
    done = rewrite(planned)
    row["step"] = "save and open"
    _stored(done)
    if run:
        row["step"] = "kept layers"
        row["equal"] = _equal_before_the_first_adder(done)
        row["step"] = "run"
        images = torch.rand(2, *size)
        _run(done.student, images)
        row["run"] = True
        if zlib.crc32(name.encode()) % EXPORTED == 0:
            row["step"] = "onnx"
            row |= _exported(done, images)
    del row["step"]
    return {"status": "converted"} | (_with_linear(program) if totals["swapped_share"] < 0.5 else {})


def _affordable(network: nn.Module, stated: tuple[int, ...]) -> tuple[int, ...]:
    """The smallest usual size that the network takes in both modes, at most the stated one."""
    cfg = getattr(network, "pretrained_cfg", {})
    channels, *spatial = stated
    frames = spatial[:-2]
    sides = () if isinstance(cfg, dict) and cfg.get("fixed_input_size") else SIDES
    for side in sides:
        size = (channels, *frames, side, side)
        if side < min(spatial[-2:]):
            with contextlib.suppress(AnncvtError):
                observe_outline(network, size)
                if trouble_in_training(network, size) is None:
                    return size
    return stated


@torch.no_grad()
def _run(network: nn.Module, images: Tensor) -> None:
    """Run it in training mode, then in eval mode, where each norm first takes the statistics of what it reads.

    Random adders lead out of all bounds without them. Those of the training pass will not do: a rounding apart, they
    move all outputs of the adders behind them the same way, and deep networks end at zero.
    """
    _tensors(network.train()(images))
    _tensors(with_statistics(network.eval(), images))


@torch.no_grad()
def with_statistics(network: nn.Module, images: Tensor) -> Any:
    """What ``network`` (in eval mode) returns where each norm first takes the statistics of what it reads."""
    handles = [m.register_forward_pre_hook(_take_statistics) for m in network.modules() if isinstance(m, _BatchNorm)]
    try:
        return network(images)
    finally:
        for handle in handles:
            handle.remove()


def _take_statistics(norm: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
    if norm.running_mean is not None and norm.running_var is not None:
        values = inputs[0].transpose(0, 1).flatten(1)
        norm.running_mean.copy_(values.mean(1))
        norm.running_var.copy_(values.var(1, unbiased=False))


def _tensors(output: Any) -> list[Tensor]:
    """Those in what a network returned, which must be finite."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    if not all(bool(torch.isfinite(leaf).all()) for leaf in leaves):
        raise ValueError("the output is not finite")
    return leaves


@torch.no_grad()
def _equal_before_the_first_adder(program: Program) -> int:
    """Convolutions that run before an adder does give the CNN's output, to the bit; returns how many there are."""
    image = torch.rand(1, *program.preprocess.input_size)
    seen: list[dict[str, tuple[Tensor, Tensor]]] = []
    for network in (program.teacher, program.student):
        passed: dict[str, tuple[Tensor, Tensor]] = {}
        handles = [
            module.register_forward_hook(functools.partial(_note, passed, name))
            for name, module in network.named_modules()
            if isinstance(module, _ConvNd)
        ]
        handles += [
            adder.register_forward_pre_hook(_stop) for adder in network.modules() if isinstance(adder, _AdderNd)
        ]
        with torch.random.fork_rng(devices=[]), contextlib.suppress(_Stop):
            network(image)
        for handle in handles:
            handle.remove()
        seen.append(passed)
    equal = 0
    for name, (given, made) in seen[1].items():
        before, wanted = seen[0][name]
        if torch.equal(before, given):
            if not torch.equal(wanted, made):
                raise ValueError(f"{name} was kept and computes something else")
            equal += 1
    return equal


class _Stop(Exception):
    """Enough was seen."""


def _stop(*arguments: Any) -> None:
    raise _Stop


def _note(
    passed: dict[str, tuple[Tensor, Tensor]], name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    passed.setdefault(name, (inputs[0].clone(), output.clone()))


def _stored(program: Program) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder.save(program, Path(place) / "x.ann")
        opened = folder.open_folder(Path(place) / "x.ann")
    if opened.plan != program.plan:
        raise ValueError("the plan is another after opening")
    for mine, other in ((program.teacher, opened.teacher), (program.student, opened.student)):
        theirs = other.state_dict()
        for key, value in mine.state_dict().items():
            if not torch.equal(value, theirs[key]):
                raise ValueError(f"{key} is another after opening")


@torch.no_grad()
def _exported(program: Program, images: Tensor) -> dict[str, Any]:
    """Whether it can be exported, and how far onnxruntime's outputs are from torch's then (of the largest output).

    Args:
        images: those that its norms fit; other ones, behind random adders, may leave every output at zero.
    """
    from anncvt.runtime import check, onnx

    assert program.student is not None
    with tempfile.TemporaryDirectory() as place:
        try:
            session = onnx.session(onnx.export(program, Path(place) / "x.onnx"), threads=1, library="none")
        except AnncvtError as error:
            return {"onnx": f"refused: {error}"}
        found = torch.from_numpy(onnx.run(session, images.numpy()))
    network = program.student.eval()
    wanted, moved = (_tensors(network(x))[0] for x in (images, images * (1 + 1e-6)))
    difference, rounding = (((y - wanted).abs().max() / wanted.abs().max()).item() for y in (found, moved))
    # Deep networks with random adders blow rounding up.
    if not difference < max(check.TOLERANCE, 10 * rounding):
        raise ValueError(f"onnxruntime differs from torch by {difference:.1e} of the largest output")
    return {"onnx": "exported", "onnx_difference": difference}


def _with_linear(program: Program) -> dict[str, Any]:
    """What --linear reaches."""
    try:
        done = rewrite(plan(program, Choice(linear=True)))
    except AnncvtError as error:
        return {"linear": f"refused: {error.what}"}
    return {"linear": done.plan.totals()["swapped_share"]}


def measured() -> dict[str, dict[str, Any]]:
    """The last row of every network."""
    if not ROWS.exists():
        return {}
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    return {row["model"]: row for row in rows}


def _names() -> list[str]:
    if not NAMES.exists():
        print("choosing architectures (some minutes)", file=sys.stderr)
        OUT.mkdir(exist_ok=True)
        NAMES.write_text(json.dumps(architectures()), encoding="utf-8")
    return json.loads(NAMES.read_text(encoding="utf-8"))


class _Worker:
    """A process that examines one network after the other; a new one after a crash or a timeout."""

    def __init__(self, *options: str) -> None:
        self.options = options
        self.process: subprocess.Popen[str] | None = None

    def examine(self, name: str) -> dict[str, Any]:
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, __file__, "--worker", *self.options]
            # Thousands of shapes, each run a few times: compiling kernels for them would take hours.
            environment = {"ANNCVT_KERNELS": "torch", **os.environ}
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        ready = self._answers()
        line = self.process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        self.process.kill()
        self.process.wait()
        reason = "the process died" if ready else f"not done after {SECONDS} s"
        return {"model": name, "status": "failed", "reason": reason, "seconds": SECONDS}

    def _answers(self) -> bool:
        """Whether it does within the time, counted second by second: while everything is stopped, none goes by."""
        assert self.process is not None
        return any(select.select([self.process.stdout], [], [], 1)[0] for _ in range(SECONDS))


def _work(run: bool) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what networks print does not belong between the rows
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    for line in sys.stdin:
        print(json.dumps(examine(line.strip(), run=run)), file=out, flush=True)


def document(rows: dict[str, dict[str, Any]], missing: list[str]) -> str:
    """docs/coverage.md, from the rows of what was measured and the names of what was not."""
    from importlib.metadata import version

    lines = [
        "# Coverage",
        "",
        "Generated by `make coverage` (`benchmarks/coverage.py`): every image, segmentation and video architecture of "
        f"torchvision {version('torchvision')} and, of each family of timm {version('timm')}, the smallest and a "
        f"middle one, with random weights, torch {version('torch')}.",
        "",
        "*Converted* means: planned and rewritten with the default policy; the adder network's shapes are the CNN's in "
        "eval and training mode (on torch's meta device, where its Python allows that); kept layers hold the CNN's "
        "values; the program was saved and opened again by name with equal tensors. *Run* means besides: finite "
        "outputs on real numbers in training mode, and in eval mode with norms that fit those "
        "images; kept layers before the first adder give the CNN's outputs to the bit. *Refused* means: an error that "
        "says why, nothing was changed. None of it says anything about accuracy.",
        "",
        "| collection | architectures | converted | of these run | refused | left out | failed |",
        "|---|---|---|---|---|---|---|",
    ]
    for collection in zoo.ZOOS:
        mine = [row for row in rows.values() if row["model"].startswith(collection + ":")]
        counts = [sum(row["status"] == status for row in mine) for status in _STATUSES]
        counts.insert(1, sum("run" in row for row in mine))
        lines.append(f"| {collection} | {len(mine)} | " + " | ".join(map(str, counts)) + " |")
    exported = [row["onnx"] for row in rows.values() if "onnx" in row]
    apart = [row["onnx_difference"] for row in rows.values() if "onnx_difference" in row]
    lines += [
        "",
        f"Exported to ONNX: {exported.count('exported')} of a sample of {len(exported)} converted networks. Of "
        f"{len(apart)} run by onnxruntime, as their definition in standard operators, "
        f"{sum(x < 1e-3 for x in apart)} give torch's outputs to a thousandth of the largest, the others to ten "
        "times what a change of the image by a millionth does.",
    ]
    lines += [f"- {row['model']}: {row['onnx']}" for row in rows.values() if row.get("onnx", "exported") != "exported"]
    if missing:
        lines += ["", f"Chosen and not measured yet: {', '.join(missing)}."]
    for status, title in (("failed", "Failed"), ("refused", "Refused"), ("left out", "Left out")):
        chosen = [row for row in rows.values() if row["status"] == status]
        lines += ["", f"## {title}", ""]
        if not chosen:
            lines.append("None.")
            continue
        lines += ["| architecture | reason | share of the MACs with `--linear` |", "|---|---|---|"]
        for row in chosen:
            step = f" (at: {row['step']})" if status == "failed" and "step" in row else ""
            lines.append(f"| {row['model']} | {_cell(row['reason'])}{step} | {_linear(row)} |")
    lines += [
        "",
        "## Converted",
        "",
        "Share: of the multiply-accumulates (Linear layers included) in layers that become adders. Inserted: adders "
        "that get a BatchNorm of their own. MACs of attention products are not counted. What ran was run at the "
        "smallest of some usual input sizes that the network takes; *training*: all but the run in eval mode was done.",
        "",
        "| architecture | M parameters | input | run | adders | share | inserted | share with `--linear` | kept |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        if row["status"] == "converted":
            lines.append(_converted(row))
    return "\n".join(lines) + "\n"


def _converted(row: dict[str, Any]) -> str:
    kept = [reason.partition(":")[0] if reason.startswith(_ROLES) else reason for reason in row["kept"]]
    cells = [
        row["model"],
        f"{row['parameters'] / 1e6:.1f}",
        "x".join(map(str, row["input"])),
        "yes" if "run" in row else "training" if "equal" in row else "no",
        f"{row['swapped']} of {row['convolutions']}",
        f"{row['swapped_share']:.0%}",
        str(row["inserted"]),
        _linear(row),
        _cell("; ".join(kept)),
    ]
    return f"| {' | '.join(cells)} |"


_STATUSES = ("converted", "refused", "left out", "failed")
_ROLES = ("stem", "classifier", "gate")


def _linear(row: dict[str, Any]) -> str:
    value = row.get("linear")
    return "" if value is None else f"{value:.0%}" if isinstance(value, float) else _cell(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _chosen(only: list[str], again: bool, run: bool) -> Iterator[str]:
    done = {
        name
        for name, row in measured().items()
        if not again and not (run and row["status"] == "converted" and "run" not in row)
    }
    for name in _names():
        if name not in done and (not only or any(fnmatch.fnmatchcase(name, pattern) for pattern in only)):
            yield name


def main() -> int:
    """Examine what is missing, then write the document; exit code 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="GLOB", action="append", default=[], help="architectures (repeatable)")
    parser.add_argument("--shapes", action="store_true", help="leave out the runs on real numbers")
    parser.add_argument("--again", action="store_true", help="also those that were measured already")
    parser.add_argument("--table", action="store_true", help="write docs/coverage.md and examine nothing")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(not options.shapes)
        return 0
    if not options.table:
        worker = _Worker(*["--shapes"] * options.shapes)
        for name in _chosen(options.only, options.again, not options.shapes):
            row = worker.examine(name)
            with open(ROWS, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{row['status']:9} {row['seconds']:6.1f} s  {name}  {row.get('reason', '')}", flush=True)
    found = measured()
    names = _names()
    rows = {name: found[name] for name in names if name in found}
    DOCUMENT.write_text(document(rows, [name for name in names if name not in found]), encoding="utf-8")
    return int(any(row["status"] == "failed" for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
