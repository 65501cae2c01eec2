"""The machine code of NVIDIA's GPUs, as tests read it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path


def disassembler() -> str | None:
    """nvdisasm: of a toolkit, or of the package nvidia-cuda-nvdisasm."""
    packaged = (tool for place in sys.path for tool in Path(place).glob("nvidia/*/bin/nvdisasm"))
    return shutil.which("nvdisasm") or next(map(str, packaged), None)


def instructions(cubin: bytes, folder: Path) -> list[str]:
    """The opcodes of a cubin, in their order."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = disassembler()
    assert tool is not None
    text = subprocess.run([tool, str(path)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", text)
