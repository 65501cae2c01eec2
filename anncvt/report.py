"""Tables of what was found, for people; the same figures as plain data, for programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from anncvt.folder import PRODUCTS
from anncvt.measure import accuracy as measured_accuracy
from anncvt.program import LayerPlan, Plan, Program

#: Names of :data:`anncvt.layer_costs.NETWORKS` whose numbers are of one width.
COSTED = {"cnn-fp32": "CNN, 32-bit floats", "adders-fp32": "adders, 32-bit floats", "cnn-int8": "CNN, 8-bit integers"}
ROLES = {"teacher": "teacher (CNN)", "student": "student (adders)", "integer": "integers"}


def accuracy(measured: dict[str, Any]) -> RenderableType:
    """What :func:`anncvt.evaluate` returns."""
    table = _table("network", top1="top-1 %", top5="top-5 %", drop="drop")
    for role in ROLES:
        if role in measured:
            drop = measured["teacher"]["top1"] - measured[role]["top1"]
            shown = "" if role == "teacher" else f"{drop:.2f}"
            name = f"{ROLES[role]}, {measured[role]['bits']} bits" if role == "integer" else ROLES[role]
            table.add_row(name, f"{measured[role]['top1']:.2f}", f"{measured[role]['top5']:.2f}", shown)
    return Group(table, f"{measured['images']} images of {escape(measured['data'])}")


def plan(decided: Plan) -> RenderableType:
    """Every layer with what happens to it and why, and the totals."""
    table = _table("layer", kind=False, output=False, macs="MACs", action=False, norm=False, reason=False)
    for layer in decided.layers:
        table.add_row(
            escape(layer.name or "(the network)"),
            " ".join([layer.kind, "x".join(map(str, layer.kernel))]).strip(),
            "x".join(map(str, layer.out_shape[1:])),
            count(layer.macs),
            f"[green]adder{f' x{layer.copies}' if layer.copies > 1 else ''}[/]" if layer.swapped else "[dim]keep[/]",
            _norm(layer),
            escape(layer.reason),
        )
    return Group(table, *_totals(decided))


def _adders(totals: dict[str, Any]) -> str:
    """``18 of 19 convolutions and 2 of 3 Linear layers``."""
    linear, swapped = totals["linears"], totals["swapped_linears"]
    shown = f"{totals['swapped'] - swapped} of {totals['convolutions']} convolutions"
    return shown + (f" and {swapped} of {linear} Linear layers" if linear else "")


def _norm(layer: LayerPlan) -> str:
    if layer.insert_bn:
        return "[yellow]inserted[/]"
    return "" if layer.bn is None else escape(layer.bn)


def _totals(decided: Plan) -> list[str]:
    totals = decided.totals()
    inserted = sum(layer.insert_bn for layer in decided.layers)
    lines = [
        f"{_adders(totals)} become adders: {totals['swapped_share']:.1%} of {count(totals['macs'])} "
        "multiply-accumulates" + (f" ({count(decided.other_macs)} are in Linear layers)" if decided.other_macs else ""),
        f"an image then takes {count(totals['adds'])} additions and {count(totals['muls'])} multiplications; at 45 nm "
        f"in float32 {count(totals['joules'])}J, the CNN {count(totals['cnn_joules'])}J (arithmetic alone; Horowitz, "
        "ISSCC 2014)",
    ]
    if inserted:
        who = "1 adder gets a BatchNorm of its" if inserted == 1 else f"{inserted} adders get a BatchNorm of their"
        lines.append(f"{who} own, because none follows")
    if decided.memory is not None:
        size, image = decided.memory.fixed, decided.memory.per_image
        lines.append(f"a training step takes about {count(size)}B of memory and {count(image)}B more per image")
    return lines


def parity(result: dict[str, Any]) -> RenderableType:
    """What :func:`anncvt.check` returns."""
    table = _table("backend", max_abs="max |diff|", max_rel="relative", agreement="same top-1 %")
    for name, row in result["backends"].items():
        table.add_row(name, f"{row['max_abs']:.2e}", f"{row['max_rel']:.2e}", f"{row['top1_agreement']:.2f}")
    verdict = "[green]equal to torch[/]" if result["ok"] else "[red]NOT equal to torch[/]"
    return Group(table, f"{verdict} on {result['images']} images of {escape(result['data'])}{_missing(result)}")


def integers(result: dict[str, Any]) -> RenderableType:
    """What :func:`anncvt.quantize` returns, without the accuracy."""
    table = _table("layer", op=False, output=False, scale="scale", zero="zero", bits="bits", width="accumulator bits")
    for row in result["layers"]:
        table.add_row(
            escape(row["name"]),
            row["op"],
            "x".join(map(str, row["shape"])),
            f"{row['scale']:.4g}",
            str(row["zero"]),
            str(row["bits"]),
            str(row.get("accumulator_bits", "")),
        )
    return table


def equality(result: dict[str, Any], *, layers: bool = False) -> RenderableType:
    """What :func:`anncvt.api.check_integers` returns, with ``layers`` one row each."""
    backends = result["backends"]
    if layers:
        table = _table("layer", **dict.fromkeys(backends, False))
        for name in result["layers"]:
            table.add_row(escape(name), *(_verdict(name, row) for row in backends.values()))
    else:
        table = _table("execution", layers="layers equal")
        for name, row in backends.items():
            count = len(row["compared"])
            table.add_row(name, f"{count - len(row['different'])} of {count}")
    verdict = f"{_equal(result['ok'])} to the {result['reference']} reference, bit for bit"
    return Group(table, f"{verdict}, on {result['images']} images of {escape(result['data'])}{_missing(result)}")


def _verdict(layer: str, row: dict[str, Any]) -> str:
    return _equal(layer not in row["different"]) if layer in row["compared"] else ""


def _equal(same: bool) -> str:
    return "[green]equal[/]" if same else "[red]NOT equal[/]"


def latency(result: dict[str, Any]) -> RenderableType:
    """What :func:`anncvt.bench` returns, the fastest first."""
    columns = {"p50": "median ms", "p90": "90% ms", "p99": "99% ms", "rate": "images/s", "memory": "MB"}
    on_cpu = result["settings"].get("device", "cpu") == "cpu"
    ratios = {"ratio": f"of CNN in {'onnxruntime' if on_cpu else 'torch'}", "integers": "of its int8 CNN"}
    table = _table("network", backend=False, dtype=False, **columns, **ratios)
    for row in sorted(result["rows"], key=lambda row: row["p50_ms"]):
        table.add_row(
            ROLES[row["network"]],
            row["backend"],
            row["dtype"],
            *(f"{row[name]:.3f}" for name in ("p50_ms", "p90_ms", "p99_ms")),
            f"{row['images_per_second']:.1f}",
            _known(row["memory_mb"], "{:.0f}"),
            _known(row["ratio"], "{:.2f}x"),
            _known(row["ratio_int8"], "{:.2f}x"),
        )
    first = result["rows"][0]
    return Group(table, f"batch {first['batch']}, threads {first['threads']}{_missing(result)}")


def _known(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def predictions(found: Sequence[dict[str, Any]]) -> RenderableType:
    """What :func:`anncvt.run` returns, one table per picture."""
    shown: list[RenderableType] = []
    for picture in found:
        table = _table("class", probability="%")
        for row in picture["top"]:
            table.add_row(escape(row["class"]), f"{100 * row['probability']:.2f}")
        shown += [Text(picture["input"], overflow="fold"), table]
    return Group(*shown)


def summary(program: Program) -> dict[str, Any]:
    """Where a program stands: source, plan totals, accuracy, stages, files."""
    folder = None if program.folder is None else Path(program.folder)
    return {
        "folder": program.folder,
        "model": program.source.model,
        "arch": program.source.arch,
        "arch_args": program.source.arch_args,
        "input_size": list(program.preprocess.input_size),
        "mean": list(program.preprocess.mean),
        "std": list(program.preprocess.std),
        "stage": program.stage,
        "totals": None if program.plan is None else program.plan.totals(),
        "accuracy": measured_accuracy(program),
        "history": [
            {"stage": record.stage, "seconds": record.seconds, "seed": record.seed, "metrics": record.metrics}
            for record in program.history
        ],
        "files": {} if folder is None else _files(folder),
    }


def program(facts: dict[str, Any]) -> RenderableType:
    """The tables of a :func:`summary`."""
    about = _table("program")
    about.add_column()
    for name in ("folder", "model", "arch", "stage"):
        about.add_row(name, escape(str(facts[name])))
    about.add_row("input", f"{'x'.join(map(str, facts['input_size']))}, mean {facts['mean']}, std {facts['std']}")
    totals = facts["totals"]
    if totals:
        about.add_row("adders", _adders(totals))
        about.add_row("an image takes", f"{count(totals['adds'])} additions, {count(totals['muls'])} multiplications")
        about.add_row("the CNN took", f"{count(totals['macs'])} of each")
    history = _table("stage", seconds="seconds", figures=False)
    for record in facts["history"]:
        history.add_row(record["stage"], f"{record['seconds']:.1f}", escape(_headline(record["metrics"])))
    files = _table("file", size="size")
    for name, size in facts["files"].items():
        files.add_row(escape(name), f"{count(size)}B")
    parts: list[RenderableType] = [about, history, files]
    if facts["accuracy"]:
        parts.insert(1, accuracy(facts["accuracy"]))
    return Group(*parts)


def layers(facts: dict[str, Any]) -> RenderableType:
    """Every layer of a :func:`anncvt.facts.gather`: how it does, and its arithmetic in hardware."""
    table = _table("layer", kind=False, r2="R^2", error="error", weights=False, cnn="CNN int8 uJ", adders="integers uJ")
    inspected = {row["name"]: row for row in facts["layers"]["layers"]}
    networks = facts["costs"]["networks"]
    for cnn, adders in zip(networks["cnn-int8"]["layers"], networks["adders-int"]["layers"], strict=True):
        row = inspected.get(cnn["name"], {})
        weights = row.get("weights")
        table.add_row(
            escape(cnn["name"]),
            adders["kind"],
            *(f"{row[key]:.3f}" if key in row else "" for key in ("r2", "error")),
            "" if not weights else "Laplace" if weights["laplace"] > weights["gaussian"] else "Gaussian",
            f"{cnn['compute_uj']:.3g}",
            f"{adders['compute_uj']:.3g}",
        )
    return table


def energy(found: dict[str, Any]) -> RenderableType:
    """What :func:`anncvt.layer_costs.costs` returns."""
    columns = {"adds": "adds", "muls": "multiplies", "shifts": "shifts", "moved": "bytes moved"}
    table = _table("an image in hardware", **columns, compute="arithmetic uJ", memory="memory uJ")
    for name, row in found["networks"].items():
        table.add_row(
            f"adders, {found['bits']}-bit integers" if name == "adders-int" else COSTED[name],
            *(count(row[key]) for key in ("adds", "multiplies", "shifts")),
            count(row["weight_bytes"] + row["activation_bytes"]),
            f"{row['compute_uj']:.3g}",
            f"{row['memory_uj']:.3g}",
        )
    source = f"{found['table']['name']}: {found['table']['citation']}. Not the energy of a CPU or a GPU."
    return Group(table, escape(source))


def count(number: float) -> str:
    """``41213000`` as ``41.2 M``, ``0.0012`` as ``1.2 m``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1), ("m", 1e-3), ("u", 1e-6), ("n", 1e-9)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if unit else f"{number:g}"
    return f"{number:g}"


