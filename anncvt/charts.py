"""Charts as inline SVG: narrow, so that text keeps its size on a phone; colours are the page's CSS classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH = 360
ROW = 33


@dataclass(frozen=True)
class Bar:
    """One row: parts are stacked, each a value and a CSS class (``cnn``, ``adder``, ``integer``, ``memory``)."""

    label: str
    parts: tuple[tuple[float, str], ...]
    shown: str  # at the end of the bar


def bars(rows: Sequence[Bar], title: str) -> str:
    """Horizontal bars under their labels, on one scale from 0."""
    largest = max((sum(value for value, _ in row.parts) for row in rows), default=0) or 1
    room = WIDTH - 78
    drawn = []
    for at, row in enumerate(rows):
        y, x = at * ROW, 0.0
        drawn.append(f'<text class="label" x="0" y="{y + 11}">{escape(_short(row.label, 46))}</text>')
        for value, css in row.parts:
            width = max(0.0, value) / largest * room
            drawn.append(f'<rect class="{css}" x="{x:.1f}" y="{y + 16}" width="{width:.1f}" height="9"/>')
            x += width
        drawn.append(f'<text class="value" x="{x + 6:.1f}" y="{y + 25}">{escape(row.shown)}</text>')
    return svg(drawn, len(rows) * ROW, title)


def histogram(found: dict[str, Any], title: str, css: str) -> str:
    """A distribution (:class:`anncvt.distributions.Distribution` as plain data) with both fits, the better thicker."""
    height, base = 130, 108.0
    low, high, density = found["low"], found["high"], found["density"]
    points = [low + (high - low) * i / 120 for i in range(121)]
    gaussian = [
        math.exp(-(((x - found["mean"]) / found["deviation"]) ** 2) / 2) / (found["deviation"] * math.sqrt(2 * math.pi))
        for x in points
    ]
    laplace = [math.exp(-abs(x - found["median"]) / found["spread"]) / (2 * found["spread"]) for x in points]
    top = max(max(density), min(max(gaussian + laplace), 1.5 * max(density)))
    each = WIDTH / len(density)
    drawn = [
        f'<rect class="{css}" x="{i * each:.1f}" y="{base - value / top * base:.1f}" width="{each - 0.6:.2f}" '
        f'height="{value / top * base:.1f}"/>'
        for i, value in enumerate(density)
    ]
    better = "laplace" if found["laplace"] > found["gaussian"] else "gaussian"
    for name, curve in (("gaussian", gaussian), ("laplace", laplace)):
        path = " ".join(
            f"{i * WIDTH / 120:.1f},{base - min(value / top, 1) * base:.1f}" for i, value in enumerate(curve)
        )
        drawn.append(f'<polyline class="{name}{" better" if name == better else ""}" points="{path}"/>')
    drawn.append(f'<line class="axis" x1="0" y1="{base}" x2="{WIDTH}" y2="{base}"/>')
    drawn.append(f'<text class="value" x="0" y="{height - 6}">{low:.3g}</text>')
    drawn.append(f'<text class="value end" x="{WIDTH}" y="{height - 6}">{high:.3g}</text>')
    return svg(drawn, height, title)


def steps(series: Sequence[tuple[str, str, Sequence[float | None]]], labels: Sequence[str], title: str) -> str:
    """Values over stages: each series a name, a CSS class and a value (or None) for each label."""
    values = [value for _, _, row in series for value in row if value is not None]
    low, high = min(values), max(values)
    margin = max((high - low) * 0.15, 0.5)
    low, high = max(0.0, low - margin), min(100.0, high + margin)
    height, left, base, above = 210, 40, 150.0, 12.0
    apart = (WIDTH - left - 20) / max(1, len(labels) - 1)

    def place(at: int, value: float) -> tuple[float, float]:
        return left + 8 + at * apart, above + (high - value) / (high - low) * (base - above)

    drawn = []
    for mark in (low, (low + high) / 2, high):
        y = place(0, mark)[1]
        drawn.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{WIDTH}" y2="{y:.1f}"/>')
        drawn.append(f'<text class="value end" x="{left - 5}" y="{y + 4:.1f}">{mark:.1f}</text>')
    for at, label in enumerate(labels):
        x = place(at, low)[0]
        drawn.append(
            f'<text class="value end" transform="translate({x + 3:.1f} {base + 14}) rotate(-32)">'
            f"{escape(_short(label, 16))}</text>"
        )
    for name, css, row in series:
        points = [(*place(at, value), value) for at, value in enumerate(row) if value is not None]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
        drawn.append(f'<polyline class="line {css}" points="{path}"/>')
        drawn += [
            f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
            f"<title>{escape(name)} {value:.2f}</title></circle>"
            for x, y, value in points
        ]
    return svg(drawn, height, title)


def svg(drawn: Sequence[str], height: float, title: str) -> str:
    """The drawing at its own aspect ratio, as wide as its place allows; ``title`` is read aloud."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(drawn)}</svg>"
    )


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
