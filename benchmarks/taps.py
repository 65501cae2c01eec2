"""What a tap of several weights leaves unexplained: the best that ``-sum_k size_k |x - w_k|`` can do for ``v x``.

    python benchmarks/taps.py

Taps ``v`` and inputs ``x`` are normal, or inputs are what a ReLU leaves of them; all taps share one scale, as those of
an output channel do. Weights are tried exhaustively, so the figure is a bound on one tap by itself: weights that are
chosen together (docs/calibration.md) make up for each other's remainders.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

INPUTS, TAPS, SCALES = 1000, 100, 60
#: Candidates for a weight, by the number of weights.
CANDIDATES = {1: 101, 2: 61, 3: 41, 4: 17}


def normal(count: int) -> Tensor:
    """Quantiles of the normal distribution."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count).float()


def unexplained(x: Tensor, sizes: tuple[int, ...]) -> float:
    """Least share of the variance of all ``v x`` together that is left, over scales and weights."""
    count, taps = CANDIDATES[len(sizes)], normal(TAPS)
    candidates = torch.linspace(float(x.min()), float(x.max()), count)
    tents = -(x - candidates[:, None]).abs()
    tents -= tents.mean(1, keepdim=True)
    centred = x - x.mean()
    gram, slopes = tents @ tents.T / len(x), tents @ centred / len(x)
    chosen = torch.cartesian_prod(*[torch.arange(count)] * len(sizes)).view(-1, len(sizes)).unbind(1)
    parts = [*zip(sizes, chosen, strict=True)]
    square = sum(a * b * gram[i, j] for (a, i), (b, j) in itertools.product(parts, parts))
    product = sum(a * slopes[i] for a, i in parts)
    whole = taps.square().sum() * centred.square().mean()
    left = []
    for scale in torch.linspace(0.05, 3, SCALES) / sum(sizes):
        gained = scale * scale * square - 2 * scale * taps[:, None] * product
        left.append(1 + float(gained.amin(1).sum() / whole))
    return min(left)


def main() -> None:
    print("| sizes of the copies | normal inputs | behind a ReLU |\n|---|---|---|")
    for sizes in ((1,), (1, 1), (1, 2), (1, 1, 1), (1, 2, 4), (1, 2, 4, 8)):
        shares = [f"{unexplained(x, sizes):.1%}" for x in (normal(INPUTS), normal(INPUTS).relu())]
        print(f"| {', '.join(map(str, sizes))} | {' | '.join(shares)} |", flush=True)


if __name__ == "__main__":
    main()
