"""The CUDA kernels without a GPU: the very source that nvcc gets, compiled by g++ and run block by block on the CPU.

``Emulator.launch`` takes the place of the driver's. Tensors lie between margins of poison while a kernel runs: what is
read beyond them is not a number, what is written there is found.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from anncvt.runtime import kernels
from anncvt.runtime.kernels.cuda import launch, prelude, variant
from anncvt.runtime.kernels.cuda.source import source
from anncvt.runtime.kernels.cuda.variant import FLOATS, Variant

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
MARGIN = 4096


class Emulator:
    """A device with few multiprocessors, so that small layers too are shared by several blocks or not, as asked."""

    def __init__(self, multiprocessors: int = 1, backwards: bool = False) -> None:
        self.places, self.backwards = multiprocessors, backwards
        self.launched: Counter[str] = Counter()
        self.grids: dict[str, set[tuple[int, int, int]]] = {}

    def multiprocessors(self, device: torch.device) -> int:
        return self.places

    def launch(
        self, variant: Variant, grid: tuple[int, int, int], tensors: Mapping[str, Tensor], numbers: Mapping[str, float]
    ) -> None:
        assert all(0 < size < limit for size, limit in zip(grid, (2**31, 2**16, 2**16), strict=True))
        assert set(tensors) == set(variant.pointers)
        assert set(numbers) | {"grid_x", "grid_y", "grid_z"} == set(variant.numbers)
        self.launched[variant.name] += 1
        self.grids.setdefault(variant.name, set()).add(grid)
        values = {**numbers, **dict(zip(("grid_x", "grid_y", "grid_z"), grid, strict=True))}
        _poison(tensors["y"])
        held = {name: _Surrounded(tensor) for name, tensor in tensors.items()}
        arguments = [
            *(ctypes.c_void_p(held[name].pointer) for name in variant.pointers),
            *((ctypes.c_float(values[n]) if n in FLOATS else ctypes.c_int(int(values[n]))) for n in variant.numbers),
        ]
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        wrong = compiled(variant)(pointers, (ctypes.c_uint * 3)(*grid), variant.tile.threads, self.backwards)
        assert wrong <= 0, f"{variant.name}: {wrong} threads wait at a barrier that others do not reach"
        assert not wrong, f"{variant.name}: {-wrong} words of shared memory met by several threads between two barriers"
        for name, place in held.items():
            place.give_back(written=name == "y")


@contextlib.contextmanager
def in_the_ops_place() -> Iterator[Emulator]:
    """The op takes the CUDA kernels for the CPU's tensors; of their tiles the smallest."""
    emulator = Emulator()
    launch._room_of.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variant, "TILES", {kind: tiles[-1:] for kind, tiles in variant.TILES.items()})
        patch.setattr(launch, "driver", emulator)
        patch.setattr(kernels, "usable", lambda x: x.dtype in (torch.float32, torch.float16, torch.bfloat16))
        patch.setattr(kernels, "compiled", lambda x: launch)
        yield emulator
    launch._room_of.cache_clear()


class _Surrounded:
    """The storage of a tensor between two margins."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        storage = tensor.untyped_storage()
        self.whole = torch.full((storage.nbytes() + 2 * MARGIN + 64,), 0xFF, dtype=torch.uint8, device="cpu")
        self.start = MARGIN + -(self.whole.data_ptr() + MARGIN) % 64 + storage.data_ptr() % 64
        self.inside = self.whole[self.start : self.start + storage.nbytes()]
        self.original = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
        self.inside.copy_(self.original)
        self.pointer = self.inside.data_ptr() + tensor.storage_offset() * tensor.element_size()

    def give_back(self, *, written: bool) -> None:
        end = self.start + len(self.inside)
        assert (self.whole[: self.start] == 0xFF).all(), "written before a tensor"
        assert (self.whole[end:] == 0xFF).all(), "written behind a tensor"
        if written:
            self.original.copy_(self.inside)
        else:
            assert torch.equal(self.inside, self.original), "an input was written"


def _poison(y: Tensor) -> None:
    y.fill_(float("nan") if y.is_floating_point() else 0x7EADBEEF)


@functools.cache
def compiled(variant: Variant) -> ctypes._CFuncPointer:
    text = source(variant).replace(prelude.TEXT, f'#include "{HERE / "cuda_block.h"}"\n{prelude.COMMON}')
    head = re.search(rf"\b{variant.name}\(([^)]*)\)", text)
    assert head is not None
    types = [parameter.replace("__restrict__", "").rsplit(maxsplit=1)[0] for parameter in head.group(1).split(",")]
    unpacked = ", ".join(f"*({kind}*)given[{i}]" for i, kind in enumerate(types))
    text += (
        f"\nstatic void unpacked(void **given) {{ {variant.name}({unpacked}); }}\n"
        'extern "C" int run(void **given, const uint *grid, uint threads, int backwards) {\n'
        "  return run_grid(unpacked, given, grid, threads, backwards);\n}\n"
    )
    key = hashlib.sha256(f"{text}{(HERE / 'cuda_block.h').read_text()}".encode()).hexdigest()[:16]
    folder = Path(os.environ["ANNCVT_CACHE"]).parent / "emulated"
    library = folder / f"{variant.name}-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{library.with_suffix('')}-{os.getpid()}"  # tests of other processes may be at it, too
        given, made, new = (Path(stem + suffix) for suffix in (".cpp", ".o", ".so"))
        given.write_text(text)
        options = ["-O1", "-w", "-fPIC", "-ffp-contract=off", "-std=c++17", "-fsanitize=thread"]
        reduced = ["--param=tsan-instrument-func-entry-exit=0"]
        subprocess.run([COMPILER, *options, *reduced, "-c", "-o", str(made), str(given)], check=True)
        # Linked without the sanitizer's library: cuda_block.h hears what the compiler reports.
        subprocess.run([COMPILER, "-shared", "-o", str(new), str(made)], check=True)
        os.replace(new, library)
        given.unlink()
        made.unlink()
    return ctypes.CDLL(str(library)).run
