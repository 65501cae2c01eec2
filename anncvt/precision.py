"""16-bit fixed point where nobody asked for it: where it pays, and where the network bears it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from anncvt.files import atomic_path
from anncvt.measure import DataChoice
from anncvt.program import Program
from anncvt.progress import SILENT, Progress
from anncvt.runtime import processor
from anncvt.runtime.check import TOLERANCE, Backend, difference
from anncvt.runtime.contestants import Opened

#: Images of noise that are compared with torch.
IMAGES = 8
#: Largest accepted difference of their logits, relative to the largest logit: half of what ``check`` accepts, which
#: sees more images.
MOST = TOLERANCE / 2


def worth_trying(target: str | None) -> bool:
    """Whether 16-bit fixed point is much faster on a target, and this machine can compare what it computes.

    Args:
        target: see :func:`anncvt.runtime.tvm.compile`; None: this machine.

    Raises:
        AnncvtError: TVM is not installed, or the target is unknown.
    """
    from anncvt.runtime import tvm

    tvm.require()
    from anncvt.runtime.kernels import fixed_point
    from anncvt.runtime.kernels.deployment import Deployment

    deployment = Deployment.parse(target or "cpu")
    here = deployment.architecture == processor.architecture() and not processor.missing(list(deployment.features))
    return here and fixed_point.chosen(None, deployment.architecture, deployment.features)


def write(
    program: Program,
    library: Path,
    make: Callable[..., object],
    opened: Callable[[Path], Opened],
    progress: Progress = SILENT,
) -> Path:
    """Write a library in fixed point if its logits are those of torch but for rounding, else in float32.

    Args:
        program: with a student.
        library: the file to write (atomically).
        make: writes one to a path; ``fixed``: None, what suits it in fixed point; False, nothing.
        opened: loads what was written.
        progress: is told of a network that does not bear it.

    Returns:
        ``library``.
    """
    with tempfile.TemporaryDirectory(prefix="anncvt-") as folder:
        trial = Path(folder, "trial.so")
        make(trial, fixed=None)
        backend, fixed = opened(trial)
        found = _difference(program, backend) if fixed else 0.0
        if found <= MOST:
            with atomic_path(library) as temporary:
                shutil.copyfile(trial, temporary)
            return library
    progress.note(
        f"compiled in float32: in 16-bit fixed point logits differ from torch by {found:.1e} of the largest "
        f"({MOST:.0e} is accepted unasked; --fixed16 asks for it)"
    )
    make(library, fixed=False)
    return library


def _difference(program: Program, backend: Backend) -> float:
    images = DataChoice("synthetic").open("test", program.preprocess, at_most=IMAGES, labelled=False)
    return difference(program, images, backend)
