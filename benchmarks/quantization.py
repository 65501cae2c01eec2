"""Accuracy of the integers of a program folder with several settings; prints rows for benchmarks/RESULTS.md.

    python benchmarks/quantization.py net.ann                                     # 8, 6, 5 and 4 bits
    python benchmarks/quantization.py net.ann bits=4,groups=4 bits=4,range=entropy bits=8,power_of_two=True

The folder stays as it is. Ranges are chosen on unlabelled training images of the conversion's data, accuracy is
measured on its test split.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import anncvt  # before torch: it sets how the thread pools wait
from anncvt.architecture import parse_arch_args
from anncvt.evaluation import evaluate
from anncvt.measure import DataChoice, chosen
from anncvt.passes.quantize import QuantizeConfig, quantize
from anncvt.quantization import accuracy_of
from anncvt.terminal import reporter

BITS = [f"bits={bits}" for bits in (8, 6, 5, 4)]


def main() -> None:
    options = _options()
    program = anncvt.load(options.folder)
    assert program.student is not None
    choice = chosen(program, DataChoice(options.data, options.data_dir))
    with reporter() as progress:
        train = choice.open("train", program.preprocess, at_most=512, labelled=False, progress=progress)
        test = choice.open("test", program.preprocess, at_most=options.limit, progress=progress)
        floats = evaluate(program.student, test, program.preprocess, progress=progress)["top1"]
        print(f"{options.folder}: {len(train)} images to calibrate, {len(test)} to test", file=sys.stderr)
        print("| integers | top-1 % | below floats (points) |\n|---|---|---|")
        print(f"| none: floats | {floats:.2f} | |", flush=True)
        for setting in options.settings or BITS:
            given: dict[str, Any] = parse_arch_args(setting.split(","))
            network = quantize(program, train, QuantizeConfig(**given), progress=progress)
            top1 = accuracy_of(network, test, progress=progress)["top1"]
            print(f"| {setting.replace(',', ', ')} | {top1:.2f} | {floats - top1:.2f} |", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE,...", help="fields of QuantizeConfig")
    parser.add_argument("--data", help="default: that of the conversion")
    parser.add_argument("--data-dir")
    parser.add_argument("--limit", type=int, default=10_000, help="test images")
    return parser.parse_args()


if __name__ == "__main__":
    main()
