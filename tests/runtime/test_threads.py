"""The environment that keeps two thread pools from fighting."""

from __future__ import annotations

import os
import subprocess
import sys

from anncvt.runtime.threads import calm_openmp, processors


def test_idle_threads_sleep_by_default(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "TVM_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    calm_openmp()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    assert os.environ["TVM_NUM_THREADS"] == str(processors())


def test_import_sets_it_before_torch():
    code = "import anncvt, os, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules, 'tvm' in sys.modules)"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.split() == ["PASSIVE", "False", "False"]


def test_kernels_neither_pin_the_process_nor_ignore_the_thread_count():
    code = (
        "import anncvt.nn, os, torch\n"
        "before = os.sched_getaffinity(0)\n"
        "for threads in (1, 2):\n"
        "    torch.set_num_threads(threads)\n"
        "    torch.ops.anncvt.adder2d(torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 3, 3), [1, 1], [1, 1], [1, 1], 1)\n"
        "    assert os.sched_getaffinity(0) == before\n"
        "import tvm; print(tvm.get_global_func('runtime.NumThreads')() == min(2, len(before)))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TVM_NUM_THREADS"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.strip() == "True"
