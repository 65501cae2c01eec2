"""Convert the bundled digits CNN from beginning to end and show what came out.

    python examples/demo.py            # or: make demo

Calibrates and distils on scikit-learn's digits, exports to ONNX, compiles with TVM, compares the three backends and
times them against the CNN. The program folder stays in out/digits.ann.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import anncvt
from anncvt.measure import accuracy
from anncvt.program import Program
from anncvt.report import count
from anncvt.terminal import reporter

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parent / "out" / "digits.ann"


def main() -> None:
    begin = time.monotonic()
    # The architecture is a .py file beside the weights; the network takes 16x16 grey pixels, (x / 255 - 0.5) / 0.5.
    with reporter() as progress:
        program = anncvt.convert(
            HERE / "digits_net.safetensors",
            arch="digits_net:DigitsNet",
            input_size=(1, 16, 16),
            mean=(0.5,),
            std=(0.5,),
            calibrate="digits",
            distill="digits",
            budget=60,
            epochs=10,
            output=OUTPUT,
            force=True,
            progress=progress,
        )
        anncvt.export(program, progress=progress)
        anncvt.compile(program, progress=progress)
        parity = anncvt.check(program, progress=progress)
        # So small a network gains nothing from a second thread.
        latency = anncvt.bench(program, threads=1, progress=progress)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(program, parity, latency))
    console.print(
        f"{time.monotonic() - begin:.0f} s in all; the program is in {OUTPUT}", highlight=False, soft_wrap=True
    )
    if not parity["ok"]:
        sys.exit(3)


def table(program: Program, parity: dict[str, Any], latency: dict[str, Any]) -> Table:
    """Accuracy, parity, latency and cost in one table."""
    calibrated, distilled = accuracy(program, "calibrated"), accuracy(program, "distilled")
    assert program.plan is not None and calibrated is not None and distilled is not None
    totals = program.plan.totals()
    # Two additions a tap of an adder; a tap of a convolution is one of each.
    shown = Table(title="A CNN becomes an adder network", title_justify="left", show_header=False)
    shown.add_column(style="bold")
    shown.add_column()
    shown.add_column(justify="right")
    images = f"top-1 on {distilled['images']} held-out digits"
    shown.add_row("accuracy", f"teacher (CNN), {images}", f"{distilled['teacher']['top1']:.1f} %")
    shown.add_row("", "converted: calibrated without labels", f"{calibrated['student']['top1']:.1f} %")
    shown.add_row("", "distilled: trained with the CNN as teacher", f"{distilled['student']['top1']:.1f} %")
    shown.add_section()
    for number, (name, row) in enumerate(parity["backends"].items()):
        agreement = f"{row['top1_agreement']:.0f} % same class, largest difference {row['max_rel']:.0e}"
        shown.add_row("parity" if number == 0 else "", f"{name} against torch", agreement)
    shown.add_section()
    for number, row in enumerate(sorted(latency["rows"], key=lambda row: row["p50_ms"])):
        network = {"teacher": "CNN", "student": "adder network"}[row["network"]]
        name = f"{network} in {row['backend']}{', ' + row['dtype'] if row['dtype'] != 'float32' else ''}"
        shown.add_row("latency, one image" if number == 0 else "", name, f"{row['p50_ms']:.3f} ms")
    shown.add_section()
    macs = count(totals["macs"])
    shown.add_row("arithmetic, one image", "CNN", f"{macs} additions, {macs} multiplications")
    shown.add_row("", "adder network", f"{count(totals['adds'])} additions, {count(totals['muls'])} multiplications")
    return shown


if __name__ == "__main__":
    main()
