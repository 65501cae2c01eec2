"""Compiled networks as files: manifest, loading without torch, damage, foreign processors, threads."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("tvm")

from anncvt.errors import AnncvtError
from anncvt.nn import AdderConv2d, AdderConv3d
from anncvt.program import Preprocess, Program, Source
from anncvt.runtime import artifact, processor
from anncvt.runtime import tvm as runtime

PREPROCESS = Preprocess((3, 8, 8), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), AdderConv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()


def program(student: nn.Module | None) -> Program:
    return Program(Source("net.pth", "zoo:net"), PREPROCESS, nn.Identity(), student, classes=["a", "b", "c", "d"])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, so that it can be compared with torch digit by digit."""
    path = tmp_path_factory.mktemp("tvm") / "model.so"
    return runtime.compile(program(network()), path, batch=4, fixed=False)


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_any_batch_size_equals_torch(compiled: Path, count: int) -> None:
    images = torch.randn(count, 3, 8, 8)
    with torch.no_grad():
        expected = network().double()(images.double())
    got = runtime.load(compiled)(images.numpy())
    assert got.dtype == np.float32
    assert np.abs(got - expected.numpy()).max() <= 1e-5 * expected.abs().max()


def test_no_images_no_logits(compiled: Path) -> None:
    assert runtime.load(compiled)(np.empty((0, 3, 8, 8), np.float32)).shape == (0, 4)


