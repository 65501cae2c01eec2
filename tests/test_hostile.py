"""Files made to do harm: nothing in them runs, none exhausts memory, every one ends in an ``AnncvtError``."""

import contextlib
import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from fuzz import fuzz
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from anncvt import checkpoint, pickles
from anncvt.errors import AnncvtError
from anncvt.loading import load
from anncvt.state_dict import weights

TESTS = Path(__file__).parent


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).eval()


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def zipped(path: Path, content: dict[str, bytes], compression=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def with_pickle(tmp_path: Path, data: bytes) -> Path:
    """A valid archive whose pickle is ``data``."""
    torch.save(small().state_dict(), tmp_path / "base.pt")
    content = members(tmp_path / "base.pt")
    name = next(n for n in content if n.endswith("data.pkl"))
    return zipped(tmp_path / "x.pt", {**content, name: data})


def tensor(
    key: bytes = b"0", size: bytes = b"K\x02\x85", stride: bytes = b"K\x01\x85", numel: bytes = b"K\x02"
) -> bytes:
    """Pickled ``_rebuild_tensor_v2`` of any claim; sizes and strides are pickled tuples."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX" + struct.pack("<I", len(key)) + key
    storage += b"X\x03\x00\x00\x00cpu" + numel + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + size + stride + b"\x89}tR"


def table(value: bytes) -> bytes:
    return b"\x80\x02}X\x08\x00\x00\x000.weight" + value + b"s."


MERSENNE = (1 << 61) - 1  # integers hash to their remainder

HUGE = b"\x8a\x06\x00\x00\x00\x00\x00\x01"  # LONG1: 2**40

HOSTILE = {
    "a call in a list": b"\x80\x02](cos\nsystem\nX\x02\x00\x00\x00id\x85Re.",
    "a call as a key": b"\x80\x02}cos\ngetpid\n)RK\x01s.",
    "a call through OBJ": b"\x80\x02(cos\nsystem\nX\x02\x00\x00\x00ido.",
    "a call through INST": b"(S'id'\nios\nsystem\n.",
    "a call through NEWOBJ_EX": b"\x80\x04cos\nsystem\nX\x02\x00\x00\x00id\x85}\x92.",
    "getattr of a rebuilder": b"\x80\x02cbuiltins\ngetattr\nctorch._utils\n_rebuild_tensor_v2\n"
    b"X\x0b\x00\x00\x00__globals__\x86R.",
    "a dotted name": b"\x80\x04\x8c\x05torch\x8c\x0dhub.load.call\x93)R.",
    "BUILD on a class": b"\x80\x02ccollections\nOrderedDict\n}X\x06\x00\x00\x00updateK\x01sb.",
    "SETITEMS on an object": b"\x80\x02cos\nenviron\n)\x81(X\x04\x00\x00\x00PATHX\x00\x00\x00\x00u.",
    "a rebuilder inside a rebuilder": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\ncos\nsystem\n"
    b"X\x02\x00\x00\x00id\x85}tR.",
    "an extension code": b"\x80\x02\x82\x01.",
    "a persistent call": b"\x80\x02cos\nsystem\nQ.",
    "a size that is not there": table(tensor(size=HUGE + b"\x85", numel=HUGE)),
    "a size that is a view of nothing": table(tensor(size=HUGE + b"\x85", stride=b"K\x00\x85")),
    "many dimensions": table(tensor(size=b"(" + b"K\x01" * 200 + b"t", stride=b"(" + b"K\x01" * 200 + b"t")),
    "a storage outside the archive": table(tensor(key=b"../../../../../../etc/passwd")),
    "a storage with an absolute name": table(tensor(key=b"/etc/passwd")),
    "a huge memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "bytes that are not there": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"abc.",
    "text that is not there": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"abc.",
    "a long number": b"\x80\x02I" + b"9" * 200_000 + b"\n.",
    "tuples that hash forever": b"\x80\x02K\x01q\x000" + b"h\x00h\x00\x86q\x000" * 60 + b"}h\x00K\x01s.",
    "sets of such tuples": b"\x80\x04K\x01q\x000" + b"h\x00h\x00\x86q\x000" * 60 + b"\x8f(h\x00\x90.",
    "a deep tuple": b"\x80\x02}N" + b"\x85" * 20_000 + b"K\x01s.",
    "a deep list": b"\x80\x02" + b"]" * 30_000 + b"a" * 29_999 + b".",
    "itself": b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.",
    "marks alone": b"\x80\x02" + b"(" * 100_000 + b".",
    "keys of equal hashes": b"\x80\x02}("
    + b"".join(b"\x8a\x0a%bN" % (n * MERSENNE).to_bytes(10, "little") for n in range(9, 60_000))
    + b"u.",
    "one large key again and again": b"\x80\x02K\x01q\x000"
    + b"h\x00h\x00\x86q\x000" * 12
    + b"}("
    + b"h\x00N" * 300_000
    + b"u.",
    "a set made by a call": b"\x80\x02K\x01q\x000"
    + b"h\x00h\x00\x86q\x000" * 12
    + b"cbuiltins\nset\n]("
    + b"h\x00" * 300_000
    + b"e\x85R.",
    **{
        f"tuples made by {how}": b"\x80\x02K\x01q\x000"
        + (b"c%b\n](h\x00h\x00e\x85%bq\x000" % (name, code)) * 60
        + b"}h\x00Ns."
        for how, name, code in (
            ("calls", b"builtins\ntuple", b"R"),
            ("calls of torch.Size", b"torch\nSize", b"R"),
            ("NEWOBJ", b"torch\nSize", b"\x81"),
        )
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles(tmp_path, name, monkeypatch):
    def forbidden(*arguments):
        raise SystemError("called")

    for function in ("system", "getpid"):
        monkeypatch.setattr(os, function, forbidden)
    with pytest.raises(AnncvtError) as error:
        load(with_pickle(tmp_path, HOSTILE[name]), arch="torch.nn:Conv2d", arch_args=CONV)
    assert len(str(error.value)) < 2000


CONV = {"in_channels": 1, "out_channels": 2, "kernel_size": 1}


def test_none_of_them_needs_memory(tmp_path):
    """All in one process that may use little more than torch itself."""
    for number, data in enumerate(HOSTILE.values()):
        os.replace(with_pickle(tmp_path, data), tmp_path / f"{number}.pt")
    save_file({"w": torch.zeros(2)}, tmp_path / "good.safetensors")
    bombs = {"archive/data.pkl": pickle.dumps({}), "archive/data/0": bytes(256 << 20), "archive/version": b"3"}
    zipped(tmp_path / "bomb.pt", bombs, zipfile.ZIP_DEFLATED)
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 30, 1 << 30], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "shape.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    (tmp_path / "header.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b'{"w": {"dtype": "F32"')
    code = f"""
import resource, sys
from pathlib import Path
import torch
from anncvt.errors import AnncvtError
from anncvt.loading import load
load(torch.nn.Conv2d(1, 2, 1))
used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20),) * 2)
count = 0
for file in sorted(Path(sys.argv[1]).iterdir()):
    try:
        load(file, arch='torch.nn:Conv2d', arch_args={CONV!r})
    except AnncvtError as error:
        assert 'not enough memory' not in str(error), (file, error)
        count += 1
