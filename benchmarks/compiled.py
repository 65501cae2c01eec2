"""Which architectures compile as a whole, and whether what is compiled computes what torch does.

    python benchmarks/compiled.py                          # the sample below, one process per network
    python benchmarks/compiled.py torchvision:resnet18 timm:ghostnet_050

Random weights, the default plan. Prints one row per network: the largest difference of an output from torch's, relative
to the largest output (float32 both), or why there is no compiled form.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import anncvt  # noqa: F401  (before torch: it sets the environment of the thread pools)

# isort: split
import numpy as np
import torch

from anncvt import zoo
from anncvt.errors import AnncvtError
from anncvt.loading import load
from anncvt.passes.plan import plan
from anncvt.passes.rewrite import rewrite
from anncvt.preprocess import choose_preprocess
from anncvt.program import Program
from anncvt.runtime import tvm
from anncvt.runtime.check import TOLERANCE
from anncvt.runtime.inference import inference_copy

#: Every kind of block that the collections have, by a small network each.
SAMPLE = {
    "torchvision": "alexnet vgg11 squeezenet1_1 densenet121 inception_v3 googlenet resnet18 resnext50_32x4d "
    "mobilenet_v2 mobilenet_v3_small shufflenet_v2_x0_5 mnasnet0_5 efficientnet_b0 efficientnet_v2_s regnet_y_400mf "
    "regnet_x_400mf convnext_tiny maxvit_t fcn_resnet50 deeplabv3_mobilenet_v3_large "
    "lraspp_mobilenet_v3_large r3d_18",
    "timm": "resnet10t seresnet18 ecaresnet26t resnet26d resnetblur18 skresnet18 res2net50_26w_4s resnest14d "
    "selecsls42 ghostnet_050 ghostnetv3_050 hrnet_w18_small dla34 dpn48b darknet17 cspresnet50 "
    "cspdarknet53 ese_vovnet19b_slim_dw legacy_xception inception_v4 nasnetalarge hardcorenas_a lcnet_050 "
    "mixnet_s rexnet_100 tf_efficientnet_lite0 mobilenetv4_conv_small mobilenetv3_rw mobilevit_xxs "
    "repvgg_a0 repghostnet_050 repvit_m1 fastvit_t8 edgenext_xx_small convmixer_768_32 nf_regnet_b0 "
    "nfnet_l0 tresnet_m botnet26t_256 coatnet_nano_rw_224 efficientformer_l1 starnet_s1 tinynet_e "
    "semnasnet_075 spnasnet_100 visformer_tiny gernet_s hgnetv2_b0 resnetv2_18 bat_resnext26ts",
}
#: Where a network takes several sizes, the smallest of these that it takes.
SIDES = (64, 128)
SECONDS = 240


def converted(name: str) -> Program:
    """The adder network of an architecture, with random weights."""
    collection, _, model = name.partition(":")
    torch.manual_seed(0)
    network = zoo.build(collection, model, {}).eval()
    stated = choose_preprocess(network, name).input_size
    for side in (*SIDES, stated[-1]):
        try:
            return rewrite(plan(load(network, input_size=(*stated[:-2], side, side))))
        except AnncvtError:
            if side == stated[-1]:
                raise
    raise AssertionError("the stated size was tried")


def examine(name: str) -> dict[str, Any]:
    """Convert, compile and compare one network."""
    begin = time.monotonic()
    try:
        program = converted(name)
    except AnncvtError as error:
        return {"status": "not converted", "reason": error.what}
    row: dict[str, Any] = {"input": list(program.preprocess.input_size)}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            model = tvm.load(tvm.compile(program, Path(scratch) / "model.so"))
            row["seconds"] = round(time.monotonic() - begin, 1)
            images = torch.randn(1, *program.preprocess.input_size)
            assert program.student is not None
            with torch.no_grad():
                expected = inference_copy(program.student)(images).numpy()
            difference = np.abs(model(images.numpy()) - expected).max() / np.abs(expected).max()
    except AnncvtError as error:
        return {**row, "status": "refused", "reason": error.what}
    equal = bool(difference < TOLERANCE)
    return {**row, "status": "compiled" if equal else "wrong", "difference": float(difference)}


def in_a_process(name: str) -> dict[str, Any]:
    """:func:`examine`, whatever becomes of the process."""
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--worker", name], capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"not done after {SECONDS} s"}
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["the process died"]
    return json.loads(lines[-1]) if done.returncode == 0 else {"status": "failed", "reason": lines[-1][:200]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="COLLECTION:NAME  [default: a sample]")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(examine(options.models[0])))
        return
    names = options.models or [f"{kind}:{name}" for kind, all_names in SAMPLE.items() for name in all_names.split()]
    counts: dict[str, int] = {}
    for name in names:
        row = in_a_process(name)
        counts[row["status"]] = counts.get(row["status"], 0) + 1
        size = "x".join(map(str, row.get("input", [])))
        said = row.get("reason") or f"{row['difference']:.1e}"
        print(f"| {name} | {size} | {row['status']} | {said} | {row.get('seconds', '')} |", flush=True)
    print(", ".join(f"{count} {status}" for status, count in counts.items()))


if __name__ == "__main__":
    main()
