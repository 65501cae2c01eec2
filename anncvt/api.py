"""What the command line calls, for use from Python; re-exported by :mod:`anncvt`.

Here is the way to an adder network, and the report; what becomes of the network is in :mod:`anncvt.shipping`.

Wherever a function takes a ``program``, the path of a program folder does as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anncvt import devices, launch, pipeline
from anncvt.arguments import beside, choice_of, opened
from anncvt.errors import AnncvtError
from anncvt.measure import DataChoice, accuracy, chosen, gate, remember, require_parity
from anncvt.program import Program
from anncvt.progress import SILENT, Progress
from anncvt.shipping import (
    bench,
    build_kernels,
    check,
    check_integers,
    compile,
    compile_for_onnxruntime,
    export,
    export_hardware,
    run,
)

if TYPE_CHECKING:
    from torch import nn

    from anncvt.pkkd import DistillConfig

__all__ = [
    "DataChoice",
    "accuracy",
    "bench",
    "build_kernels",
    "check",
    "check_integers",
    "compile",
    "compile_for_onnxruntime",
    "convert",
    "distill",
    "evaluate",
    "export",
    "export_hardware",
    "gate",
    "load",
    "plan",
    "quantize",
    "report",
    "require_parity",
    "run",
]

REPORT = "report.html"


def load(
    model: str | Path | nn.Module,
    *,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    input_size: int | tuple[int, ...] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    trust_pickle: bool = False,
    progress: Progress = SILENT,
) -> Program:
    """Load a CNN, or a program folder.

    Args:
        model: a checkpoint file, ``torchvision:NAME``, ``timm:NAME``, ``package.module:factory``, an ``nn.Module``, or
            a program folder (which takes no further options).
        arch: architecture of a checkpoint that holds weights alone, ``module:factory``, ``torchvision:NAME``, ...
        arch_args: keyword arguments of the factory.
        input_size: pixels, ``(height, width)`` or ``(channels, height, width)``.
        mean, std: per channel, of pixels scaled to [0, 1].
        trust_pickle: run the code of a pickled checkpoint. It can do anything to your machine.

    Raises:
        AnncvtError: nothing there, not a checkpoint, or it does not fit the architecture.
    """
    options: dict[str, Any] = {"arch": arch, "arch_args": arch_args, "mean": mean, "std": std}
    return pipeline.open_model(model, input_size=input_size, trust_pickle=trust_pickle, progress=progress, **options)


def plan(
    program: Program | str | Path,
    *,
    keep: Sequence[str] = (),
    swap: Sequence[str] = (),
    copies: int | Mapping[str, int] | None = None,
    policy: str | None = None,
    plan_file: str | Path | None = None,
    linear: bool = False,
    dump: str | Path | None = None,
    progress: Progress = SILENT,
) -> Program:
    """Decide which layers become adders. A program that has a plan keeps it unless one of the arguments says else.

    Args:
        keep, swap: GLOBs over layer names, against the plan file and the policy.
        copies: weights that adders compare every input with, 1 to 4, of all of them or by GLOB.
        policy: what stays a convolution: "no-depthwise" (default), "paper" or "all".
        plan_file: what ``anncvt plan --json`` wrote, with other actions.
        linear: Linear layers become adders, too.
        dump: a folder for the network's graphs before and after.

    Raises:
        AnncvtError: a GLOB matches nothing or asks for the impossible, the plan file does not fit, or there is nothing
            to convert.
    """
    from anncvt.passes.choice import Choice
    from anncvt.passes.pipeline import apply
    from anncvt.passes.plan import plan as plan_pass

    program = opened(program, progress)
    choice = Choice.of(keep=keep, swap=swap, copies=copies, policy=policy, plan_file=plan_file, linear=linear)
    if program.plan is not None and choice == Choice() and policy is None:
        return program
    return apply(plan_pass, program, choice, to=None if dump is None else Path(dump), progress=progress)


def convert(
    model: str | Path | nn.Module,
    *,
    output: str | Path,
    calibrate: str | None = None,
    distill: str | None = None,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    input_size: int | tuple[int, ...] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    trust_pickle: bool = False,
    keep: Sequence[str] = (),
    swap: Sequence[str] = (),
    copies: int | Mapping[str, int] | None = None,
    policy: str | None = None,
    plan_file: str | Path | None = None,
    linear: bool = False,
    dump: str | Path | None = None,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    workers: int = 0,
    budget: float | None = None,
    memory: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    config: DistillConfig | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
    **training: Any,
) -> Program:
    """The whole way from a CNN to an adder network: load, plan, rewrite, calibrate and, if asked for, distil.

    The folder ``output`` is written after every stage, so that an interrupted conversion can be resumed.

    Args:
        model, arch, arch_args, input_size, mean, std, trust_pickle: see :func:`load`.
        output: the program folder to write.
        calibrate: DATA to fit the adder network to the CNN on; labels are not looked at. Default: that of ``distill``.
        distill: DATA with labels to train on afterwards, for ``epochs``. None: no distillation.
        keep, swap, copies, policy, plan_file, linear: see :func:`plan`.
        dump: a folder for the network's graphs before and after each pass.
        data_dir: where data sets known by name lie.
        limit: at most so many images of each split (calibration takes 5000 unless told).
        workers: decoding threads, 0: one per core.
        budget: seconds for the calibration.
        memory: bytes for the calibration's activations; None: 4 GiB. The process takes about 2 GiB more.
        epochs, batch_size, lr: of the distillation; they win over ``config``.
        config: all hyper-parameters of the distillation.
        seed: of sampling, order and augmentation (of the distillation only where there is no ``config``).
        device: where to distil: "cpu", "cuda", or "auto", a GPU where there is one. Calibration is on the CPU.
        resume: go on where the conversion in ``output`` stopped.
        force: replace the program in ``output``.
        training: further fields of :class:`~anncvt.pkkd.DistillConfig`, which win over ``config``.

    Raises:
        AnncvtError: no data, or any stage failed; what was finished before is in ``output``.
    """
    if calibrate is None and distill is None:
        raise AnncvtError(
            "no images to convert with: a copy of the CNN's weights alone makes no working adder network",
            fix="name images like those the CNN was trained on: --calibrate DATA (labels are not needed)",
        )

    from anncvt.passes.choice import Choice

    def data(spec: str) -> DataChoice:
        return DataChoice(spec, None if data_dir is None else str(data_dir), limit, workers, seed)

    return pipeline.convert(
        model,
        Path(output),
        calibration=data(calibrate or distill or ""),
        training=None if distill is None else data(distill),
        config=_distill_config(config, seed, epochs=epochs, batch_size=batch_size, lr=lr, **training),
        choice=Choice.of(keep=keep, swap=swap, copies=copies, policy=policy, plan_file=plan_file, linear=linear),
        budget=budget,
        memory=memory,
        resume=resume,
        force=force,
        dump=None if dump is None else Path(dump),
        device=devices.choose(device),
        options={
            "arch": arch,
            "arch_args": arch_args,
            "input_size": input_size,
            "mean": mean,
            "std": std,
            "trust_pickle": trust_pickle,
        },
        progress=progress,
    )


def distill(
    program: Program | str | Path,
    data: DataChoice | str | None = None,
    *,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    config: DistillConfig | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    progress: Progress = SILENT,
    **training: Any,
) -> Program:
    """Distil (further) what was converted, and save it to its folder.

    Under torchrun every process calls it, and the first of them measures, prints and writes.

    Args:
        data: DATA with labels; default: that of the conversion.
        epochs, batch_size, lr, config, seed, device, training: see :func:`convert`.
        resume: go on from the last training checkpoint in the folder.

    Raises:
        AnncvtError: the program has no folder or no adder network, or the data have no labels.
    """
    program = opened(program, progress)
    if program.student is None or program.folder is None:
        raise AnncvtError(
            "there is no adder network to distil", where=program.folder, fix="`anncvt convert MODEL -o DIR` first"
        )
    choice = chosen(program, choice_of(data))
    settings = _distill_config(config, seed, epochs=epochs, batch_size=batch_size, lr=lr, **training)
    yardstick = pipeline.Yardstick(None, None)
    if launch.rank() == 0:
        yardstick = pipeline.Yardstick.find(program, choice, required=True, progress=progress)
    remember(program, distill=choice)
    where = devices.choose(device)
    return pipeline.distil(
        program, Path(program.folder), choice, yardstick, settings, resume=resume, device=where, progress=progress
    )


def evaluate(
    program: Program | str | Path,
    data: DataChoice | str | None = None,
    *,
    split: str = "test",
    batch_size: int = 256,
    device: str = "auto",
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy, ``{"student": {"top1", "top5"}, "teacher": {...}, "images", "data"}`` in percent.

    With "integer" where the folder holds an integer network.

    Args:
        data: DATA with labels; default: that of the conversion.
        split: "test" or "train".
        device: "cpu", "cuda" or "auto", see :func:`convert`. Integer networks run on the CPU.

    Raises:
        AnncvtError: no data, no labels, or they do not fit the network.
    """
    program = opened(program, progress)
    if split not in ("train", "test"):
        raise AnncvtError(f"no such split: {split!r}", fix="choose train or test")
    images = chosen(program, choice_of(data)).open(
        "train" if split == "train" else "test", program.preprocess, progress=progress
    )
    from anncvt.quantization import evaluate_all

    with devices.on(devices.choose(device), program.student, program.teacher):
        return evaluate_all(program, images, batch_size=batch_size, progress=progress)


