"""Accuracy of a conversion at several budgets, with its ablations; prints rows for benchmarks/RESULTS.md.

    python benchmarks/accuracy.py                                             # the bundled digits network
    python benchmarks/accuracy.py net.pth --arch mynet:Net --data hf:cifar10 --budgets 300,1200 --ablations

The calibration sees unlabelled training images; accuracy is measured on the test split.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anncvt  # before torch: it sets how the thread pools wait
from anncvt.architecture import parse_arch_args
from anncvt.data import Images, open_images
from anncvt.errors import AnncvtError
from anncvt.evaluation import evaluate
from anncvt.passes.calibrate import CalibrationConfig, calibrate
from anncvt.passes.pairing import pairs
from anncvt.passes.rewrite import rewrite
from anncvt.program import Preprocess, Program
from anncvt.progress import Progress
from anncvt.terminal import reporter

EXAMPLES = Path(__file__).parent.parent / "examples"
DIGITS = {"input_size": (1, 16, 16), "mean": (0.5,), "std": (0.5,)}


def main() -> None:
    options = _options()
    loading = {"arch": options.arch, "arch_args": parse_arch_args(options.arch_args)}
    if options.model is None:
        options.model, loading = EXAMPLES / "digits_net.safetensors", {"arch": "digits_net:DigitsNet", **DIGITS}
    else:
        loading |= {name: getattr(options, name) for name in ("input_size", "mean", "std")}
    start = rewrite(anncvt.plan(anncvt.load(options.model, **loading), copies=options.copies))
    read = {"data_dir": options.data_dir, "seed": options.seed}
    if options.held_back:
        train, test = _split(options, start.preprocess)
    else:
        train = open_images(options.data, "train", start.preprocess, limit=options.images, labelled=False, **read)
        test = open_images(options.data, "test", start.preprocess, **read)
    teacher = evaluate(start.teacher, test, start.preprocess)["top1"]
    print(f"{options.model}, {options.data}: {len(train)} images, seed {options.seed}; {_machine()}", file=sys.stderr)
    print("| conversion | seconds | processor seconds | top-1 % | below the CNN (points) |\n|---|---|---|---|---|")
    print(f"| none: the CNN | | | {teacher:.2f} | |")
    rows = [{"conversion": "cnn", "top1": teacher}]
    with reporter() as progress:
        for name, convert in _conversions(options, train, progress):
            program = copy.deepcopy(start)
            begin, begin_cpu = time.monotonic(), time.process_time()
            convert(program)
            seconds, cpu = time.monotonic() - begin, time.process_time() - begin_cpu
            top1 = evaluate(program.student, test, program.preprocess)["top1"]
            figures = {"seconds": round(seconds, 1), "processor_seconds": round(cpu, 1), "top1": top1}
            rows.append({"conversion": name, **figures, "metrics": program.history[-1].metrics})
            print(f"| {name} | {seconds:.0f} | {cpu:.0f} | {top1:.2f} | {teacher - top1:.2f} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": _machine(), "seed": options.seed, "rows": rows}, indent=1))


def _conversions(options: argparse.Namespace, train: Images, progress: Progress) -> list[tuple[str, Callable]]:
    """Name and function of every row: the budgets, then what each part of the method is worth."""
    base = CalibrationConfig()

    def with_config(config: CalibrationConfig) -> Callable:
        return lambda program: calibrate(program, train, seed=options.seed, config=config, progress=progress)

    def within(seconds: float) -> Callable:
        return lambda program: calibrate(program, train, seed=options.seed, budget=seconds, progress=progress)

    rows = [(f"calibrated, budget {seconds:g} s", within(seconds)) for seconds in options.budgets]
    if options.steps:
        layer, block, joint = (int(steps) for steps in options.steps)
        stages = {
            "layer": replace(base.layer, steps=layer),
            "block": replace(base.block, steps=block),
            "joint": replace(base.joint, steps=joint),
        }
        rows.append((f"{layer} steps a layer, {block} a block, {joint} jointly", with_config(replace(base, **stages))))
    if options.ablations:
        none = replace(base, layer=_off(base.layer, sweeps=0), block=_off(base.block), joint=_off(base.joint))
        local = replace(base, joint=_off(base.joint))
        layers = replace(local, block=_off(base.block))
        blind = replace(layers, layer=replace(base.layer, activation_weight=0.0))
        rows += [
            ("the CNN's weights copied, statistics taken again", lambda program: _copied(program, train)),
            ("quantile map alone", with_config(replace(none, layer=_off(base.layer, sweeps=0, regress=False)))),
            ("quantile map of a regression", with_config(none)),
            ("map of the weights, taps fitted", with_config(replace(layers, layer=_off(base.layer, regress=False)))),
            ("map of a regression, taps fitted", with_config(replace(layers, layer=_off(base.layer)))),
            ("map, layers fitted by gradient", with_config(replace(layers, layer=replace(base.layer, sweeps=0)))),
            ("map, layers fitted by both", with_config(layers)),
            ("the same, error behind the activation not counted", with_config(blind)),
            ("map, layers and blocks fitted", with_config(local)),
            ("map, layers fitted, then jointly", with_config(replace(base, block=_off(base.block)))),
            ("map, fitted jointly alone", with_config(replace(none, joint=base.joint))),
            ("all stages", with_config(base)),
        ]
    return rows


def _off(stage: Any, **parts: Any) -> Any:
    return replace(stage, steps=0, **parts)


def _split(options: argparse.Namespace, preprocess: Preprocess) -> tuple[Images, Images]:
    """Calibration and test images from a data set that has one split only: disjoint, chosen by the seed."""
    read = {"data_dir": options.data_dir, "seed": options.seed, "limit": options.images + options.held_back}
    images = open_images(options.data, "train", preprocess, **read)
    count = len(images) - options.held_back
    unlabelled = replace(images.subset(range(count)), labels=None, classes=None)
    return unlabelled, images.subset(range(count, len(images)))


def _copied(program: Program, train: Images) -> None:
    """What is tried without a method: swap the op, keep the weights, take the BatchNorm statistics again."""
    import torch

    for pair in pairs(program):
        pair.norm.reset_running_stats()
        pair.norm.momentum = None
        pair.norm.train()
    with torch.no_grad():
        for part in torch.arange(len(train)).split(256):
            program.student(train.batch(part, program.preprocess))
    program.student.eval()


def _machine() -> str:
    return f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(",") if number)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="a checkpoint; default: the bundled digits network")
    parser.add_argument("--arch")
    parser.add_argument("--arch-args", action="append", default=[])
    parser.add_argument("--copies", type=int, metavar="K", help="weights per input of every adder")
    parser.add_argument("--input-size", type=int)
    parser.add_argument("--mean", type=_numbers)
    parser.add_argument("--std", type=_numbers)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--images", type=int, default=5000, help="calibration images")
    parser.add_argument(
        "--held-back", type=int, default=0, help="measure on so many training images that calibration does not see"
    )
    parser.add_argument("--budgets", type=_numbers, default=(20.0,), help="seconds")
    parser.add_argument("--steps", type=_numbers, metavar="N,N,N", help="a row with so many a layer, a block, jointly")
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except AnncvtError as error:
        sys.exit(f"{error}. {error.fix or ''}")
