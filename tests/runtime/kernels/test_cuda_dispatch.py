"""The registered op on the CUDA kernels, their notices, and what is passed to the driver. No GPU is needed."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator

import pytest
import torch
from parity import Case, assert_parity, op

pytest.importorskip("tvm")

from cuda_emulator import COMPILER, Emulator, in_the_ops_place

from anncvt.nn import AdderConv2d
from anncvt.runtime import kernels, warmup
from anncvt.runtime.kernels import cuda
from anncvt.runtime.kernels.cuda import build, driver, launch, trial, variant

needs_emulator = pytest.mark.skipif(COMPILER is None, reason="g++ compiles the kernels for the CPU")
CASE = Case(channels=16, outputs=16, size=(9, 10), layout="nhwc")
GPU = torch.device("cuda", 0)


@pytest.fixture
def emulated() -> Iterator[Emulator]:
    with in_the_ops_place() as emulator:
        yield emulator


@needs_emulator
def test_parity_through_autograd(emulated):
    assert_parity(op, CASE, values="grid")
    assert set(emulated.launched) == {
        "forward_float32_float32_4_128x16",
        "dx_float32_float32_4_128x16",
        "dw_float32_float32_4_16x16",
    }


@needs_emulator
def test_a_network_for_inference_is_layers_alone(emulated, monkeypatch):
    from networks import Residual

    from anncvt.passes import fuse

    monkeypatch.setattr(fuse, "pays", lambda device: True)
    network = Residual(width=16).eval()
    for name in ("stem", "conv1", "conv2", "down.0"):
        owner, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(owner), leaf, AdderConv2d.from_conv(network.get_submodule(name)))
    for norm in (network.bn, network.bn1, network.bn2, network.down[1]):
        norm.running_mean.fill_(-40)
        norm.running_var.fill_(100)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    with torch.no_grad():
        ready = fuse.for_inference(network, x)
        expected = network(x)
        emulated.launched.clear()
        torch.testing.assert_close(ready(x), expected, rtol=1e-4, atol=1e-4)
    # The deepest layer has few pixels: its taps are divided, and what ends it adds them up.
    divided = {"forward_float32_float32_4_128x16": 1, "finish_float32_float32_4_256x1": 1}
    assert emulated.launched == {
        "fused_float32_float32_1_128x16": 1,
        "fused_float32_float32_4_128x16": 2,
        **divided,
    }


@needs_emulator
def test_half_images_keep_their_type_and_float32_weights_theirs(emulated):
    x, weight, grad = CASE.tensors()
    x, weight = x.bfloat16().requires_grad_(), weight.requires_grad_()
    y = op(x, weight, *CASE.arguments(), "exact")
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    dx, dw = torch.autograd.grad(y, (x, weight), grad.bfloat16())
    assert (dx.dtype, dw.dtype) == (torch.bfloat16, torch.float32)
    assert emulated.launched["forward_bfloat16_bfloat16_4_128x16"] == 1


class Driver:
    """Stands for NVIDIA's driver: remembers what it is asked to launch, reading arguments while they live."""

    def __init__(self) -> None:
        self.kernel: variant.Variant = next(variant.variants(["dx"]))
        self.calls: list[tuple] = []
        self.passed: dict[str, float] = {}
        self.contexts: list[int] = []
        self.loaded: list[tuple[int, int, bytes]] = []
        self.status, self.mode = 0, 0

    def cuLaunchKernel(self, function, *rest):
        *configuration, pointers, extra = rest
        self.calls.append((function.value, *configuration, extra))
        assert self.contexts == [0xC0], "no context is current in a thread that is new to the device"
        for name, address in zip([*self.kernel.pointers, *self.kernel.numbers], pointers, strict=True):
            pointer = name in self.kernel.pointers
            kind = ctypes.c_void_p if pointer else ctypes.c_float if name in variant.FLOATS else ctypes.c_int
            self.passed[name] = kind.from_address(address).value
        return self.status

    def cuInit(self, flags):
        return 0

    def cuDeviceGet(self, number, index):
        ctypes.cast(number, ctypes.POINTER(ctypes.c_int))[0] = index
        return 0

    def cuDevicePrimaryCtxRetain(self, context, number):
        ctypes.cast(context, ctypes.POINTER(ctypes.c_void_p))[0] = 0xC0 + number.value
        return 0

    def cuCtxPushCurrent_v2(self, context):
        self.contexts.append(context.value)
        return 0

    def cuCtxPopCurrent_v2(self, context):
        self.contexts.pop()
        return 0

    def cuThreadExchangeStreamCaptureMode(self, mode):
        place = ctypes.cast(mode, ctypes.POINTER(ctypes.c_int))
        place[0], self.mode = self.mode, place[0]
        return 0

    def cuModuleLoadData(self, module, cubin):
        self.loaded.append((self.contexts[-1], self.mode, cubin))
        return self.status

    def cuModuleGetFunction(self, function, module, name):
        ctypes.cast(function, ctypes.POINTER(ctypes.c_void_p))[0] = 0xF00
        return 0

    def cuGetErrorString(self, status, text):
        ctypes.cast(text, ctypes.POINTER(ctypes.c_char_p))[0] = b"no such thing"