def quantize(
    program: Program | str | Path,
    calibrate: DataChoice | str | None = None,
    *,
    bits: int = 8,
    groups: int = 1,
    range: str = "mse",
    power_of_two: bool = False,
    qat: bool = False,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    config: DistillConfig | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Make the integer network of a program folder, ``integer.json`` and ``integer.safetensors`` in it.

    Args:
        calibrate: DATA to choose ranges on, unlabelled; default: that of the conversion.
        bits, groups, range, power_of_two: see :class:`anncvt.passes.quantize.QuantizeConfig`.
        qat: before, distil the adder network on the grids of its integers (quantization-aware), on labelled images.
        epochs, batch_size, lr, config, seed: of that distillation, see :func:`convert`.

    Returns:
        See :func:`anncvt.quantization.quantize_folder`.

    Raises:
        AnncvtError: nothing converted yet, no data, or an operator that integer networks do not have.
    """
    from anncvt.passes.quantize import QuantizeConfig
    from anncvt.quantization import quantize_folder

    program = opened(program, progress)
    choice = chosen(program, choice_of(calibrate))
    settings = QuantizeConfig(bits=bits, groups=groups, range=range, power_of_two=power_of_two)
    training = _distill_config(config, seed, epochs=epochs, batch_size=batch_size, lr=lr) if qat else None
    return quantize_folder(program, choice, settings, training=training, progress=progress)


def report(
    program: Program | str | Path,
    path: str | Path | None = None,
    data: DataChoice | str | None = None,
    *,
    energy_table: str | Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Write a report as one HTML file, to ``report.html`` in the folder unless ``path`` says else.

    Args:
        data: images to look at; default: those of the conversion.
        energy_table: a TOML file of energies, see :func:`anncvt.energy.load_table`.

    Returns:
        What it shows, see :func:`anncvt.facts.gather`, and its "path".

    Raises:
        AnncvtError: the table or ``data`` cannot be read, or ``path`` not be written.
    """
    from anncvt.energy import HOROWITZ_45NM, load_table
    from anncvt.facts import gather
    from anncvt.files import write_text
    from anncvt.page import page

    program = opened(program, progress)
    target = beside(program, path, REPORT)
    table = HOROWITZ_45NM if energy_table is None else load_table(energy_table)
    facts = gather(program, choice_of(data), table=table, progress=progress)
    write_text(target, page(facts))
    return {**facts, "path": str(target)}


def _distill_config(config: DistillConfig | None, seed: int, **given: Any) -> DistillConfig:
    """``config``, or the defaults with ``seed``; what is ``given`` wins."""
    from anncvt.pkkd import DistillConfig

    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(config or DistillConfig(seed=seed), **given)
