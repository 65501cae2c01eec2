"""The verbs of ``anncvt``: parse, call :mod:`anncvt.api`, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from anncvt import options
from anncvt.verbs import Verbs, answer, working


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(None, "-V", "--version", package_name="anncvt", message="anncvt %(version)s")
def cli() -> None:
    """Turn a pretrained CNN into an adder neural network (y = -sum |x - w|): convert, distil, export, compile, check.

    \b
    MODEL is a checkpoint (.pth, .safetensors, ...), torchvision:NAME, timm:NAME, hf-hub:NAME or module:factory.
    DATA is digits, synthetic, cifar10, cifar100, mnist, fashion-mnist, imagenet (in --data-dir),
    folder:PATH, hf:PATH or wds:PATTERN.
    Exit codes: 0 done, 1 error, 2 usage, 3 accuracy gate or parity failed.
    """


@cli.command(epilog="Example: anncvt plan resnet18.pth --arch torchvision:resnet18 --keep 'layer4.*'")
@options.model
@options.layers
@options.common
def plan(model: str, **rest: Any) -> None:
    """Show which layers become adders, and why.

    MODEL is a checkpoint file, torchvision:NAME, timm:NAME, hf-hub:NAME or module:factory. It may also be a converted
    folder: then plan shows what happened there. To choose layer by layer, write the plan with
    --json, edit its actions ("swap" or "keep"), and pass it back with --plan.
    """
    from anncvt import api, report

    loading = _loading({name: rest.pop(name) for name in LOADING})
    with working() as progress:
        program = api.plan(api.load(model, **loading, progress=progress), **rest, progress=progress)
    assert program.plan is not None
    answer(program.plan.to_json(), report.plan(program.plan))


@cli.command(
    epilog="Example: anncvt convert net.pth --arch mynet:Net --arch-args depth=20 --calibrate folder:photos "
    "--distill folder:photos --epochs 5 -o net.ann"
)
@options.model
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The folder to write, for example net.ann.")
@options.layers
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
@click.option("--calibrate", metavar="DATA", help="Images to fit the adders on, unlabelled.  [default: --distill]")
@click.option("--distill", metavar="DATA", help="Labelled images to train on afterwards.")
@options.reading
@click.option("--budget", type=options.Duration(), metavar="TIME", help="Time for the calibration: 90s, 5m, 1h.")
@click.option("--memory", type=options.Bytes(), help="For the calibration's activations: 500M, 8G.  [default: 4G]")
@options.training
@options.hidden_training
@options.max_drop
@click.option("--resume", is_flag=True, help="Go on where the conversion in the output folder stopped.")
@click.option("--force", is_flag=True, help="Replace the program in the output folder.")
@options.hardware
@options.common
def convert(model: str, output: Path | None, dry_run: bool, max_drop: float | None, **rest: Any) -> None:
    """Turn a CNN into an adder network.

    MODEL is a checkpoint file, torchvision:NAME, timm:NAME, hf-hub:NAME or module:factory.

    The whole way: plan, rewrite, calibrate and, with --distill, train.

    The output folder is written after every stage. After an interruption the same command with --resume goes on.
    The other options of `anncvt distill` are taken, too.
    """
    from anncvt import api, report

    if rest["distill"] is None:
        _refuse_training(rest, "--distill")
    loading = _loading({name: rest.pop(name) for name in LOADING})
    if dry_run:
        with working() as progress:
            program = api.load(model, **loading, progress=progress)
            program = api.plan(program, **{name: rest[name] for name in LAYERS}, progress=progress)
        assert program.plan is not None
        answer(program.plan.to_json(), report.plan(program.plan))
        return
    if output is None:
        raise click.UsageError("where should the result go? Give -o FOLDER, for example -o net.ann (or --dry-run).")
    with working() as progress:
        program = api.convert(model, output=output, **loading, **rest, progress=progress)
    measured = api.accuracy(program)
    answer(
        report.summary(program),
        *([report.accuracy(measured)] if measured else []),
        f"wrote {output}; next: anncvt export {output} && anncvt compile {output} && anncvt check {output}",
    )
    if max_drop is not None:
        api.gate(measured, max_drop)


@cli.command(epilog="Example: anncvt distill net.ann --epochs 10")
@click.argument("folder", type=click.Path())
@click.option("--data", metavar="DATA", help="Labelled images.  [default: those of the conversion]")
@options.reading
@options.training
@options.more_training
@options.max_drop
@click.option("--resume", is_flag=True, help="Go on from the last training checkpoint.")
@options.hardware
@options.common
def distill(folder: str, max_drop: float | None, **rest: Any) -> None:
    """Train an adder network with its CNN as teacher (PKKD)."""
    from anncvt import api, report

    seed = rest["seed"]
    with working() as progress:
        program = api.distill(folder, _data(rest), seed=seed, **rest, progress=progress)
    measured = api.accuracy(program)
    answer(report.summary(program), *([report.accuracy(measured)] if measured else []))
    if max_drop is not None:
        api.gate(measured, max_drop)


@cli.command(epilog="Example: anncvt evaluate net.ann --data hf:../cifar10 --limit 2000")
@click.argument("model", metavar="MODEL_OR_FOLDER")
@click.option("--data", metavar="DATA", help="Labelled images.  [default: those of the conversion]")
@click.option("--split", type=click.Choice(["test", "train"]), default="test", show_default=True)
@options.reading
@click.option("--batch-size", type=click.IntRange(1), default=256, show_default=True)
@options.max_drop
@options.hardware
@options.common
def evaluate(model: str, split: str, batch_size: int, max_drop: float | None, **rest: Any) -> None:
    """Measure the accuracy of an adder network and its CNN."""
    from anncvt import api, report

    with working() as progress:
        measured = api.evaluate(
            model, _data(rest), split=split, batch_size=batch_size, device=rest["device"], progress=progress
        )
    answer(measured, report.accuracy(measured))
    if max_drop is not None:
        api.gate(measured, max_drop)


@cli.command(epilog="Example: anncvt quantize net.ann --calibrate folder:photos --bits 6")
@click.argument("folder", type=click.Path())
@click.option(
    "--calibrate", "data", metavar="DATA", help="Images to choose ranges on, unlabelled.  [default: of the conversion]"
)
@click.option(
    "--bits", type=click.Choice(["8", "6", "5", "4"]), default="8", show_default=True, help="Of adder layers."
)
@click.option("--groups", type=click.IntRange(1), default=1, show_default=True, help="Filter groups of a layer.")
@click.option(
    "--range",
    type=click.Choice(["percentile", "mse", "entropy"]),
    default="mse",
    show_default=True,
    help="How ranges are chosen.",
)
@click.option("--power-of-two", is_flag=True, help="Scales are powers of two.")
@click.option("--qat", is_flag=True, help="Distil the adder network on its integers' grids before; takes labels.")
@options.reading
@options.training
@options.threads
@options.common
def quantize(folder: str, bits: str, **rest: Any) -> None:
    """Make an integer network of an adder network.

    It is written into the folder; evaluate shows its accuracy beside the others.
    """
    from anncvt import api, report

    if not rest["qat"]:
        _refuse_training(rest, "--qat")
    seed = rest["seed"]
    with working() as progress:
        result = api.quantize(folder, _data(rest), bits=int(bits), seed=seed, **rest, progress=progress)
    measured = result["accuracy"]
    answer(result, report.integers(result), *([report.accuracy(measured)] if measured else []))


@cli.command(epilog="Example: anncvt export net.ann")
@click.argument("folder", type=click.Path())
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    help="Where to.  [default: FOLDER/model.onnx, model.int8.onnx or hardware]",
)
@click.option("--int8", is_flag=True, help="onnx: the integers that quantize made.")
@click.option("--opset", type=int, help="onnx: operator set.  [default: 18, with --int8 19]")
@click.option(
    "--body",
    type=click.Choice(["scan", "one"]),
    default="scan",
    show_default=True,
    help="onnx: the adders' definition for runtimes without a kernel: of little memory, or without control flow.",
)
@click.option(
    "--fuse",
    is_flag=True,
    help="onnx: adders, with --int8 all layers, and what follows them as one node, for the fast library.",
)
@click.option("--format", "form", type=click.Choice(["onnx", "hardware"]), default="onnx", show_default=True)
@click.option("--golden", type=click.IntRange(1), default=2, show_default=True, help="hardware: images to trace.")
@click.option("--data", metavar="DATA", help="hardware: these images.  [default: test images of the conversion]")
@options.reading
@options.common
def export(
    folder: str,
    output: str | None,
    int8: bool,
    opset: int | None,
    body: str,
    fuse: bool,
    form: str,
    golden: int,
    **rest: Any,
) -> None:
    """Write an adder network as ONNX, or its integers for hardware.

    onnx runs in any onnxruntime. hardware is a folder of integer weights and golden vectors, of what quantize made.
    """
    from anncvt import api

    with working() as progress:
        if form == "onnx":
            path = api.export(folder, output, integers=int8, opset=opset, body=body, fuse=fuse, progress=progress)
            answer(_file(path), f"wrote {path}")
        else:
            path = api.export_hardware(folder, output, _data(rest), golden=golden, progress=progress)
            files = sorted(str(part.relative_to(path)) for part in path.rglob("*") if part.is_file())
            answer({"path": str(path), "files": files}, f"wrote {path}, {len(files)} files; see {path}/SEMANTICS.md")


@cli.command("compile", epilog="Example: anncvt compile net.ann --target avx2")
@click.argument("folder", type=click.Path())
@click.option(
    "-o", "--output", type=click.Path(), help="The file to write.  [default: FOLDER/model.so or libanncvt_ort.so]"
)
@click.option(
    "--for",
    "runtime",
    type=click.Choice(["tvm", "onnxruntime"]),
    default="tvm",
    show_default=True,
    help="onnxruntime: the library that makes the folder's ONNX files fast there.",
)
@click.option(
    "--target",
    help="cpu (this machine), avx2, avx512, or an LLVM target.  [default: cpu; for onnxruntime: every x86-64]",
)
@click.option(
    "--batch", "batches", type=click.IntRange(1), multiple=True, help="Make it fast for such batches, too (repeatable)."
)
@click.option("--int8", is_flag=True, help="Compile the integer network, to FOLDER/model.int8.so.")
@click.option(
    "--fixed16/--no-fixed16",
    default=None,
    help="Floats in and out, adders in 16-bit fixed point or in float32. Fixed point is faster, nearly as exact, and "
    "needs AVX2.  [default: fixed point with AVX-512, where logits stay the same]",
)
@options.common
def compile_(
    folder: str,
    output: str | None,
    runtime: str,
    target: str | None,
    batches: tuple[int, ...],
    int8: bool,
    fixed16: bool | None,
) -> None:
    """Compile an adder network with TVM.

    The result is a shared library that runs without torch, on any number of images at once; with --for onnxruntime, one
    that onnxruntime loads.
    """
    from anncvt import api
    from anncvt.runtime import artifact

    if runtime == "onnxruntime" and (batches or int8):
        raise click.UsageError(
            "--batch and --int8 are for TVM; a library for onnxruntime serves all batches and integers."
        )
    if int8 and fixed16 is not None:
        raise click.UsageError("--fixed16 and --no-fixed16 are for the network of floats, --int8 for that of integers.")
    with working() as progress:
        if runtime == "onnxruntime":
            path = api.compile_for_onnxruntime(folder, output, target=target, fixed=fixed16, progress=progress)
        else:
            path = api.compile(
                folder, output, target=target or "cpu", batch=batches, integers=int8, fixed=fixed16, progress=progress
            )
    manifest = artifact.read_manifest(path)
    fixed = (manifest if runtime == "onnxruntime" else manifest["target"])["fixed"]
    inside = " (adders in 16-bit fixed point where that pays; --no-fixed16: float32)" if fixed else ""
    answer({**_file(path), "fixed": fixed}, f"wrote {path}{inside}")


@cli.command(epilog="Example: anncvt check net.ann --limit 100")
@click.argument("folder", type=click.Path())
@click.option("--data", metavar="DATA", help="Images to compare on.  [default: test images of the conversion]")
@options.reading
@click.option("--onnx", "onnx_path", type=click.Path(), help="[default: FOLDER/model.onnx, --int8: model.int8.onnx]")
@click.option("--so", "so_path", type=click.Path(), help="[default: FOLDER/model.so, --int8: model.int8.so]")
@click.option("--int8", is_flag=True, help="Compare the executions of the integer network, bit for bit.")
@click.option("--layers", is_flag=True, help="--int8: list every layer.")
@options.threads
@options.common
def check(folder: str, onnx_path: str | None, so_path: str | None, int8: bool, layers: bool, **rest: Any) -> None:
    """Compare torch, onnxruntime and TVM.

    On up to 1000 images unless --limit says else, integers on 2. Ends with exit code 3 if they differ.
    """
    from anncvt import api, report

    if int8:
        from anncvt.runtime.check_integers import require_equal

        with working() as progress:
            result = api.check_integers(folder, _data(rest), onnx_path=onnx_path, so_path=so_path, progress=progress)
        answer(result, report.equality(result, layers=layers))
        require_equal(result)
        return
    if layers:
        raise click.UsageError("--layers is for --int8.")
    with working() as progress:
        result = api.check(folder, _data(rest), onnx_path=onnx_path, so_path=so_path, progress=progress)
    answer(result, report.parity(result))
    api.require_parity(result)


@cli.command(epilog="Example: anncvt run net.ann --input cat.png --backend onnxruntime")
@click.argument("folder", type=click.Path())
@click.option("--input", "inputs", type=click.Path(), multiple=True, required=True, help="A picture (repeatable).")
@click.option(
    "--backend", type=click.Choice(["torch", "onnxruntime", "tvm"]), default="torch", show_default=True, help="Runs it."
)
@click.option("--int8", is_flag=True, help="Run the integer network.")
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="So many classes.")
@options.device
@options.threads
@options.common
def run(folder: str, inputs: tuple[str, ...], backend: str, int8: bool, top: int, device: str) -> None:
    """Classify pictures."""
    from anncvt import api, report

    with working() as progress:
        found = api.run(folder, inputs, backend=backend, integers=int8, device=device, top=top, progress=progress)
    answer({"backend": backend, "images": found}, report.predictions(found))


@cli.command(epilog="Example: anncvt bench net.ann --batch 8 --threads 1")
@click.argument("folder", type=click.Path())
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Images a call.")
@click.option("--repeats", type=click.IntRange(1), default=50, show_default=True, help="Timed calls of each network.")
@click.option("--budget", type=options.Duration(), default="1m", show_default=True, help="Time for all calls together.")
@click.option("--teacher-tvm", "teacher_in_tvm", is_flag=True, help="Compile the CNN with TVM and time that, too.")
@options.device
@options.threads
@options.common
def bench(folder: str, batch: int, repeats: int, budget: float, teacher_in_tvm: bool, device: str) -> None:
    """Time an adder network against its CNN.

    In torch, onnxruntime (with the native library, too, if the folder has it) and TVM, in floats and (of what
    `export --int8` and `compile --int8` wrote, and of the CNN quantized by onnxruntime) in integers. On a GPU (--device
    cuda) in torch, in floats.
    """
    from anncvt import api, report

    with working() as progress:
        result = api.bench(
            folder,
            batch=batch,
            repeats=repeats,
            seconds=budget,
            device=device,
            teacher_in_tvm=teacher_in_tvm,
            progress=progress,
        )
    answer(result, report.latency(result))


@cli.command(epilog="Example: anncvt report net.ann")
@click.argument("folder", type=click.Path())
@click.option("-o", "--output", type=click.Path(), help="The HTML file to write.  [default: FOLDER/report.html]")
@click.option("--energy-table", type=click.Path(), metavar="FILE", help="Energies, as TOML.  [default: 45 nm]")
@click.option("--data", metavar="DATA", help="Images to look at.  [default: test images of the conversion]")
@options.reading
@options.threads
@options.common
def report(folder: str, output: str | None, energy_table: str | None, **rest: Any) -> None:
    """Show what is in a folder, as tables and as a web page.

    Where it came from, what was done, what it reached, how its layers do, what they would cost in hardware. The page is
    one file that needs no network.
    """
    from anncvt import api
    from anncvt import report as tables

    with working() as progress:
        facts = api.report(folder, output, _data(rest), energy_table=energy_table, progress=progress)
    shown = [tables.program(facts)]
    if facts["plan"]:
        shown += [tables.layers(facts), tables.energy(facts["costs"])]
    answer(facts, *shown, f"wrote {facts['path']}")


@cli.command(epilog="Example: anncvt kernels build --arch sm_80,sm_90 -o kernels")
@click.argument("action", type=click.Choice(["build"]))
@click.option("--arch", required=True, metavar="SM", help="Architectures of GPUs, separated by commas: sm_80,sm_90.")
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    metavar="TYPE",
    help="Of images: float32, float16, bfloat16, or several, separated by commas.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to.  [default: the cache of kernels]")
@options.common
def kernels(action: str, arch: str, dtype: str, output: Path | None) -> None:
    """Compile the CUDA kernels for GPUs that are elsewhere.

    They serve layers of any shape. Needs TVM, and NVRTC or nvcc, but no GPU. Where they go, name the folder in
    ANNCVT_CACHE.
    """
    from anncvt import api

    with working() as progress:
        paths = api.build_kernels(arch.split(","), dtype.split(","), output=output, progress=progress)
    size = sum(path.stat().st_size for path in paths)
    answer(
        {"folder": str(paths[0].parent), "files": [path.name for path in paths], "bytes": size},
        f"wrote {len(paths)} kernels, {size / 2**20:.1f} MiB, to {paths[0].parent}",
    )


LAYERS = ("keep", "swap", "copies", "policy", "plan_file", "linear", "dump")
LOADING = ("arch", "arch_args", "input_size", "mean", "std", "trust_pickle")


def _loading(values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "arch_args": dict(values["arch_args"])}


def _refuse_training(values: dict[str, Any], needed: str) -> None:
    """Options of the training do nothing without ``needed``."""
    given = next((name for name in options.TRAINING if values.get(name) is not None), None)
    if given is not None:
        raise click.UsageError(f"--{given.replace('_', '-')} is for the training of {needed}.")


def _data(values: dict[str, Any]) -> Any:
    """Take DATA and how to read it out of a verb's ``values``."""
    from anncvt.measure import DataChoice

    return DataChoice(*(values.pop(name) for name in ("data", "data_dir", "limit", "workers", "seed")))


def _file(path: Path) -> dict[str, Any]:
    return {"path": str(path), "bytes": path.stat().st_size}


def main() -> None:
    """The console script."""
    cli(prog_name="anncvt")
