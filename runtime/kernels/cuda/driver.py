"""Launches cubins through NVIDIA's driver, on torch's current stream: no CUDA toolkit, no TVM.

Pointers and numbers are passed by value and nothing is waited for, so launches can be captured in CUDA graphs. The
context is the device's primary one, torch's own, made current for each call: a thread that has not used the device yet
(autograd has such) has none.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from anncvt.runtime.kernels.cuda import build
from anncvt.runtime.kernels.cuda.variant import FLOATS, Variant

Argument = ctypes.c_void_p | ctypes.c_float | ctypes.c_int

#: CU_STREAM_CAPTURE_MODE_RELAXED
_RELAXED = 2

_lock = threading.Lock()
_loaded: dict[tuple[Variant, int], ctypes.c_void_p] = {}


def launch(
    variant: Variant, grid: tuple[int, int, int], tensors: Mapping[str, Tensor], numbers: Mapping[str, float]
) -> None:
    """Enqueue one kernel.

    Args:
        grid: blocks along x, y, z.
        tensors: by the names of ``variant.pointers``; they stay alive as torch's allocator keeps memory by stream.
        numbers: by the names of ``variant.numbers``, without the grid's.
    """
    device = tensors["x"].device
    values = {**numbers, **dict(zip(("grid_x", "grid_y", "grid_z"), grid, strict=True))}
    arguments: list[Argument] = [ctypes.c_void_p(tensors[name].data_ptr()) for name in variant.pointers]
    for name in variant.numbers:
        arguments.append(ctypes.c_float(values[name]) if name in FLOATS else ctypes.c_int(int(values[name])))
    enqueue(load(variant, device), grid, variant.tile.threads, arguments, device)


def enqueue(
    function: ctypes.c_void_p,
    grid: tuple[int, int, int],
    threads: int,
    arguments: Sequence[Argument],
    device: torch.device,
) -> None:
    """Launch a function of :func:`function_of` on the current stream.

    Raises:
        RuntimeError: the driver refuses it.
    """
    pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    with _current(device):
        _check(_driver().cuLaunchKernel(function, *grid, threads, 1, 1, 0, stream, pointers, None))


def load(variant: Variant, device: torch.device) -> ctypes.c_void_p:
    """The kernel in the memory of a device, for as long as the process lives; compiled if need be.

    Raises:
        AnncvtError: it is not there and cannot be made.
        RuntimeError: the driver refuses it.
    """
    key = (variant, _index(device))
    found = _loaded.get(key)
    if found is not None:
        return found
    with _lock:
        if key not in _loaded:
            _loaded[key] = function_of(build.cubin(variant, architecture(device)), variant.name, device)
        return _loaded[key]


def function_of(cubin: bytes, name: str, device: torch.device) -> ctypes.c_void_p:
    """A function of a cubin, loaded for as long as the process lives.

    Raises:
        RuntimeError: the driver refuses it.
    """
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with _current(device), _capturing_or_not():
        _check(_driver().cuModuleLoadData(ctypes.byref(module), cubin))
        _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
    return function


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@contextlib.contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """The device's context is this thread's current one."""
    _check(_driver().cuCtxPushCurrent_v2(_context(_index(device))))
    try:
        yield
    finally:
        _check(_driver().cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())))


@contextlib.contextmanager
def _capturing_or_not() -> Iterator[None]:
    """What allocates is allowed in this thread while a stream, of any thread, is captured."""
    mode = ctypes.c_int(_RELAXED)
    _check(_driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)))
    try:
        yield
    finally:
        _check(_driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)))


@functools.cache
def _context(index: int) -> ctypes.c_void_p:
    """The primary context of a device, kept for as long as the process lives."""
    number, context = ctypes.c_int(), ctypes.c_void_p()
    _check(_driver().cuInit(0))
    _check(_driver().cuDeviceGet(ctypes.byref(number), index))
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), number))
    return context


def architecture(device: torch.device) -> str:
    """``"sm_90"``, ..."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def multiprocessors(device: torch.device) -> int:
    """How many a device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    pointer, unsigned, integer = ctypes.c_void_p, ctypes.c_uint, ctypes.c_int
    library.cuInit.argtypes = [unsigned]
    library.cuDeviceGet.argtypes = [pointer, integer]
    library.cuDevicePrimaryCtxRetain.argtypes = [pointer, integer]
    library.cuCtxPushCurrent_v2.argtypes = library.cuCtxPopCurrent_v2.argtypes = [pointer]
    library.cuThreadExchangeStreamCaptureMode.argtypes = [pointer]
    library.cuLaunchKernel.argtypes = [pointer, *[unsigned] * 7, *[pointer] * 3]
    library.cuModuleLoadData.argtypes = [pointer, ctypes.c_char_p]
    library.cuModuleGetFunction.argtypes = [pointer, pointer, ctypes.c_char_p]
    library.cuGetErrorString.argtypes = [integer, pointer]
    return library


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver: {(text.value or b'unknown error').decode()} ({status})")
