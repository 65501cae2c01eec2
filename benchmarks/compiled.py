"""Which architectures compile as a whole, and whether what is compiled computes what torch does.

    python benchmarks/compiled.py                          # the sample below, one process per network
    python benchmarks/compiled.py torchvision:resnet18 timm:ghostnet_050

Random weights, the default plan, BatchNorm statistics of the images (noise) that are compared, so that no activations
die out. Prints one row per network: the largest difference of an output from torch's in float64, relative to the
largest output, and that of torch's float32, or why there is no compiled form. Adders are compiled in float32, not in
16-bit fixed point.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anncvt  # noqa: F401  (before torch: it sets the environment of the thread pools)

# isort: split
import numpy as np
import torch
from statistics_of_noise import settle
from torch import Tensor, nn

from anncvt import zoo
from anncvt.errors import AnncvtError
from anncvt.loading import load
from anncvt.nn import _AdderNd
from anncvt.passes.plan import plan
from anncvt.passes.rewrite import rewrite
from anncvt.preprocess import choose_preprocess
from anncvt.program import Program
from anncvt.runtime import tvm
from anncvt.runtime.check import TOLERANCE

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
#: Images to compare.
IMAGES = 4
#: Standard deviation of the adders' weights, where activations are about 1.
WEIGHTS = 4.0
#: Times the rounding error of torch's own float32, which deep networks of random weights amplify.
TIMES = 4
SECONDS = 600


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


def tame(network: nn.Module, images: Tensor) -> None:
    """Change a network of random weights so that it does not amplify rounding errors without end.

    A network of adders whose weights are of the size of their inputs is chaotic: the signs of its differences change
    with every input. Larger weights decide the signs themselves.
    """
    for module in network.modules():
        if isinstance(module, _AdderNd):
            nn.init.normal_(module.weight, std=WEIGHTS)
    settle(network, images)


def examine(name: str) -> dict[str, Any]:
    """Convert, compile and compare one network."""
    begin = time.monotonic()
    try:
        program = converted(name)
    except AnncvtError as error:
        return {"status": "not converted", "reason": error.what}
    row: dict[str, Any] = {"input": list(program.preprocess.input_size)}
    assert program.student is not None
    images = torch.randn(IMAGES, *program.preprocess.input_size)
    tame(program.student, images)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            model = tvm.load(tvm.compile(program, Path(scratch) / "model.so", fixed=False))
            row["seconds"] = round(time.monotonic() - begin, 1)
            found = model(images.numpy())
    except AnncvtError as error:
        return {**row, "status": "refused", "reason": error.what}
    exact = output(program.student.double(), images.double())
    scale = np.abs(exact).max()
    row["difference"], row["torch"] = (
        float(np.abs(values - exact).max() / scale) for values in (found, output(program.student.float(), images))
    )
    equal = row["difference"] < max(TOLERANCE, TIMES * row["torch"])
    return {**row, "status": "compiled" if equal else "wrong"}


def output(network: nn.Module, images: Tensor) -> np.ndarray:
    """The first output, where there are several."""
    with torch.no_grad():
        result = network(images)
    if isinstance(result, Mapping):
        result = next(iter(result.values()))
    return result.numpy()


def in_a_process(name: str) -> dict[str, Any]:
    """:func:`examine`, whatever becomes of the process."""
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--worker", name], capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"not done after {SECONDS} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1])
    lines = [line for line in done.stderr.splitlines() if line.strip() and "Warning" not in line]
    return {"status": "failed", "reason": (lines or ["the process died"])[-1][:200]}


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
        said = row.get("reason") or f"{row['difference']:.1e} (torch {row['torch']:.1e})"
        print(f"| {name} | {size} | {row['status']} | {said} | {row.get('seconds', '')} |", flush=True)
    print(", ".join(f"{count} {status}" for status, count in counts.items()))


if __name__ == "__main__":
    main()