@pytest.fixture
def recorded(monkeypatch) -> Driver:
    fake = Driver()

    class Stream:
        cuda_stream = 0x5EAF

    monkeypatch.setattr(driver, "_driver", lambda: fake)
    monkeypatch.setattr(driver, "_loaded", {})
    monkeypatch.setattr(driver, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(build, "cubin", lambda chosen, arch: f"{chosen.name} {arch}".encode())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    driver._context.cache_clear()
    yield fake
    driver._context.cache_clear()
    assert not fake.contexts, "a context was left current"
    assert fake.mode == 0, "the mode of captures was left changed"


def test_arguments_reach_the_driver_in_the_kernels_order(recorded):
    chosen = recorded.kernel
    tensors = {name: torch.zeros(4) for name in chosen.pointers}
    numbers = {name: 10.0 + i for i, name in enumerate(chosen.numbers) if not name.startswith("grid_")}
    numbers["sharpness"] = 0.5
    driver.launch(chosen, (7, 8, 9), tensors, numbers)
    ((function, *grid, threads, _, _, shared, stream, extra),) = recorded.calls
    assert (function, grid, threads, shared, stream.value, extra) == (0xF00, [7, 8, 9], 256, 0, 0x5EAF, None)
    places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    assert recorded.passed == places | numbers | {"grid_x": 7, "grid_y": 8, "grid_z": 9}


def test_errors_of_the_driver_are_told(recorded):
    recorded.status = 700
    chosen = recorded.kernel
    numbers = dict.fromkeys(set(chosen.numbers) - {"grid_x", "grid_y", "grid_z"}, 1)
    with pytest.raises(RuntimeError, match=r"no such thing \(700\)"):
        driver.launch(chosen, (1, 1, 1), {name: torch.zeros(1) for name in chosen.pointers}, numbers)


def test_a_kernel_is_loaded_once_for_each_device_and_in_its_context(recorded):
    """In the mode (relaxed, 2) that allows it while a stream is captured."""
    for index in (0, 1, 0):
        assert driver.load(recorded.kernel, torch.device("cuda", index)).value == 0xF00
    cubin = f"{recorded.kernel.name} sm_90".encode()
    assert recorded.loaded == [(0xC0, 2, cubin), (0xC1, 2, cubin)]
    recorded.status = 209
    with pytest.raises(RuntimeError, match=r"no such thing \(209\)"):
        driver.load(recorded.kernel, torch.device("cuda", 2))


class Image:
    """What :func:`usable` asks of a tensor, on a device that this machine lacks."""

    device, dtype, is_cuda = GPU, torch.float32, True


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("ANNCVT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(driver, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(trial, "disagreement", lambda device, dtype: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    cuda._READY.clear()
    yield
    cuda._READY.clear()


def test_without_compilers_and_cubins_there_is_one_notice(gpu, monkeypatch):
    monkeypatch.setattr(build, "lacking", lambda: "no TVM")
    with pytest.warns(UserWarning, match="no TVM here to compile them, and they are not prebuilt for sm_90"):
        assert not kernels.usable(Image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels.usable(Image)


def test_prebuilt_kernels_need_no_compiler(gpu, monkeypatch):
    monkeypatch.setattr(build, "lacking", lambda: "no TVM")
    monkeypatch.setattr(build, "present", lambda chosen, arch: chosen.dtype == "float32" and arch == "sm_90")
    assert cuda.obstacle(GPU) is None
    assert kernels.usable(Image)
    assert "not prebuilt" in str(cuda.obstacle(GPU, "float16"))


@needs_emulator
def test_a_trial_finds_kernels_that_are_wrong(emulated, monkeypatch):
    cpu = torch.device("cpu")
    assert trial.disagreement(cpu, torch.float32) is None
    kinds = {name.partition("_float")[0] for name in emulated.launched}
    assert kinds == {kind for kind in variant.KINDS if kind != "integer"}, "a kind of kernel is not tried"
    right = launch.input_gradient
    monkeypatch.setattr(launch, "input_gradient", lambda *a: right(*a[:-1], "full"))
    assert trial.disagreement(cpu, torch.float32) == (
        "the exact input gradient of a layer of 20 channels differs from that of plain torch"
    )


def test_kernels_that_do_not_load_are_not_used(gpu, monkeypatch):
    def refuse(device, dtype):
        raise RuntimeError("CUDA driver: no kernel image is available (209)")

    monkeypatch.setattr(build, "lacking", lambda: None)
    assert cuda.obstacle(GPU) is None
    monkeypatch.setattr(trial, "disagreement", refuse)
    assert "no kernel image" in str(cuda.obstacle(GPU))
    monkeypatch.setattr(driver, "architecture", lambda device: "sm_61")
    assert "no architecture that kernels are made for" in str(cuda.obstacle(GPU))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda.obstacle(GPU) == "this torch is not made for CUDA"


def test_a_first_use_in_a_capture_is_refused_and_decides_nothing(gpu, monkeypatch):
    monkeypatch.setattr(build, "lacking", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="run the network once on float32 before capturing"):
        kernels.usable(Image)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert kernels.usable(Image)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert kernels.usable(Image)


@needs_emulator
def test_defaults_of_the_process_do_not_matter(emulated):
    """A trial, and the kernels' own tensors, whatever type and device tensors get that are not told."""
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            assert trial.disagreement(torch.device("cpu"), torch.float32) is None
    finally:
        torch.set_default_dtype(torch.float32)


def test_autocast_has_a_rule_on_gpus():
    for name in ("AutocastCUDA", "AutocastCPU"):
        for op_name in ("anncvt::adder2d", "anncvt::adder2d_fused"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(op_name, name)


def test_compilers_see_shapes_and_layout_of_gpu_tensors():
    """torch.compile traces on tensors that claim to be on a GPU: nothing is launched, nothing is asked of a driver."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 16, 9, 10, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        weight = torch.empty(24, 16, 3, 3, device="cuda")
        y = op(x, weight, [2, 2], [1, 1], [1, 1], 1, "full")
        dx, dw = torch.ops.anncvt.adder2d_backward(y, x, weight, [2, 2], [1, 1], [1, 1], 1, "full", True, True)
        line, geometry = torch.empty(24, device="cuda"), ([2, 2], [1, 1], [1, 1], 1)
        z = torch.ops.anncvt.adder2d_fused(x, weight, line, line, y, *geometry, 0.0, None)
    assert (z.shape, z.device, z.dtype, z.stride()) == (y.shape, y.device, y.dtype, y.stride())
    assert (y.shape, y.device.type, y.dtype) == ((2, 24, 5, 5), "cuda", torch.bfloat16)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (dx.shape, dx.dtype, dw.shape, dw.dtype) == (x.shape, torch.bfloat16, weight.shape, torch.float32)


def test_kernels_can_be_turned_off(gpu, monkeypatch):
    monkeypatch.setattr(build, "lacking", lambda: None)
    assert kernels.usable(Image)
    monkeypatch.setenv("ANNCVT_KERNELS", "torch")
    assert not kernels.usable(Image)


def test_training_says_that_it_will_be_slow(monkeypatch):
    notes = []

    class Notes:
        def note(self, message):
            notes.append(message)

    network = AdderConv2d(3, 4, 3)
    monkeypatch.setattr(warmup.kernels, "usable", lambda parameter: False)
    warmup.compile_kernels(network, (3, 8, 8), Notes())
    assert not notes
    monkeypatch.setattr(warmup, "next", lambda *_: Image, raising=False)
    monkeypatch.setattr(cuda, "obstacle", lambda device: "no TVM")
    warmup.compile_kernels(network, (3, 8, 8), Notes())
    assert notes == ["training on cuda:0 with slow pure-torch kernels: no TVM"]
