"""PKKD: what its parts are worth at equal steps, what a step costs; prints rows for benchmarks/RESULTS.md.

    python benchmarks/distillation.py cost                          # time and memory of a step, ResNet-20
    python benchmarks/distillation.py loader FOLDER --data folder:photos    # images a second: decoded, and trained on
    python benchmarks/distillation.py ablations FOLDER --data hf:cifar10 --steps 200 --batch-size 64

FOLDER is a calibrated program folder; it is not changed. The cost is that of one thread's processor time, beside a
plain training step of the CNN, in turns.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import anncvt  # before torch: it sets how the thread pools wait

# isort: split
import torch
import torch.nn.functional as F
from resnets import resnet20
from timing import CLOCKS, interleaved
from torch import nn
from training import peak_growth

from anncvt.data import Stream, open_images, select
from anncvt.distillation.batches import Batches
from anncvt.distillation.config import DistillConfig
from anncvt.distillation.processes import Processes
from anncvt.distillation.training import Training
from anncvt.evaluation import evaluate
from anncvt.folder import open_folder
from anncvt.passes.pairing import gradients
from anncvt.passes.rewrite import rewrite
from anncvt.pkkd import distill

#: Name and configuration of every row.
ABLATIONS = {
    "defaults: kernel features, frozen teacher, from the calibration": {},
    "MSE features": {"feature_loss": "mse"},
    "no features": {"feature_loss": "none"},
    "labels alone": {"feature_loss": "none", "alpha": 0.0},
    "progressive teacher": {"teacher": "progressive"},
    "from the CNN's weights": {"init": "copy"},
    "fresh, lr 0.1, eta 0.2": {"init": "fresh", "lr": 0.1, "eta": 0.2},
    "both fresh (the paper), lr 0.1, eta 0.2": {"teacher": "scratch", "lr": 0.1, "eta": 0.2},
    "full gradient": {"gradient": "full"},
    "AdamW": {"optimizer": "adamw"},
}
COSTS = {
    "kernel features": {},
    "MSE features": {"feature_loss": "mse"},
    "no features": {"feature_loss": "none"},
    "progressive teacher": {"teacher": "progressive"},
    "full gradient": {"gradient": "full"},
}


def ablations(options: argparse.Namespace) -> None:
    """Top-1 after the same steps from the same start, row by row."""
    base = open_folder(options.folder)
    read = {"data_dir": options.data_dir, "seed": options.seed}
    count = options.steps * options.batch_size
    train = open_images(options.data, "train", base.preprocess, limit=count, **read)
    test = open_images(options.data, "test", base.preprocess, limit=options.test_images, **read)
    for name, network in (("the CNN", base.teacher), ("calibrated", base.student)):
        print(f"| {name} | | {evaluate(network, test, base.preprocess)['top1']:.2f} |", flush=True)
    for name, changes in ABLATIONS.items():
        if options.only and not any(word in name for word in options.only):
            continue
        program, begin = copy.deepcopy(base), time.process_time()
        epochs = max(1, count // len(train))
        config = DistillConfig(epochs=epochs, batch_size=options.batch_size, seed=options.seed, **changes)
        with tempfile.TemporaryDirectory() as place:
            distill(program, train, None, config, folder=Path(place))
        seconds = time.process_time() - begin
        top1 = evaluate(program.student, test, program.preprocess)["top1"]
        print(f"| {name} | {seconds:.0f} | {top1:.2f} |", flush=True)


def cost(options: argparse.Namespace) -> None:
    """Processor time and growth of memory of a step, as multiples of a plain training step of the CNN."""
    torch.set_num_threads(1)
    names = ["CNN", *COSTS]
    steps = {name: step_of(name, options.batch_size) for name in names}
    seconds = interleaved(steps, options.repeats, CLOCKS["cpu"])
    peaks = {name: peak_growth(step_of, (name, 4), (name, options.batch_size)) for name in names}
    print("| step | ms | times the CNN's | MiB | times the CNN's |\n|---|---|---|---|---|")
    for name in names:
        time_ratio, memory_ratio = seconds[name] / seconds["CNN"], peaks[name] / peaks["CNN"]
        print(
            f"| {name} | {seconds[name] * 1e3:.0f} | {time_ratio:.2f} | {peaks[name] / 1024:.0f} | {memory_ratio:.2f} |"
        )


def loader(options: argparse.Namespace) -> None:
    """Images that one thread decodes in a second of processor time as they are needed, and that a step takes."""
    torch.set_num_threads(1)
    program = open_folder(options.folder)
    listing, rows = select(options.data, "train", program.preprocess, options.data_dir, None, options.seed, True)
    stream = Stream(listing, rows, program.preprocess.input_size, options.data, workers=1)
    config = DistillConfig(epochs=1000, batch_size=options.batch_size, lr=1e-4).settled()
    place, alone = Path(tempfile.gettempdir()), Processes()
    batches = Batches(stream, program.preprocess, config, alone)
    held = open_images("synthetic", "train", program.preprocess, limit=2 * options.batch_size)
    run, count = Training(program, held, config, place, alone, torch.device("cpu")), 4 * options.repeats
    list(batches.parts(0))
    begin = time.process_time()
    for step in range(1, count + 1):  # in a row: what is decoded ahead in one step is used in the next
        list(batches.parts(step))
    decoding = (time.process_time() - begin) / count
    stream.close()
    with gradients(run.paired, config.gradient):
        training = interleaved({"step": run.advance}, options.repeats, CLOCKS["cpu"])["step"]
    for name, seconds in (("loader", decoding), ("step", training)):
        print(f"| {name} | {options.batch_size / seconds:.0f} images a second |")


def step_of(name: str, batch: int) -> Callable[[], None]:
    """One training step as a call: of the CNN alone, or of PKKD with one of COSTS."""
    cnn = resnet20(nn.Conv2d).eval()
    program = anncvt.load(cnn, input_size=32, mean=(0.5,), std=(0.5,))
    images = open_images("synthetic", "train", program.preprocess, limit=4 * batch)
    if name == "CNN":
        optimizer = torch.optim.SGD(program.teacher.parameters(), lr=1e-4, momentum=0.9)
        network = program.teacher.to(memory_format=torch.channels_last).train()
        assert images.labels is not None
        labels = images.labels

        def plain() -> None:
            x = images.batch(torch.arange(batch), program.preprocess).contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad()
            F.cross_entropy(network(x), labels[:batch]).backward()
            optimizer.step()

        return plain
    program = rewrite(anncvt.plan(program))
    config = DistillConfig(epochs=1000, batch_size=batch, lr=1e-4, **COSTS[name]).settled()
    run = Training(program, images, config, Path(tempfile.gettempdir()), Processes(), torch.device("cpu"))

    def step() -> None:
        with gradients(run.paired, config.gradient):
            run.advance()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ablations", "cost", "loader"])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="ablations whose names hold one of these words")
    options = parser.parse_args()
    if options.what == "cost":
        cost(options)
    elif options.folder is None:
        parser.error("name a calibrated program folder")
    else:
        {"ablations": ablations, "loader": loader}[options.what](options)


if __name__ == "__main__":
    main()
