"""Cubins: what the compilers make of the CUDA kernels, and how they are kept."""

from __future__ import annotations

import collections
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("tvm")

from sass import disassembler, instructions

from anncvt.errors import AnncvtError
from anncvt.runtime.kernels import store
from anncvt.runtime.kernels.cuda import build
from anncvt.runtime.kernels.cuda.source import source
from anncvt.runtime.kernels.cuda.variant import DTYPES, KINDS, TILES, Variant, tile_for, variants

needs_compiler = pytest.mark.skipif(build.lacking() is not None, reason=f"{build.lacking()} here")
EVERY = {each.name: each for each in variants()}
LARGEST = {
    kind: next(v for v in EVERY.values() if v.kind == kind and v.dtype in ("float32", "uint32"))
    for kind in ("forward", "fused", "dx", "dw", "integer")
}


def assert_lean(chosen: Variant, arch: str, folder: Path) -> None:
    """The inner loop is what the arithmetic needs, from shared memory by vectors, with nothing spilled."""
    found = instructions(build.compiled(source(chosen), arch), folder)
    count = collections.Counter(found)
    tile = chosen.tile
    taps = min(tile.depth, tile.unrolled) * tile.height * tile.width  # in the innermost loop
    assert not any(name.startswith(("LDL", "STL")) for name in found), "registers spilled to local memory"
    # One of two buffers is computed with while the other is filled: threads wait once a step. A dx adds up sums, too.
    assert count["BAR.SYNC.DEFER_BLOCKING"] == (3 if chosen.kind == "dx" else 1)
    if chosen.kind == "integer":
        assert count["VABSDIFF4.U8.ACC"] == taps, "four bytes an instruction, accumulated"
    elif chosen.kind in ("forward", "fused"):
        # and one for each result's sign, another for what an epilogue adds
        others = tile.height * tile.width * (1 if chosen.kind == "forward" else 2)
        assert 2 * taps <= count["FADD"] <= 2 * taps + others + 8, "two additions a tap"
    else:
        assert count["FFMA.SAT"] == taps
        assert taps <= count["FFMA"] <= taps + tile.height * tile.width
        # A dx adds up, for each of its rows, what the threads fetched.
        shares = tile.height * tile.depth // chosen.vector if chosen.kind == "dx" else 0
        assert taps <= count["FADD"] <= taps + 3 * tile.height * tile.width + shares + 64
    if tile.height >= 4 and tile.width >= 4:
        assert count["LDS.128"] >= min(tile.depth, tile.unrolled) * (tile.height + tile.width) // 4
    if chosen.vector == 4 and chosen.dtype in ("float32", "uint32"):
        assert any(name.startswith("LDG.E.128") for name in found)
        assert count["STG.E.128"]


@needs_compiler
@pytest.mark.skipif(disassembler() is None, reason="needs nvdisasm (package nvidia-cuda-nvdisasm)")
@pytest.mark.parametrize(
    ("kind", "arch"),
    [("forward", "sm_80"), ("forward", "sm_90"), ("fused", "sm_90"), ("integer", "sm_90"), ("dx", "sm_90")],
)
def test_the_inner_loop_is_lean(tmp_path, kind, arch):
    assert_lean(LARGEST[kind], arch, tmp_path)


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(disassembler() is None, reason="needs nvdisasm (package nvidia-cuda-nvdisasm)")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", [name for name, v in EVERY.items() if v.kind in TILES])
def test_every_inner_loop_is_lean(tmp_path, name, arch):
    assert_lean(EVERY[name], arch, tmp_path)


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(disassembler() is None, reason="needs nvdisasm (package nvidia-cuda-nvdisasm)")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", [name for name, v in EVERY.items() if v.kind not in TILES])
def test_kernels_without_tiles_keep_to_registers(tmp_path, name, arch):
    found = instructions(build.compiled(source(EVERY[name]), arch), tmp_path)
    assert not any(opcode.startswith(("LDL", "STL")) for opcode in found), "registers spilled to local memory"
    if EVERY[name].vector == 4 and EVERY[name].dtype == "float32":
        assert any(opcode.startswith("LDG.E.128") for opcode in found)


def test_names_and_arguments_are_distinct():
    assert len(EVERY) == len(list(variants()))
    assert set(KINDS) == {v.kind for v in EVERY.values()}
    for each in EVERY.values():
        assert len(set(each.numbers)) == len(each.numbers)


