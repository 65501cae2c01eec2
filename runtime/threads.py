"""Two thread pools share the processor: torch's (OpenMP) and that of the compiled kernels (TVM)."""

from __future__ import annotations

import os

_CALM = {
    # OpenMP threads that spin while they wait take the cores from the kernels' threads, and the other way round.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    # TVM would pin the calling thread to one core, and with it every process it starts later.
    "TVM_BIND_THREADS": "0",
}


def calm_openmp() -> None:
    """Let idle threads sleep instead of spin. Works only before torch is imported; a user's own setting is kept."""
    for name, value in _CALM.items():
        os.environ.setdefault(name, value)