def _files(folder: Path) -> dict[str, int]:
    """Bytes of each file (of a folder: of all in it)."""
    sizes = {}
    for entry in sorted(folder.iterdir()):
        if entry.suffix in (".json", ".safetensors") or entry.name in PRODUCTS:
            parts = [part for part in entry.rglob("*") if part.is_file()] if entry.is_dir() else [entry]
            sizes[entry.name] = sum(part.stat().st_size for part in parts)
    return sizes


def _missing(result: dict[str, Any]) -> str:
    return "".join(f"; {escape(name)} {escape(reason)}" for name, reason in result["missing"].items())


def _headline(metrics: dict[str, Any]) -> str:
    """The figures of a stage that fit on a line."""
    shown = []
    for name, value in metrics.items():
        if isinstance(value, dict) and "top1" in value:
            shown.append(f"{name} {value['top1']:.2f}%")
        elif isinstance(value, dict) and "spec" in value:
            shown.append(f"{name} {value['spec']}")
        elif isinstance(value, float):
            shown.append(f"{name} {value:.4g}")
        elif isinstance(value, int | str) and len(str(value)) <= 60:
            shown.append(f"{name} {value}")
    return ", ".join(shown)


def _table(first: str, **columns: str | bool) -> Table:
    """A table whose first column is text; of ``columns`` those with a heading of their own (a string) are figures."""
    table = Table(title_justify="left", header_style="bold")
    table.add_column(first)
    for name, heading in columns.items():
        if isinstance(heading, str):
            table.add_column(heading, justify="right", no_wrap=True)
        else:
            table.add_column(name)
    return table
