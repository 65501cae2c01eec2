"""What ``--linear`` costs in accuracy: a small ConvNeXt, converted without and with its Linear layers.

    python benchmarks/linear.py --budgets 60,240

Trains the network on scikit-learn's digits (as examples/train_digits_net.py does its own), then calibrates it on the
same images without labels and measures both networks on the 500 others. Prints rows for benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path

import anncvt  # before torch: it sets how the thread pools wait

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anncvt.data import open_images
from anncvt.evaluation import evaluate
from anncvt.passes.calibrate import calibrate
from anncvt.passes.choice import Choice
from anncvt.passes.plan import plan
from anncvt.passes.rewrite import rewrite
from anncvt.program import Program
from anncvt.terminal import reporter

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from train_digits_net import PREPROCESS, fit


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of ``[N, C, H, W]``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """ConvNeXt's block (arXiv 2201.03545, figure 4): depthwise 7x7, LayerNorm, two Linear layers, a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.project = nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.project(F.gelu(self.expand(y)))
        return x + y.permute(0, 3, 1, 2)


class SmallConvNeXt(nn.Module):
    """``[N, 1, 16, 16]`` -> ``[N, 10]``, two stages of two blocks, 24 and 48 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 24, 2, 2), ChannelNorm(24))
        self.stage1 = nn.Sequential(Block(24), Block(24))
        self.down = nn.Sequential(ChannelNorm(24), nn.Conv2d(24, 48, 2, 2))
        self.stage2 = nn.Sequential(Block(48), Block(48))
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.down(self.stage1(self.stem(x))))
        return self.head(self.norm(x.mean((2, 3))))


def trained(epochs: int, seed: int) -> nn.Module:
    """The network in eval mode after ``epochs`` of AdamW."""
    torch.manual_seed(seed)
    network = SmallConvNeXt()
    for _ in fit(network, torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=0.05), epochs, seed):
        pass
    return network.eval()


def main() -> None:
    """Train, convert in every way, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30, help="of training the CNN")
    parser.add_argument("--budgets", default="60", help="seconds of calibration, comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    train, test = (open_images("digits", split, PREPROCESS) for split in ("train", "test"))
    network = trained(options.epochs, options.seed)
    teacher = evaluate(network, test, PREPROCESS)["top1"]
    loaded = anncvt.load(network, input_size=PREPROCESS.input_size, mean=PREPROCESS.mean, std=PREPROCESS.std)
    print("| conversion | adders' share of the MACs % | processor seconds | top-1 % | below the CNN (points) |")
    print(f"|---|---|---|---|---|\n| none: the CNN | | | {teacher:.2f} | |", flush=True)
    with reporter() as progress:
        for linear in (False, True):
            start: Program = rewrite(plan(loaded, Choice(linear=linear)))
            for budget in map(float, options.budgets.split(",")):
                program, begin = copy.deepcopy(start), time.process_time()
                calibrate(program, train, seed=options.seed, budget=budget, progress=progress)
                seconds = time.process_time() - begin
                top1 = evaluate(program.student, test, PREPROCESS)["top1"]
                share = start.plan.totals()["swapped_share"]
                how = f"{'with' if linear else 'without'} --linear, budget {budget:.0f} s"
                print(f"| {how} | {100 * share:.1f} | {seconds:.0f} | {top1:.2f} | {teacher - top1:.2f} |", flush=True)


if __name__ == "__main__":
    main()
