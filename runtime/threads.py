"""Two thread pools share the processor: torch's (OpenMP) and that of the compiled kernels (TVM)."""

from __future__ import annotations

import os


def calm_openmp() -> None:
    """Set the environment in which the two pools get along. Works only before torch and TVM are imported.

    A user's own setting is kept.
    """
    settings = {
        # OpenMP threads that spin while they wait take the cores from the kernels' threads.
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        # TVM would pin the calling thread to one core, and with it every process it starts later,
        "TVM_BIND_THREADS": "0",
        # and count only half of the processors. Kernels called from torch follow torch.set_num_threads up to this.
        "TVM_NUM_THREADS": str(processors()),
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