def test_inputs_may_be_videos(tmp_path: Path) -> None:
    video = nn.Sequential(AdderConv3d(2, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()
    images = torch.randn(2, 2, 3, 4, 4)
    with torch.no_grad():
        expected = video(images).numpy()
    preprocess = Preprocess((2, 3, 4, 4), (0.5,), (0.2,))
    got = runtime.load(runtime.compile_network(video, preprocess, tmp_path / "video.so"))(images.numpy())
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_manifest_says_how_to_use_it(compiled: Path) -> None:
    manifest = runtime.load(compiled).manifest
    assert manifest["model"] == "net.pth"
    assert manifest["classes"] == ["a", "b", "c", "d"]
    assert manifest["input"] == {"name": "image", "shape": ["batch", 3, 8, 8], "dtype": "float32"}
    assert manifest["output"]["shape"] == ["batch", 4]
    assert manifest["preprocess"] == {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.2] * 3}
    assert {"anncvt", "apache-tvm", "torch"} <= set(manifest["versions"])
    assert manifest["target"]["architecture"] == processor.architecture()
    assert processor.missing(manifest["target"]["features"]) == []
    words = set(Path("/proc/cpuinfo").read_text().split())
    assert manifest["target"]["flags"] and words >= set(manifest["target"]["flags"])


def test_tensors_of_other_libraries_come_and_go_by_dlpack(compiled: Path) -> None:
    images = torch.randn(2, 3, 8, 8)
    model = runtime.load(compiled)
    logits = torch.from_dlpack(model(images))
    assert torch.equal(logits, torch.from_numpy(model(images.numpy())))
    assert torch.equal(torch.from_dlpack(model(images.double())), logits)


def test_loading_imports_no_torch(compiled: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "from anncvt.runtime import tvm as runtime\n"
        "model = runtime.load(sys.argv[1], threads=1)\n"
        "assert model(np.zeros((2, 3, 8, 8), np.float32)).shape == (2, 4)\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'torch']\n"
        "import torch\n"  # and a later import of torch still works
        "print(torch.ones(2).sum().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(compiled)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "2.0\n"), done.stderr


def test_runtime_library_alone_is_enough(compiled: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "from anncvt.runtime import tvm as runtime\n"
        "print(runtime.load(sys.argv[1])(np.zeros((1, 3, 8, 8), np.float32)).shape)\n"
        "assert 'libtvm_compiler' not in open('/proc/self/maps').read()\n"
    )
    environment = {"PATH": "/usr/bin", "TVM_USE_RUNTIME_LIB": "1", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code, str(compiled)], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "(1, 4)\n"), done.stderr


def test_threads_share_a_model_and_models_run_side_by_side(compiled: Path, tmp_path: Path) -> None:
    other = runtime.compile(program(network(1)), tmp_path / "other.so")
    models = [runtime.load(compiled, threads=1), runtime.load(other), runtime.load(compiled)]
    images = np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)
    expected = [model(images) for model in models]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(30):
            if not np.array_equal(models[index](images), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index % 3,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not np.array_equal(expected[0], expected[1])


def test_wrong_image_shape_is_refused(compiled: Path) -> None:
    with pytest.raises(AnncvtError, match=r"expected \[N, 3, 8, 8\]"):
        runtime.load(compiled)(np.zeros((1, 3, 9, 8), np.float32))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(AnncvtError, match="cannot read"):
        runtime.load(tmp_path / "none.so")


@pytest.mark.parametrize("keep", [0, 100, -1, -1000])
def test_cut_off_file(compiled: Path, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.so"
    path.write_bytes(compiled.read_bytes()[:keep])
    with pytest.raises(AnncvtError, match="not a compiled network, or cut off"):
        runtime.load(path)


@pytest.mark.parametrize("position", [0, 5000, -100])
def test_damaged_file(compiled: Path, tmp_path: Path, position: int) -> None:
    path, data = tmp_path / "damaged.so", bytearray(compiled.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(AnncvtError, match="damaged"):
        runtime.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"features": ["avx2", "quantum"]}, "lacks.*quantum"), ({"architecture": "riscv64"}, "compiled for riscv64")],
)
def test_foreign_processor_is_named_before_any_code_runs(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "foreign.so"
    path.write_bytes(b"not even a library")
    target = {"architecture": processor.architecture(), "features": [], **change}
    artifact.seal(path, {"format": runtime.FORMAT, "target": target})
    with pytest.raises(AnncvtError, match=message):
        runtime.load(path)


def test_sealed_file_that_is_no_library(tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    path.write_bytes(b"not a library")
    target = {"architecture": processor.architecture(), "features": []}
    artifact.seal(path, {"format": runtime.FORMAT, "target": target})
    with pytest.raises(AnncvtError, match="cannot load"):
        runtime.load(path)


def test_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    path.write_bytes(b"")
    artifact.seal(path, {"format": runtime.FORMAT + 1})
    with pytest.raises(AnncvtError, match="newer"):
        runtime.load(path)


def test_older_processors_are_a_target(tmp_path: Path) -> None:
    path = runtime.compile(program(network()), tmp_path / "avx2.so", target="avx2")
    features = artifact.read_manifest(path)["target"]["features"]
    assert "avx2" in features and not any(name.startswith("avx512") for name in features)
    if not processor.missing(features):
        images = torch.randn(1, 3, 8, 8)
        np.testing.assert_allclose(runtime.load(path)(images.numpy()), network()(images).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("target", "asked", "found"),
    [
        ("avx512", None, True),
        ("avx512", False, False),
        ("avx2", None, False),
        ("avx2", True, True),
        ("llvm -mcpu=x86-64", None, False),
    ],
)
def test_fixed_point_is_the_default_of_targets_with_avx512(
    tmp_path: Path, target: str, asked: bool | None, found: bool
) -> None:
    if processor.architecture() != "x86_64":
        pytest.skip("x86-64 is another machine here, for which there may be no linker")
    path = runtime.compile(program(network()), tmp_path / "model.so", target=target, fixed=asked)
    about = artifact.read_manifest(path)["target"]
    assert about["fixed"] is found
    if not processor.missing(about["features"]):
        images = torch.randn(5, 3, 8, 8)
        expected = network()(images).detach().numpy()
        assert np.abs(runtime.load(path)(images.numpy()) - expected).max() < 1e-3 * np.abs(expected).max()


def test_fixed_point_is_refused_where_it_gains_nothing(tmp_path: Path) -> None:
    for target in ("llvm -mcpu=x86-64", "llvm -mtriple=aarch64-linux-gnu -mcpu=neoverse-n1"):
        with pytest.raises(AnncvtError, match="faster than floats"):
            runtime.compile(program(network()), tmp_path / "model.so", target=target, fixed=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(processor.architecture() != "x86_64", reason="needs a linker for x86-64")
def test_a_network_without_adders_is_not_in_fixed_point(tmp_path: Path) -> None:
    path = runtime.compile(program(nn.Conv2d(3, 16, 3)), tmp_path / "model.so", target="avx512", fixed=True)
    assert artifact.read_manifest(path)["target"]["fixed"] is False


def test_gpus_are_no_target_and_what_to_do_instead_is_told(tmp_path: Path) -> None:
    with pytest.raises(AnncvtError, match="no library is compiled for GPUs") as error:
        runtime.compile(program(network()), tmp_path / "model.so", target="cuda")
    assert "--device cuda" in str(error.value.fix)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["", "zx81", "llvm -mcpu", "llvm -mcpu=zx81"])
def test_unknown_target(tmp_path: Path, target: str) -> None:
    with pytest.raises(AnncvtError, match="unknown target"):
        runtime.compile(program(network()), tmp_path / "model.so", target=target)
    assert not list(tmp_path.iterdir())


def test_no_linker_for_the_target(tmp_path: Path) -> None:
    with pytest.raises(AnncvtError, match="linking failed"):
        runtime.compile(program(network()), tmp_path / "m.so", target="llvm -mtriple=aarch64-none-elf -mcpu=cortex-a72")
    assert not list(tmp_path.iterdir())


def test_nothing_to_compile(tmp_path: Path) -> None:
    with pytest.raises(AnncvtError, match="no student"):
        runtime.compile(program(None), tmp_path / "model.so")
    with pytest.raises(AnncvtError, match="batch size 0"):
        runtime.compile(program(network()), tmp_path / "model.so", batch=0)


def test_without_tvm_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tvm", None)
    with pytest.raises(AnncvtError) as caught:
        runtime.compile(program(network()), tmp_path / "model.so")
    assert caught.value.fix is not None and "anncvt[tvm]" in caught.value.fix


def test_failed_compile_leaves_the_old_file(compiled: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    path.write_bytes(b"old")
    with pytest.raises(AnncvtError, match="not one tensor of logits"):
        runtime.compile(program(nn.Flatten(0)), path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_manifest_is_json_at_the_end(compiled: Path) -> None:
    data = compiled.read_bytes()
    length = int.from_bytes(data[-16:-8], "little")
    assert data.endswith(b"ANNCVT01")
    assert json.loads(data[-48 - length : -48]) == artifact.read_manifest(compiled)
