import contextlib
import gzip
import json
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import fuzz
from hypothesis import given
from hypothesis import strategies as st
from networks import Residual
from safetensors.torch import save_file

from anncvt import checkpoint
from anncvt.errors import AnncvtError
from anncvt.state_dict import fit, weights


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Residual().eval()


@pytest.fixture
def table(network):
    return network.state_dict()


def tensors(path: Path):
    return weights(checkpoint.read(path), str(path)).tensors


def same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def write(path: Path, kind: str, network) -> Path:
    table = network.state_dict()
    example = (torch.zeros(1, 3, 8, 8),)
    if kind == "zip":
        torch.save(table, path)
    elif kind == "legacy":
        torch.save(table, path, _use_new_zipfile_serialization=False)
    elif kind == "module":
        torch.save(network, path)
    elif kind == "legacy module":
        torch.save(network, path, _use_new_zipfile_serialization=False)
    elif kind == "safetensors":
        save_file(table, path)
    elif kind == "script":
        torch.jit.script(network).save(str(path))
    elif kind == "traced":
        torch.jit.trace(network, example).save(str(path))
    elif kind == "export":
        with open(path, "wb") as file:  # by name torch insists on the suffix .pt2
            torch.export.save(torch.export.export(network, example), file)
    return path


@pytest.mark.parametrize(
    ("kind", "sniffed"),
    [
        ("zip", "state_dict"),
        ("legacy", "legacy"),
        ("module", "state_dict"),
        ("legacy module", "legacy"),
        ("safetensors", "safetensors"),
        ("script", "torchscript"),
        ("traced", "torchscript"),
        ("export", "torch.export"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch.jit calls itself deprecated; files of it exist
def test_every_kind_gives_the_same_tensors(tmp_path, network, table, kind, sniffed):
    path = write(tmp_path / "weights.bin", kind, network)  # the name says nothing
    assert checkpoint.sniff(path) == sniffed
    same(tensors(path), table)
    if sniffed == "torchscript":
        found = weights(checkpoint.read(path), str(path))
        assert found.module == "networks.Residual" and found.notes == (
            "took the weights out of a TorchScript Residual",
        )


def test_settings_beside_the_weights_do_not_matter(tmp_path, table):
    import argparse
    import datetime

    import numpy as np

    extra = {
        "args": argparse.Namespace(lr=0.1),
        "best": np.float64(91.5),
        "curve": np.arange(4.0),
        "when": datetime.datetime(2020, 1, 1),
        "where": Path("runs"),
        "optimizer": {"state": {0: {"momentum": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
    }
    torch.save({"state_dict": table, **extra}, tmp_path / "w.pt")
    same(tensors(tmp_path / "w.pt"), table)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.bool])
@pytest.mark.parametrize("legacy", [False, True])
def test_dtypes(tmp_path, dtype, legacy):
    value = {"w": torch.arange(12).reshape(3, 4).to(dtype)}
    torch.save(value, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    same(tensors(tmp_path / "w.pt"), value)


@pytest.mark.parametrize("legacy", [False, True])
def test_views_shared_storages_and_strides(tmp_path, legacy):
    whole = torch.randn(4, 6)
    value = {"all": whole, "row": whole[1:3, 2:5], "turned": whole.t(), "empty": whole[:0], "scalar": whole[0, 0]}
    torch.save(value, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    found = tensors(tmp_path / "w.pt")
    same(found, value)
    assert found["row"].untyped_storage().data_ptr() == found["all"].untyped_storage().data_ptr()


def test_sharded(tmp_path, table):
    names = sorted(table)
    save_file({n: table[n] for n in names[:5]}, tmp_path / "a.safetensors")
    torch.save({n: table[n] for n in names[5:]}, tmp_path / "b.bin")
    index = {"weight_map": {n: "a.safetensors" if n in names[:5] else "b.bin" for n in names}}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    same(tensors(path), table)
    index["weight_map"][names[0]] = "../secret"
    path.write_text(json.dumps(index))
    with pytest.raises(AnncvtError, match="outside its folder"):
        tensors(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "LFS"),
        (b"\n<!DOCTYPE html><html>404", "web page"),
        (b"\x08\x08\x12\x07pytorch\x1a\x052.1", "ONNX"),
        (b"\x89HDF\r\n\x1a\n" + b"0" * 64, "Keras"),
        (b"\x93NUMPY\x01\x00", "NumPy"),
        (pickle.dumps({"a": 1}), "plain pickle"),
        (b"GIF89a" + b"\0" * 64, "known kind"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path, content, message):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(AnncvtError, match=message) as error:
        checkpoint.read(tmp_path / "w.pt")
    assert error.value.fix


def test_an_archive_of_numpy_is_named(tmp_path):
    np.savez(tmp_path / "w.npz", w=np.zeros(3))
    with pytest.raises(AnncvtError, match="NumPy"):
        checkpoint.read(tmp_path / "w.npz")


def test_missing_file_folder_and_pipe(tmp_path):
    with pytest.raises(AnncvtError, match="no such file"):
        checkpoint.read(tmp_path / "w.pt")
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path, tmp_path / "pipe"):  # a pipe that nobody writes to would be waited for
        with pytest.raises(AnncvtError, match="not a regular file"):
            checkpoint.read(other)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("changed", "what"),
    [
        (lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8), "is quantised"),
        (lambda weight: weight.to_sparse(), "is a sparse tensor"),
        (lambda weight: weight.to("meta"), "is on the meta device"),
    ],
)
def test_tensors_that_cannot_be_read_are_named(tmp_path, changed, what):
    torch.save({"a.weight": changed(torch.ones(2, 2)), "a.bias": torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(AnncvtError, match=f"a.weight {what}"):
        tensors(tmp_path / "w.pt")


def test_complex_numbers_are_read(tmp_path):
    value = torch.randn(3, dtype=torch.complex64)
    torch.save({"w": value}, tmp_path / "w.pt")
    assert torch.equal(tensors(tmp_path / "w.pt")["w"], value)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.99])
def test_truncated(tmp_path, network, kind, share):
    path = write(tmp_path / "w.pt", kind, network)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(AnncvtError):
        tensors(path)


class Evil:
    """Makes a folder when unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


class EvilState:
    """Calls in the state of an object, not at the top."""

    def __init__(self, victim: Path) -> None:
        self.inner = [Evil(victim)]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("where", ["beside", "key", "nested", "module", "state"])
def test_hostile_pickles_run_nothing(tmp_path, network, legacy, where):
    victim = tmp_path / "victim"
    evil = Evil(victim)
    content = {
        "beside": {"state_dict": network.state_dict(), "x": evil},
        "key": {**network.state_dict(), "layer.weight": evil},
        "nested": {"state_dict": network.state_dict(), "a": [{"b": (1, evil)}]},
        "module": torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)),
        "state": {"state_dict": network.state_dict(), "x": EvilState(victim)},
    }[where]
    if isinstance(content, torch.nn.Module):
        content.extra = evil
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(AnncvtError, match="mkdir"):
        tensors(tmp_path / "w.pt")
    assert not victim.exists()


def rezip(source: Path, target: Path, change, compression=zipfile.ZIP_STORED) -> Path:
    """Copy a zip, its (name, data) pairs passed through ``change``."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            for name, data in change(entry.filename, old.read(entry)):
                new.writestr(name, data)
    return target


def test_zip_names_cannot_leave_the_archive(tmp_path, network, table):
    folder = tmp_path / "deep" / "er"
    folder.mkdir(parents=True)
    source = write(folder / "w.pt", "zip", network)
    path = rezip(source, folder / "x.pt", lambda n, d: [(n, d), (f"../../{n}/escaped", b"x"), (f"/{n}/escaped", b"x")])
    same(tensors(path), table)
    assert not list(tmp_path.rglob("escaped"))


def test_zip_bomb_is_refused(tmp_path, network):
    source = write(tmp_path / "w.pt", "zip", network)
    path = tmp_path / "x.pt"
    bomb = rezip(source, path, lambda n, d: [(n, bytes(64 << 20) if n.endswith("/0") else d)], zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(AnncvtError, match="many times its size"):
        tensors(bomb)


def test_a_tensor_larger_than_its_data_is_refused(tmp_path):
    torch.save({"w": torch.zeros(300)}, tmp_path / "w.pt")
    # 300 as the pickle writes it, in the storage's element count, the size and elsewhere
    absurd = rezip(
        tmp_path / "w.pt",
        tmp_path / "x.pt",
        lambda n, d: [(n, d.replace(b"M\x2c\x01", b"J\xff\xff\xff\x7f") if n.endswith("data.pkl") else d)],
    )
    with pytest.raises(AnncvtError, match="larger than its data"):
        tensors(absurd)


def test_big_endian_is_refused(tmp_path, network):
    source = write(tmp_path / "w.pt", "zip", network)
    path = rezip(source, tmp_path / "x.pt", lambda n, d: [(n, b"big" if n.endswith("byteorder") else d)])
    with pytest.raises(AnncvtError, match="big-endian"):
        tensors(path)


def test_absurd_safetensors_header_is_refused(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(AnncvtError, match="damaged"):
        checkpoint.read(tmp_path / "w.safetensors")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    small = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
    folder = tmp_path_factory.mktemp("originals")
    return [write(folder / kind, kind, small).read_bytes() for kind in ("zip", "legacy", "module", "safetensors")]


@fuzz(250)
@given(data=st.data())
def test_mutated_checkpoints_raise_only_our_error(tmp_path, originals, data):
    content = bytearray(data.draw(st.sampled_from(originals)))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(content) - 1))
        action = data.draw(st.sampled_from(["set", "cut", "insert", "double"]))
        if action == "set":
            content[place] = data.draw(st.integers(0, 255))
        elif action == "cut":
            del content[place : place + data.draw(st.integers(1, 40))]
        elif action == "insert":
            content[place:place] = data.draw(st.binary(min_size=1, max_size=40))
        else:
            content[place:place] = content[place : place + 40]
        if not content:
            return
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with contextlib.suppress(AnncvtError):
        tensors(path)


def test_the_moving_average_of_torch_is_unwrapped(tmp_path, network, table):
    averaged = torch.optim.swa_utils.AveragedModel(network)
    torch.save(averaged.state_dict(), tmp_path / "average.pt")
    found, mismatch = fit(tensors(tmp_path / "average.pt"), network)
    assert not mismatch
    same(found, table)


def test_an_archive_cut_behind_one_inside_it_is_cut_short(tmp_path, table):
    """As a .pt2 is that holds its example inputs: the table of contents at the end is that of the inner archive."""
    torch.save(table, tmp_path / "inner.pt")
    with zipfile.ZipFile(tmp_path / "outer.pt", "w") as archive:
        archive.writestr("outer/version", "3")
        archive.write(tmp_path / "inner.pt")
    whole = (tmp_path / "outer.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: whole.index(b"PK\x05\x06") + 22])
    with pytest.raises(AnncvtError, match="its own table of contents is missing"):
        checkpoint.read(tmp_path / "cut.pt")


@pytest.mark.parametrize(
    ("save", "what"),
    [
        (lambda path: torch.save(torch.zeros(3), path), "holds a single tensor"),
        (lambda path: torch.save({}, path), "no weights inside$"),
        (lambda path: path.write_bytes(tarfile.TarInfo("weights").tobuf()), "a tar archive"),
        (lambda path: path.write_bytes(gzip.compress(b"weights")), "compressed with gzip"),
    ],
)
def test_what_else_is_found_under_the_name_of_a_checkpoint(tmp_path, save, what):
    save(tmp_path / "net.pt")
    with pytest.raises(AnncvtError, match=what):
        tensors(tmp_path / "net.pt")
