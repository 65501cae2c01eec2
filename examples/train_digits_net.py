"""Train the demo's CNN on scikit-learn's digits.

    python examples/train_digits_net.py                     # writes examples/digits_net.safetensors
    python examples/train_digits_net.py -o net.safetensors --epochs 10

1297 digits of 8x8 pixels, upscaled to 16x16, train it; 500 others measure it. SGD with momentum and a one-cycle step
size, random shifts by one pixel, no mirroring. On one CPU core it takes ten seconds and ends above 99% on the 500.
The seed fixes everything: the same version of torch on the same kind of processor writes the same file.

Then convert it, from this folder:

    anncvt convert digits_net.safetensors --arch digits_net:DigitsNet --input-size 1,16,16 --mean 0.5 --std 0.5 \\
        --calibrate digits --distill digits -o digits.ann
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from digits_net import INPUT_SIZE, MEAN, STD, DigitsNet
from safetensors.torch import save
from torch import nn

from anncvt.data import augment, open_images
from anncvt.evaluation import evaluate
from anncvt.files import atomic_path
from anncvt.images import normalise
from anncvt.program import Preprocess

PREPROCESS = Preprocess(INPUT_SIZE, MEAN, STD)


def fit(network: nn.Module, optimizer: torch.optim.Optimizer, epochs: int, seed: int) -> Iterator[float]:
    """Train ``network`` on the digits, the rate going up to the optimizer's and down; yields each epoch's mean loss."""
    generator = torch.Generator().manual_seed(seed)
    images = open_images("digits", "train", PREPROCESS)
    labels = images.labels
    assert labels is not None  # digits always have labels
    batch = 64
    steps = len(images) // batch
    rate = optimizer.defaults["lr"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=epochs * steps)
    for _ in range(epochs):
        total = 0.0
        network.train()
        # The last, smaller batch is dropped: its batch statistics would be poorer.
        for indices in torch.randperm(len(images), generator=generator)[: steps * batch].split(batch):
            # Shifted as pixels, where the zeros that come in at the border are background.
            inputs = normalise(augment(images.pixels[indices], generator, pad=1, flip=images.flip), PREPROCESS)
            loss = F.cross_entropy(network(inputs), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        yield total / steps


def train(epochs: int, seed: int) -> tuple[DigitsNet, float]:
    """A trained network in eval mode and its top-1 accuracy in percent on the held-out digits."""
    torch.manual_seed(seed)
    network = DigitsNet()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    started = time.perf_counter()
    for epoch, loss in enumerate(fit(network, optimizer, epochs, seed), 1):
        print(f"epoch {epoch:3d}/{epochs}  loss {loss:.4f}  {time.perf_counter() - started:.1f} s", flush=True)
        started = time.perf_counter()
    return network.eval(), evaluate(network, open_images("digits", "test", PREPROCESS), PREPROCESS)["top1"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's CNN on scikit-learn's digits.")
    default = Path(__file__).with_name("digits_net.safetensors")
    parser.add_argument("-o", "--output", type=Path, default=default, help="where to write the weights")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # The network is so small that a second thread gains nothing, and with one the result does not depend on how many.
    torch.set_num_threads(1)
    network, accuracy = train(options.epochs, options.seed)
    with atomic_path(options.output) as path:
        path.write_bytes(save(network.state_dict()))
    print(f"{accuracy:.1f}% of the 500 held-out digits; wrote {options.output}")


if __name__ == "__main__":
    main()
