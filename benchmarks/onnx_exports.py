"""Whole networks as ONNX at every opset, with either body: valid, and the same logits everywhere.

    python benchmarks/onnx_exports.py resnet20.th --arch cifarnet:R --arch-args n=3 --input-size 32
    python benchmarks/onnx_exports.py torchvision:resnet50 --input-size 64 --every 6 --opset 18

Every file is checked by onnx (full check, strict shape inference), then run by stock onnxruntime and by onnx's
ReferenceEvaluator on two smooth images; the largest difference from torch, as a share of the largest logit, is printed.
The adder networks are mapped, not fitted. With random weights, deep ones blow rounding up, so the table also says what
a change of the images by a millionth does.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import anncvt  # (before torch: it sets the environment of the thread pools)

# isort: split
import numpy as np
import onnx
import torch
import torch.nn.functional as F
from coverage import with_statistics
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from anncvt.architecture import parse_arch_args
from anncvt.passes.choice import Choice
from anncvt.passes.initialise import initialise
from anncvt.passes.pairing import pairs
from anncvt.passes.plan import plan
from anncvt.passes.rewrite import rewrite
from anncvt.program import Program
from anncvt.runtime.onnx import INPUT, export, run, session
from anncvt.runtime.onnx_body import OPSETS


def converted(program: Program, images: Tensor, every: int) -> Program:
    """The adder network, its weights mapped on ``images``.

    Args:
        every: one in so many of the planned layers becomes an adder.
    """
    if program.history[0].metrics["weights"] == "random":  # its norms have seen no images yet
        with_statistics(program.teacher, images)
    planned = plan(program).plan
    assert planned is not None
    names = [layer.name for layer in planned.swapped]
    done = rewrite(plan(program, Choice(keep=tuple(name for at, name in enumerate(names) if at % every))))
    assert done.student is not None
    initialise(done.teacher, done.student, pairs(done), images)
    return done


def differences(program: Program, images: Tensor, path: Path, opset: int, body: str, fuse: bool) -> list[float]:
    """Of onnxruntime and of the ReferenceEvaluator, from torch."""
    assert program.student is not None
    with torch.no_grad():
        wanted = program.student(images).numpy()
    export(program, path, opset=opset, body=body, fuse=fuse)
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == opset
    found = [
        run(session(path, threads=1, library="none"), images.numpy()),
        ReferenceEvaluator(model).run(None, {INPUT: images.numpy()})[0],
    ]
    return [float(np.abs(logits - wanted).max() / np.abs(wanted).max()) for logits in found]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--arch")
    parser.add_argument("--arch-args", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--input-size", type=int, required=True)
    parser.add_argument("--opset", type=int, action="append", help="all of them, unless some are named")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="swap one in N of the planned layers")
    options = parser.parse_args()
    torch.manual_seed(0)
    program = anncvt.load(
        options.model,
        arch=options.arch,
        arch_args=parse_arch_args(options.arch_args),
        input_size=options.input_size,
    )
    coarse = 2 * torch.rand(16, program.preprocess.input_size[0], 7, 7) - 1
    images = F.interpolate(coarse, program.preprocess.input_size[1:], mode="bicubic")
    program = converted(program, images, options.every)
    assert program.student is not None and program.plan is not None
    few = images[:2]
    with torch.no_grad():
        logits, moved = program.student(few), program.student(few * (1 + 1e-6))
    print(
        f"{len(program.plan.swapped)} adders; rounding {float((moved - logits).abs().max() / logits.abs().max()):.1e}"
    )
    print("| opset | body | fused | onnxruntime | ReferenceEvaluator |\n|---|---|---|---|---|")
    for opset in options.opset or OPSETS:
        for body in ("scan", "one"):
            for fuse in (False, True):
                with tempfile.TemporaryDirectory() as folder:
                    far = differences(program, few, Path(folder, "x.onnx"), opset, body, fuse)
                print(f"| {opset} | {body} | {'yes' if fuse else ''} | {far[0]:.1e} | {far[1]:.1e} |", flush=True)


if __name__ == "__main__":
    main()
