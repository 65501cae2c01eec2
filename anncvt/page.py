"""A report as one HTML file: no scripts, nothing from the network, light and dark, narrow and wide."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from anncvt import charts
from anncvt.charts import Bar
from anncvt.folder import INTEGER
from anncvt.report import COSTED, ROLES, count

STYLE = Path(__file__).with_name("page.css")
CLASSES = {"teacher": "cnn", "student": "adder", "integer": "integer"}
NETWORKS = {"cnn-fp32": "cnn", "adders-fp32": "adder", "cnn-int8": "cnn", "adders-int": "integer"}


def page(facts: dict[str, Any]) -> str:
    """The document.

    Args:
        facts: of :func:`anncvt.facts.gather`.
    """
    title = f"{facts['name']}: an adder network"
    sections = (_head(facts), _accuracy(facts), _fidelity(facts), _distributions(facts), _energy(facts))
    body = "".join((*sections, _latency(facts), _plan(facts), _history(facts)))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>"
        f"<body>{body}</body></html>\n"
    )


def _head(facts: dict[str, Any]) -> str:
    size = "×".join(map(str, facts["input_size"]))
    totals, measured = facts["totals"], {**(facts["accuracy"] or {}), **_integers(facts)}
    tiles = [
        (f"{measured[role]['top1']:.2f}%", f"top-1, {_role(role, measured[role])}")
        for role in ROLES
        if role in measured
    ]
    if totals:
        tiles.append((f"{totals['swapped_share']:.1%}", f"of {count(totals['macs'])} multiply-adds are adders"))
        tiles.append((f"{totals['swapped']} / {totals['convolutions']}", "convolutions became adders"))
    shown = "".join(f'<div class="tile"><b>{escape(b)}</b><span>{escape(s)}</span></div>' for b, s in tiles)
    arch = f"{facts['arch']}, " if facts["arch"] else ""
    about = f"{arch}input {size}, stage: {facts['stage']}"
    return f'<h1>{escape(facts["name"])}</h1><p>{escape(about)}</p><div class="tiles">{shown}</div>'


def _integers(facts: dict[str, Any]) -> dict[str, Any]:
    """The accuracy of the integer network, if there is one and it was measured."""
    found = [record["metrics"] for record in facts["history"] if record["stage"] == "quantized"]
    there = INTEGER[0] in facts["files"] and found and "integer" in found[-1]
    return {"integer": found[-1]["integer"]} if there else {}


def _role(role: str, row: dict[str, Any]) -> str:
    return f"{ROLES[role]}, {row['bits']} bits" if "bits" in row else ROLES[role]


def _accuracy(facts: dict[str, Any]) -> str:
    """Top-1 after every stage that was measured."""
    found = [
        (record["stage"] if record["stage"] != "evaluated" else record["metrics"]["of"], record["metrics"])
        for record in facts["history"]
        if "images" in record["metrics"] and any("top1" in record["metrics"].get(role, {}) for role in CLASSES)
    ]
    if not found:
        return ""
    most = max(metrics["images"] for _, metrics in found)
    drawn = [(stage, metrics) for stage, metrics in found if metrics["images"] == most]
    series: list[tuple[str, str, list[float | None]]] = []
    for role, css in CLASSES.items():
        row = [metrics[role]["top1"] if role in metrics else None for _, metrics in drawn]
        if any(value is not None for value in row):
            series.append((ROLES[role], css, row))
    chart = charts.steps(series, [_stage(*record) for record in drawn], "Top-1 accuracy in percent after each stage")
    rows = [
        [_stage(stage, m), *(f"{m[role]['top1']:.2f}" if role in m else "" for role in CLASSES), str(m["images"])]
        for stage, m in found
    ]
    table = _table(["after", "CNN", "adders", "integers", "images"], rows)
    key = _key([(name, css) for name, css, _ in series])
    text = f"Top-1 in percent on test images. The chart has what was measured on {most} images, the table everything."
    return _section("Accuracy", text, f'{key}<div class="cards"><div class="card">{chart}</div></div><p></p>{table}')


def _stage(stage: str, metrics: dict[str, Any]) -> str:
    return f"{stage}, {metrics['bits']} bits" if "bits" in metrics else stage


def _fidelity(facts: dict[str, Any]) -> str:
    rows = [row for row in facts["layers"]["layers"] if "r2" in row]
    if not rows:
        return ""
    drawn = [Bar(row["name"], ((max(0.0, row["r2"]), "adder"),), f"{row['r2']:.3f}") for row in rows]
    errors = [Bar(row["name"], ((row["error"], "adder"),), f"{row['error']:.3g}") for row in rows]
    text = (
        "Every adder layer against the convolution it replaces, after BatchNorm, its input being what the adder network"
        f" computes before it, on {facts['layers']['images']} images. R² is the share of the convolution's variance"
        " that the adder explains; 1 is all of it."
    )
    cards = "".join(_chunks("R²", drawn)) + "".join(_chunks("Root mean square error", errors))
    return _section("Layers against the CNN", text, f'<div class="cards">{cards}</div>')


def _chunks(title: str, rows: Sequence[Bar], most: int = 20) -> Iterable[str]:
    """Cards of at most so many bars."""
    for at in range(0, len(rows), most):
        name = title if len(rows) <= most else f"{title}, layers {at + 1} to {min(at + most, len(rows))}"
        yield _card(name, charts.bars(rows[at : at + most], name))


def _distributions(facts: dict[str, Any]) -> str:
    overall = [
        _histogram(name, found, "cnn" if name.startswith("CNN") else "adder")
        for name, found in facts["layers"]["overall"].items()
        if found
    ]
    each = [
        _histogram(f"{row['name']}, {what}", row[what], "adder")
        for row in facts["layers"]["layers"]
        for what in ("weights", "activations")
        if row.get(what)
    ]
    if not overall:
        return ""
    text = (
        "Bars: the values. Long dashes: the Laplace distribution that fits best, dots: the Gaussian; the likelier is "
        "thicker. AdderNet (arXiv 1912.13200) finds trained adder weights Laplace-distributed and a CNN's Gaussian. "
        "First all layers together, each at mean 0 and deviation 1; then weights and outputs before BatchNorm, layer "
        "by layer."
    )
    cards = f'<div class="cards">{"".join(overall)}</div>'
    if each:
        cards += f'<details><summary>Every layer</summary><div class="cards">{"".join(each)}</div></details>'
    return _section("Distributions", text, cards)


def _histogram(name: str, found: dict[str, Any], css: str) -> str:
    gap = found["laplace"] - found["gaussian"]
    verdict = f"{'Laplace' if gap > 0 else 'Gaussian'} by {abs(gap):.3f} nats a value"
    return _card(name, charts.histogram(found, f"{name}: {verdict}", css), verdict)


def _energy(facts: dict[str, Any]) -> str:
    found = facts["costs"]
    if not found:
        return ""
    integers = f"adders, {found['bits']}-bit integers"
    names = {name: (COSTED.get(name, integers), css) for name, css in NETWORKS.items()}
    drawn = []
    for name, (text, css) in names.items():
        row = found["networks"][name]
        compute, memory = row["compute_uj"], row["memory_uj"]
        shown = f"{compute:.3g} + {memory:.3g}"
        drawn.append(Bar(text, ((compute, css), (memory, "memory")), shown))
    rows = [
        [
            names[name][0],
            *(count(row[key]) for key in ("adds", "multiplies", "shifts")),
            *(f"{count(row[key])}B" for key in ("weight_bytes", "activation_bytes")),
            *(f"{row[key]:.3g}" for key in ("compute_uj", "memory_uj")),
        ]
        for name, row in found["networks"].items()
    ]
    compute = [
        Bar(
            row["name"],
            ((row["compute_uj"], "integer" if row["kind"] == "adder" else "cnn"),),
            f"{row['compute_uj']:.3g}",
        )
        for row in found["networks"]["adders-int"]["layers"]
    ]
    head = ["network", "adds", "multiplies", "shifts", "weights", "feature maps", "compute µJ", "memory µJ"]
    text = (
        f"Counted for dedicated hardware, one image, with the energies of {found['table']['name']} "
        f"({found['table']['citation']}). On a CPU or a GPU an adder network saves no energy. Memory: every layer's "
        "weights, input and output are moved once."
    )
    key = _key([("arithmetic of CNN", "cnn"), ("of adders", "adder"), ("of integers", "integer"), ("memory", "memory")])
    cards = _card("Energy of an image in µJ: arithmetic + memory", charts.bars(drawn, "Energy of an image"))
    cards += "".join(_chunks("Arithmetic of each layer in µJ, integers", compute))
    return _section("Operations and energy", text, f'{key}<div class="cards">{cards}</div><p></p>{_table(head, rows)}')


def _latency(facts: dict[str, Any]) -> str:
    found = facts["bench"]
    if not found:
        return ""
    drawn = [
        Bar(
            f"{ROLES[row['network']]}, {row['backend']}, {row['dtype']}",
            ((row["p50_ms"], "integer" if row["dtype"] == "int8" else CLASSES[row["network"]]),),
            shown,
        )
        for row in sorted(found["rows"], key=lambda row: row["p50_ms"])
        for shown in (f"{row['p50_ms']:.3g} ms",)
    ]
    first = found["rows"][0]
    text = f"Median of a call, batch {first['batch']}, threads {first['threads']}."
    return _section("Latency", text, f'<div class="cards">{_card("One call", charts.bars(drawn, "Latency"))}</div>')


def _action(layer: dict[str, Any]) -> str:
    copies = layer.get("copies", 1)
    return "keep" if layer["action"] != "swap" else "adder" if copies == 1 else f"adder ×{copies}"


def _plan(facts: dict[str, Any]) -> str:
    if not facts["plan"]:
        return ""
    rows = [
        [
            layer["name"],
            f"{layer['kind']} {'×'.join(map(str, layer['kernel']))}",
            "×".join(map(str, layer["out_shape"][1:])),
            _action(layer),
            *(count(layer[key]) for key in ("macs", "adds", "muls")),
            layer["reason"],
        ]
        for layer in facts["plan"]["layers"]
    ]
    head = ["layer", "kind", "output", "action", "MACs", "adds", "muls", "reason"]
    return _section("Plan", "What became of every convolution, and why.", _table(head, rows))


def _history(facts: dict[str, Any]) -> str:
    rows = [
        [record["stage"], f"{record['seconds']:.1f}", "" if record["seed"] is None else str(record["seed"])]
        for record in facts["history"]
    ]
    return _section("History", "Every stage that was run.", _table(["stage", "seconds", "seed"], rows))


def _section(title: str, text: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{content}</section>"


def _card(title: str, content: str, note: str = "") -> str:
    tail = f'<div class="key">{escape(note)}</div>' if note else ""
    return f'<div class="card"><h3>{escape(title)}</h3>{content}{tail}</div>'


def _key(entries: Iterable[tuple[str, str]]) -> str:
    shown = "".join(f'<span><i class="{css}"></i>{escape(name)}</span>' for name, css in entries)
    return f'<div class="key">{shown}</div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    figures = [
        bool(rows) and all(not row[at] or row[at].lstrip("-")[:1].isdigit() for row in rows) for at in range(len(head))
    ]

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' if n else ''}>{escape(cell)}</{tag}>" for cell, n in zip(row, figures, strict=True)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{cells("th", head)}</tr>{body}</table></div>'