@pytest.mark.parametrize(
    ("columns", "width"), [(3, 16), (16, 16), (20, 32), (64, 64), (96, 32), (128, 128), (512, 128)]
)
def test_tiles_fit_the_output_channels(columns, width):
    assert tile_for("forward", columns).columns == width


def test_every_thread_fetches_alike():
    """The launcher's grid and the generators rest on these divisions."""
    for kind, tiles in TILES.items():
        for tile in tiles:
            assert tile.depth * tile.rows % (4 * tile.threads) == 0, "whole vectors for every thread"
            assert kind == "dw" or (tile.threads % tile.depth == 0), "whole rows for all threads"
            assert kind != "dw" or (tile.rows == tile.columns and tile.threads * 4 % tile.rows == 0)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("ANNCVT_CACHE", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


SMALL = next(variants(["depthwise_forward"]))


@needs_compiler
def test_a_cubin_is_made_once(folder, monkeypatch):
    first = build.cubin(SMALL, "sm_90")
    assert first[:4] == b"\x7fELF"
    assert [path.suffix for path in folder.iterdir()] == [".cubin"]
    monkeypatch.setattr(build, "compiled", None)
    assert build.cubin(SMALL, "sm_90") == first
    path = build.path_of(SMALL, "sm_90")
    path.write_bytes(path.read_bytes()[:-40])
    assert not build.present(SMALL, "sm_90")


@needs_compiler
def test_prebuilding_for_several_architectures(folder):
    paths = build.build([SMALL], ["sm_80", "90"])
    assert sorted(path.name.split("-")[1] for path in paths) == ["sm_80", "sm_90"]
    assert all(store.intact(path) for path in paths)


@needs_compiler
def test_prebuilding_by_the_command_line(folder, monkeypatch, tmp_path):
    from click.testing import CliRunner

    from anncvt.cli import cli

    monkeypatch.setattr("anncvt.runtime.kernels.cuda.variant.variants", lambda dtypes: [SMALL])
    chosen = ["--arch", "sm_90", "-o", str(tmp_path / "there")]
    done = CliRunner().invoke(cli, ["kernels", "build", *chosen, "--json"])
    assert done.exit_code == 0
    answer = json.loads(done.stdout)
    (path,) = (tmp_path / "there").iterdir()
    assert answer == {"folder": str(path.parent), "files": [path.name], "bytes": path.stat().st_size}
    assert not folder.exists()
    refused = CliRunner().invoke(cli, ["kernels", "build", *chosen, "--dtype", "float64"])
    assert refused.exit_code == 1
    assert "no kernels for images of type 'float64'" in refused.stderr


@needs_compiler
def test_an_unwritable_folder_costs_only_the_next_compile(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("ANNCVT_CACHE", str(tmp_path / "file" / "kernels"))
    assert build.cubin(SMALL, "sm_90")[:4] == b"\x7fELF"
    with pytest.raises(AnncvtError, match="cannot write"):
        build.build([SMALL], ["sm_90"])


@needs_compiler
def test_what_the_compiler_refuses_is_told():
    with pytest.raises(AnncvtError, match=r"does not compile a kernel for sm_90: .*error"):
        build.compiled('extern "C" __global__ void kernel() { nonsense; }', "sm_90")


def test_nvrtc_is_found_in_packages(monkeypatch, tmp_path):
    """Where pip puts it: no linker looks there, and torch may not have loaded it yet."""
    for name in ("cu13/lib/libnvrtc.so.13", "cuda_nvrtc/lib/libnvrtc.so.12", "cu13/lib/libnvrtc-builtins.so.13.0"):
        (tmp_path / "nvidia" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nvidia" / name).touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    found = [Path(name).name for name in build._packaged() if str(tmp_path) in name]
    assert sorted(found) == ["libnvrtc.so.12", "libnvrtc.so.13"]


@pytest.mark.parametrize("arch", ["sm_35", "hopper", "sm_", ""])
def test_architectures_that_are_none(arch):
    with pytest.raises(AnncvtError, match="no architecture"):
        build.checked(arch)


def test_without_a_compiler_prebuilt_kernels_are_asked_for(folder, monkeypatch):
    monkeypatch.setattr(build, "lacking", lambda: "no TVM")
    with pytest.raises(AnncvtError, match="no TVM to make it with") as error:
        build.cubin(SMALL, "sm_90")
    assert "anncvt kernels build --arch sm_90" in str(error.value.fix)


def test_kernels_of_other_types_are_other_files():
    paths = {build.path_of(v, arch) for v in variants(dtypes=DTYPES) for arch in ("sm_80", "sm_90")}
    assert len(paths) == 2 * len(EVERY)