print(count)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=TESTS.parent, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= len(HOSTILE) + 4
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2 << 20  # KiB


def test_an_index_of_itself_ends(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"w": path.name}}))
    with pytest.raises(AnncvtError, match="is an index, too"):
        checkpoint.read(path)


@pytest.mark.parametrize("shard", ["../x.pt", "/etc/passwd", "..", "a/b.pt", 3, None, ["x"]])
def test_an_index_names_files_beside_it_only(tmp_path, shard):
    path = tmp_path / "index.json"
    path.write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(AnncvtError):
        checkpoint.read(path)


@pytest.mark.parametrize("field", ["sizes", "strides", "storage_offset", "dtype", "path_name"])
@pytest.mark.parametrize("value", [1 << 60, -1, "../../etc/passwd", None])
@pytest.mark.filterwarnings("ignore")
def test_an_exported_program_with_absurd_tables(tmp_path, field, value):
    network = small()
    with open(tmp_path / "net.pt2", "wb") as file:
        torch.export.save(torch.export.export(network, (torch.zeros(1, 1, 4, 4),)), file)
    content = members(tmp_path / "net.pt2")
    name = next(n for n in content if n.endswith("model_weights_config.json"))
    entries = json.loads(content[name])
    for entry in entries["config"].values():
        meta = entry["tensor_meta"]
        if field in ("sizes", "strides"):
            meta[field] = [{"as_int": value}] * len(meta["sizes"]) or [{"as_int": value}]
        elif field == "storage_offset":
            meta[field] = {"as_int": value}
        else:
            (meta if field == "dtype" else entry)[field] = value
    path = zipped(tmp_path / "x.pt2", {**content, name: json.dumps(entries).encode()})
    with pytest.raises(AnncvtError):
        weights(checkpoint.read(path), str(path))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    network = small()
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, folder / "wrapped.pt")
    torch.save(network, folder / "module.pt")
    torch.save(network.state_dict(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    with pytest.warns():
        torch.jit.script(network).save(str(folder / "script.pt"))
    return {file.stem: file for file in folder.iterdir()}


@fuzz(40)
@given(data=st.data())
def test_mutations_inside_a_valid_archive(tmp_path, originals, data):
    load_mutated(tmp_path, originals, data)


@pytest.mark.slow
@fuzz(4000)
@given(data=st.data())
def test_many_mutations_inside_a_valid_archive(tmp_path, originals, data):
    load_mutated(tmp_path, originals, data)


def load_mutated(tmp_path, originals, data):
    """Checksums are right, so that the reader itself is what meets the damage."""
    content = members(originals[data.draw(st.sampled_from(["wrapped", "module", "script"]))])
    name = data.draw(st.sampled_from([n for n in content if not n.endswith((".debug_pkl", "/.data/serialization_id"))]))
    content[name] = mutated(content[name], data)
    path = zipped(tmp_path / "x.pt", content)
    with contextlib.suppress(AnncvtError):
        load(path, arch="torch.nn:Conv2d", arch_args=CONV)
    with contextlib.suppress(AnncvtError):
        load(path)


OPCODES = [
    bytes([code]) for code in b"()0123.NKJMIXVU]}el[atsubRQco\x81\x82\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94"
]


@fuzz(300)
@given(data=st.data())
def test_mutated_pickles(originals, data):
    original = next(v for n, v in members(originals["module"]).items() if n.endswith("data.pkl"))
    with contextlib.suppress(AnncvtError):
        pickles.unpickle(io.BytesIO(mutated(original, data, OPCODES)), "x")


def mutated(content: bytes, data: st.DataObject, tokens: list[bytes] | None = None) -> bytes:
    """Bytes with a few of them changed, removed, repeated, or (of a pickle) opcodes put in between."""
    changed = bytearray(content)
    insertion = st.binary(min_size=1, max_size=20) | st.sampled_from(tokens or [b"\x00" * 8, b"\xff" * 8])
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, max(0, len(changed) - 1)))
        action = data.draw(st.sampled_from(["set", "cut", "insert", "repeat"]))
        if action == "set" and changed:
            changed[place] = data.draw(st.integers(0, 255))
        elif action == "cut":
            del changed[place : place + data.draw(st.integers(1, 30))]
        elif action == "insert":
            changed[place:place] = data.draw(insertion)
        else:
            changed[place:place] = changed[place : place + data.draw(st.integers(1, 60))]
    return bytes(changed)
