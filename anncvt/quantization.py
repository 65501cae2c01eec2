"""The integer network of a program folder: made, kept and measured there."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from anncvt import folder, pipeline
from anncvt.data import Images
from anncvt.errors import AnncvtError
from anncvt.evaluation import evaluate_scores
from anncvt.fake_quant import fake_quantised
from anncvt.measure import DataChoice, accuracy_on
from anncvt.passes.quantize import QuantizeConfig, quantize
from anncvt.program import Program
from anncvt.progress import SILENT, Progress
from anncvt.runtime import integer_network, integer_torch, integer_tvm
from anncvt.runtime.integer_network import IntegerNetwork
from anncvt.sources import NoSuchSplit

if TYPE_CHECKING:
    from anncvt.pkkd import DistillConfig

#: Test images that the integers are measured on, unless a limit says otherwise.
EVALUATION_IMAGES = 10_000


def quantize_folder(
    program: Program,
    calibration: DataChoice,
    config: QuantizeConfig,
    *,
    training: DistillConfig | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Quantise the student of a program folder, keep the result beside it and measure it where there are labels.

    Args:
        training: distil the student on its integers' grids before, on the labelled images of ``calibration``. That
            changes the student of the folder.

    Returns:
        ``{"settings", "layers", "accuracy"}``: what it was made with, what each layer became, and the accuracy as
        :func:`evaluate_all` gives it (None without labelled test images).

    Raises:
        AnncvtError: no folder, or the network or the data cannot be used.
    """
    place = program.folder
    if place is None:
        raise AnncvtError("the program is in no folder yet", fix="save it first: `anncvt convert MODEL -o DIR`")
    begin = time.monotonic()
    images = calibration.open("train", program.preprocess, at_most=config.images, labelled=False, progress=progress)
    network = quantize(program, images, config, progress=progress)
    if training is not None:
        yardstick = pipeline.Yardstick.find(program, calibration, required=True, progress=progress)
        program = pipeline.distil(
            program,
            Path(place),
            calibration,
            yardstick,
            training,
            resume=False,
            integers=network,
            progress=progress,
        )
        assert program.student is not None
        with fake_quantised(program.student, network):
            network = quantize(program, images, config, trained_on=network, progress=progress)
        network.settings["epochs"] = training.epochs
    integer_network.save(network, place)
    pipeline.discard(Path(place), folder.FROM_INTEGERS, progress)
    measured = None
    try:
        test = calibration.open("test", program.preprocess, at_most=EVALUATION_IMAGES, progress=progress)
        measured = evaluate_all(program, test, progress=progress)
    except NoSuchSplit as error:
        progress.note(f"no accuracy will be measured: {error}")
    program.record("quantized", time.monotonic() - begin, {**network.settings, **(measured or {})}, calibration.seed)
    folder.save(program, place)
    return {"settings": network.settings, "layers": layers(network), "accuracy": measured}


def evaluate_all(
    program: Program, images: Images, *, batch_size: int = 256, progress: Progress = SILENT
) -> dict[str, Any]:
    """:func:`anncvt.measure.accuracy_on`, and under "integer" the folder's integer network with its "bits"."""
    measured = accuracy_on(program, images, batch_size=batch_size, progress=progress)
    if program.folder is not None and integer_network.exists(program.folder):
        network = integer_network.load(program.folder)
        measured["integer"] = {
            **accuracy_of(network, images, batch_size=batch_size, progress=progress),
            "bits": network.settings["bits"],
        }
    return measured


def accuracy_of(
    network: IntegerNetwork, images: Images, *, batch_size: int = 256, progress: Progress = SILENT
) -> dict[str, float]:
    """Top-1 and top-5 of the integers, in percent; on compiled kernels where there are any."""
    compiled = integer_tvm.Compiled(network) if integer_tvm.usable() else None

    def scores(indices: Tensor) -> Tensor:
        pixels = images.pixels[indices]
        return integer_torch.run(network, pixels) if compiled is None else compiled.run(pixels)

    return evaluate_scores(scores, images, batch_size=batch_size, progress=progress)


def layers(network: IntegerNetwork) -> list[dict[str, Any]]:
    """What each step is: its grid, its accumulator's proven width, its shift."""
    rows = []
    for step in network.steps:
        row: dict[str, Any] = {
            "name": step.name,
            "op": step.op,
            "shape": list(step.shape),
            "scale": step.grid.scale,
            "zero": step.grid.zero,
            "bits": step.grid.bits,
        }
        if step.epilogue is not None:
            row |= {
                "accumulator_bits": integer_network.accumulator_bits(network, step),
                "shift": step.epilogue.shift,
            }
        rows.append(row)
    return rows
