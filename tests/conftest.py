"""What the tests share: where compiled kernels go, and one small converted program."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
# Compiled kernels of the tests stay out of the user's cache, and are there for the next run.
os.environ.setdefault("ANNCVT_CACHE", str(ROOT / ".pytest_cache" / "kernels"))
if "PYTEST_XDIST_WORKER" in os.environ:  # one of as many as there are cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TVM_NUM_THREADS", "1")

import anncvt  # noqa: E402  (after the environment is set and before torch is imported)


@pytest.fixture(scope="session")
def _converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "digits.ann"
    anncvt.convert(
        EXAMPLES / "digits_net.safetensors",
        arch="digits_net:DigitsNet",
        input_size=16,
        mean=(0.5,),
        std=(0.5,),
        calibrate="digits",
        limit=64,
        budget=1,
        output=folder,
    )
    return folder


@pytest.fixture
def converted(_converted: Path, tmp_path: Path) -> Path:
    """A program folder of its own: the digits CNN, calibrated for a second."""
    return Path(shutil.copytree(_converted, tmp_path / "digits.ann"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A PNG file of the digit seven."""
    from PIL import Image
    from sklearn.datasets import load_digits

    path = tmp_path / "seven.png"
    Image.fromarray((load_digits().images[7] * 15).astype("uint8")).resize((64, 64)).save(path)
    return path
