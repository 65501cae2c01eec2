"""The cache of compiled kernels: one compile for every batch; damage, other processes, unwritable places."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from parity import Case, op

from anncvt.runtime import reference
from anncvt.runtime.kernels import store

cache = pytest.importorskip("anncvt.runtime.kernels.cache")
pytest.importorskip("tvm")

CASE = Case(channels=3, outputs=8)


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ANNCVT_CACHE", str(tmp_path / "kernels"))
    cache.clear()
    cache.counts.clear()
    yield
    cache.clear()


def run(case=CASE):
    x, weight, _ = case.tensors()
    y = op(x, weight, *case.arguments())
    expected = reference.forward(x, weight, *case.arguments())
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    return dict(cache.counts)


def test_one_kernel_serves_every_batch_and_the_next_process():
    assert run() == {"compiled": 1}
    for batch in (1, 5, 64):
        assert run(replace(CASE, batch=batch)) == {"compiled": 1}
    cache.clear()
    assert run() == {"compiled": 1, "loaded": 1}


def test_other_geometries_are_other_kernels():
    run()
    assert run(replace(CASE, stride=(2, 1))) == {"compiled": 2}
    assert run(replace(CASE, padding=(1, 1, 1, 1))) == {"compiled": 2}, "the same padding, spelled with four entries"
    assert len(list(store.folder().iterdir())) == 2


def test_a_damaged_entry_is_replaced():
    run()
    (path,) = store.folder().iterdir()
    for damaged, keep in enumerate((0, 20, -1), 1):
        path.write_bytes(path.read_bytes()[:keep])
        cache.clear()
        assert run()["compiled"] == 1 + damaged
    cache.clear()
    assert run() == {"compiled": 4, "loaded": 1}


def test_an_unwritable_folder_costs_only_the_next_compile(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("ANNCVT_CACHE", str(tmp_path / "file" / "kernels"))
    assert run() == {"compiled": 1}
    cache.clear()
    assert run() == {"compiled": 2}


def test_a_machine_without_a_linker_compiles_in_memory(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert run() == {"compiled": 1}
    assert not store.folder().exists()


def test_the_folder_is_bounded_and_keeps_what_was_used_last(monkeypatch):
    run()
    (used,) = store.folder().iterdir()
    size = used.stat().st_size
    for age in range(1, 4):
        other = store.folder() / f"other{age}.so"
        other.write_bytes(bytes(size))
        os.utime(other, (time.time() - 100 * age,) * 2)
    os.utime(used, (time.time() - 1000,) * 2)
    cache.clear()
    run()  # loads it, which makes it the newest
    monkeypatch.setattr(store, "LIMIT", 3 * size)
    run(replace(CASE, stride=(2, 1)))
    assert used.exists()
    assert not (store.folder() / "other3.so").exists()
    assert sum(path.stat().st_size for path in store.folder().iterdir()) <= 3 * size


def test_leftovers_of_interrupted_processes_go():
    run()
    old, new = (store.folder() / name for name in (".new-old", ".new-now"))
    for leftover in (old, new):
        leftover.mkdir()
        (leftover / "half.so").write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    run(replace(CASE, stride=(2, 1)))
    assert not old.exists()
    assert new.exists(), "may belong to a process at work"


def test_processes_share_the_folder():
    code = (
        "import torch, anncvt.nn\n"
        "for k in (1, 2):\n"
        "    x, w = torch.ones(2, 3, 8, 8), torch.zeros(8, 3, k, k)\n"
        "    y = torch.ops.anncvt.adder2d(x, w, [1, 1], [0, 0], [1, 1], 1)\n"
        "    assert torch.equal(y, torch.full_like(y, -3.0 * k * k))\n"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ)) for _ in range(2)]
    assert [worker.wait() for worker in workers] == [0, 0]
    entries = list(store.folder().iterdir())
    assert len(entries) == 2
    assert all(store.intact(entry) for entry in entries)


def test_the_default_folder_is_the_users_cache(monkeypatch):
    monkeypatch.delenv("ANNCVT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(store.folder()) == "/somewhere/anncvt/kernels"
