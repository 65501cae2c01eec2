"""The kernels as other processors would get them."""

from __future__ import annotations

import platform

import pytest
from parity import Case, assert_parity, op

tvm = pytest.importorskip("tvm")

from anncvt.runtime.kernels import cache, launch, target  # noqa: E402  (they need tvm)

CASES = [
    Case(channels=16, outputs=32, size=(9, 10)),
    Case(channels=5, outputs=6, groups=2, stride=(2, 1), padding=(1, 0, 2, 1)),
    Case(channels=1, outputs=1, groups=10),
]


@pytest.fixture
def on(monkeypatch, tmp_path):
    def choose(cpu):
        monkeypatch.setenv("ANNCVT_CACHE", str(tmp_path))
        for module in (cache, launch):
            monkeypatch.setattr(module, "host", lambda: cpu)
        cache.clear()

    yield choose
    cache.clear()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="runs x86 code")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "cpu",
    [
        target.Cpu("x86-64", lanes=4, pixels=6, vectors=1, clipped=4, fma=False, assembly=False, clip=False),
        pytest.param(
            target.AVX2,
            marks=pytest.mark.skipif(target.host().lanes <= 8, reason="needs more than AVX2 to be an older one"),
        ),
    ],
    ids=lambda cpu: cpu.name,
)
def test_older_processors(on, cpu, case):
    on(cpu)
    assert_parity(op, case, values="grid")


def test_host_is_never_the_generic_processor():
    """ "native" and unknown names compile without vector instructions."""
    cpu = target.host()
    assert cpu.name not in ("native", "generic", "")
    assert str(cpu.target().attrs["mcpu"]) == cpu.name
