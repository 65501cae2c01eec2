"""Adder layers against convolutions of the same shape on this machine: inference, training, and the machine's limit.

    python benchmarks/kernels.py forward --threads 1                 # ResNet-50, batch 1
    python benchmarks/kernels.py forward --peers                     # and other implementations of adder layers
    python benchmarks/kernels.py training --threads 2 --batch 64     # ResNet-20, forward and backward, training step
    python benchmarks/kernels.py training --clock cpu --json out.json    # on a machine with other work to do

Every figure is a minimum over interleaved repeats: the contestants take turns, so that a disturbance hits all of them.
Gop/s counts one ``|x - w|`` (or multiply-add) as one op; the limit is that of a loop without loads (limits.py).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import anncvt  # noqa: F401  (before torch: it sets the environment of the thread pools)

# isort: split
import forward
import limits
import torch
import training
from timing import CLOCKS

SUITES = {"forward": forward.measure, "training": training.measure}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, help="default 1 for forward, 64 for the ResNet-20 layers of training")
    parser.add_argument("--step-batch", type=int, default=128, help="batch of the training step (default 128)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--peers", action="store_true", help="forward: also time other implementations (minutes)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: time of all threads together")
    parser.add_argument("--json", metavar="PATH", help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    peaks = limits.port_limits()
    settings: dict[str, Any] = {"threads": options.threads, "clock": options.clock, "limits": peaks}
    known = ", ".join(f"{name} {peak:.1f}" for name, peak in peaks.items()) or "unknown here"
    print(f"{options.threads} thread(s), {options.clock} time; limits of one core in Gop/s: {known}")
    figures = SUITES[options.suite](options, CLOCKS[options.clock], peaks)
    if options.json:
        Path(options.json).write_text(json.dumps({**settings, **figures}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
