"""Who takes part in a benchmark: the adder network and its CNN, in every runtime at hand, in floats and in integers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from anncvt.errors import AnncvtError
from anncvt.program import Program
from anncvt.progress import Progress
from anncvt.runtime import processor
from anncvt.runtime.check import exported_file

if TYPE_CHECKING:
    import torch

#: The dtype of networks whose adders are in 16-bit fixed point; images and logits are float32.
FIXED = "fixed16"
#: One call: images ``[N, C, H, W]`` of the contestant's dtype -> logits.
Call = Callable[[np.ndarray], np.ndarray]


class Opened(NamedTuple):
    """A loaded network, and whether any of its layers run in 16-bit fixed point."""

    call: Call
    fixed: bool = False


@dataclass
class Contestant:
    """One network in one runtime. ``open`` loads it; ``dtype`` is "float32", :data:`FIXED` (which shows when it is
    loaded), or "int8" (whose calls take uint8 pixels, where ``pixels``)."""

    network: str  # "student" or "teacher"
    backend: str
    dtype: str
    open: Callable[[], Opened]
    pixels: bool = False
    times: list[float] = field(default_factory=list)  # seconds
    memory: int | None = None  # bytes added by loading it and by a first call, at the peak

    @property
    def name(self) -> tuple[str, str, str]:
        return self.network, self.backend, self.dtype


def in_onnxruntime(path: Path, threads: int | None = None, library: str | Path = "none") -> Opened:
    """A file in onnxruntime; ``library``: the native one, or ``"none"``: the definitions in the file."""
    from anncvt.runtime import onnx

    session = onnx.session(path, threads=threads, library=library)
    return Opened(functools.partial(onnx.run, session), session.anncvt.fixed > 0)


def in_tvm(path: Path, threads: int | None = None) -> Opened:
    """A network that TVM compiled."""
    from anncvt.runtime import tvm

    model = tvm.load(path, threads=threads)
    return Opened(model, model.manifest["target"]["fixed"])


class Contestants:
    """All that can be had of ``program``; what cannot, and why, is in ``missing`` afterwards.

    Args:
        scratch: a folder for files made for the occasion.
        onnx_path, so_path, integer_path: the student's files. None: those of the program's folder. Without an exported
            student one is exported to ``scratch``; exported integers are taken from the folder.
        device: of torch; elsewhere than on the CPU nothing else takes part.
        teacher_in_tvm: compile the CNN, too.
    """

    def __init__(
        self,
        program: Program,
        threads: int,
        scratch: Path,
        *,
        onnx_path: str | Path | None = None,
        so_path: str | Path | None = None,
        integer_path: str | Path | None = None,
        device: torch.device,
        teacher_in_tvm: bool = False,
        progress: Progress,
    ) -> None:
        self.program, self.threads, self.scratch, self.progress = program, threads, scratch, progress
        self.onnx_path = onnx_path or exported_file(program, "model.onnx")
        self.so_path = so_path or exported_file(program, "model.so")
        self.integer_path = integer_path or exported_file(program, "model.int8.so")
        self.device, self.teacher_in_tvm = device, teacher_in_tvm
        self.missing: dict[str, str] = {}

    def __iter__(self) -> Iterator[Contestant]:
        student, teacher = (self._in_torch(network) for network in ("student", "teacher"))
        if self.device.type == "cpu":
            yield from self._on_cpu(student, teacher)
        else:
            self.missing.update(dict.fromkeys(("onnxruntime", "tvm"), f"runs on the CPU, not on {self.device}"))
            yield from (student, teacher)

    def _in_torch(self, name: str) -> Contestant:
        from anncvt.runtime.torch_runner import runner

        network = getattr(self.program, name)
        return Contestant(name, "torch", "float32", lambda: Opened(runner(network, self.device, self.progress)))

    def _on_cpu(self, student: Contestant, teacher: Contestant) -> Iterator[Contestant]:
        from anncvt.runtime import onnx

        program, threads, size = self.program, self.threads, self.program.preprocess.input_size
        exported = Path(self.onnx_path or onnx.export(program, self.scratch / "student.onnx", progress=self.progress))
        cnn = self.scratch / "teacher.onnx"
        onnx.export_network(program.teacher, size, cnn, progress=self.progress)
        yield student
        yield from self._exported(exported, "float32")
        if (integer_file := exported_file(program, "model.int8.onnx")) is not None:
            yield from self._exported(integer_file, "int8")
        yield from self._compiled()
        yield teacher
        yield Contestant("teacher", "onnxruntime", "float32", lambda: in_onnxruntime(cnn, threads))
        try:
            integers = quantised(cnn, self.scratch / "teacher.int8.onnx", size)
            yield Contestant("teacher", "onnxruntime", "int8", lambda: in_onnxruntime(integers, threads))
        except AnncvtError as error:
            self.missing["onnxruntime int8"] = str(error)

    def _exported(self, path: Path, dtype: str) -> Iterator[Contestant]:
        """An exported student on the definitions in the file, and on the native library if that can be had."""
        from anncvt.runtime.onnx_session import choose

        yield Contestant("student", "onnxruntime", dtype, functools.partial(in_onnxruntime, path, self.threads))
        choice = choose(path)
        if choice.library is not None:
            native = functools.partial(in_onnxruntime, path, self.threads, choice.library)
            yield Contestant("student", "onnxruntime native", dtype, native)
        elif choice.unfit:
            self.missing["onnxruntime native" + " int8" * (dtype == "int8")] = choice.why

    def _compiled(self) -> Iterator[Contestant]:
        """The student, and if asked the teacher, in TVM."""
        paths = {"tvm": (self.so_path, "compile DIR"), "tvm int8": (self.integer_path, "compile DIR --int8")}
        for backend, (path, command) in paths.items():
            if path is None:
                self.missing[backend] = f"not compiled: run `anncvt {command}`"
                continue
            dtype = "int8" if backend.endswith("int8") else "float32"
            yield Contestant("student", "tvm", dtype, self._opener(Path(path)), pixels=dtype == "int8")
        if self.teacher_in_tvm:
            from anncvt.runtime import tvm

            path = tvm.compile_network(
                self.program.teacher, self.program.preprocess, self.scratch / "teacher.so", progress=self.progress
            )
            yield Contestant("teacher", "tvm", "float32", self._opener(path))

    def _opener(self, path: Path) -> Callable[[], Opened]:
        from anncvt.runtime import tvm

        tvm.require()  # here, so that what it takes does not count as the network's
        return functools.partial(in_tvm, path, self.threads)


def quantised(source: Path, target: Path, size: tuple[int, ...]) -> Path:
    """``source`` with 8-bit integers, by onnxruntime's own tools, as they recommend for this processor.

    Ranges come from noise: good for timing, not for classifying. Activations are uint8: with int8, the default,
    onnxruntime 1.32 leaves a part of the convolutions in floats. Weights are int8 with a scale per channel and, where
    the processor has no VNNI, 7 bits: sums of two products saturate there otherwise.

    Raises:
        AnncvtError: the tools fail on this network.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from anncvt.runtime.onnx import INPUT

    noise = np.random.default_rng(0).standard_normal((2, 1, *size)).astype(np.float32)

    class Noise(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter(noise)

        def get_next(self) -> Any:
            return next(({INPUT: image} for image in self._left), None)

    prepared = target.with_suffix(".prepared.onnx")
    try:
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared),
            str(target),
            Noise(),
            per_channel=True,
            reduce_range=reduced_range(),
            activation_type=quantization.QuantType.QUInt8,
        )
    except Exception as error:  # onnxruntime's errors have no common base
        raise AnncvtError(f"onnxruntime cannot quantize it: {str(error).strip().splitlines()[0]}") from error
    return target


def reduced_range() -> bool:
    """Whether weights of :func:`quantised` have 7 bits."""
    return not {"avx512vnni", "avxvnni"} & (processor.features() or frozenset())
