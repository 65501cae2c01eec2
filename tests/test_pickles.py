import contextlib
import io
import os
import pickle
import pickletools

import pytest
from fuzz import fuzz
from hypothesis import given
from hypothesis import strategies as st

from anncvt import pickles
from anncvt.errors import AnncvtError


def read(data: bytes) -> pickles.Unpickled:
    return pickles.unpickle(io.BytesIO(data), "file.pt")


class Calls:
    """Pickles to a call of ``function(*args)``."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Plain:
    def __init__(self):
        self.number = 3


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_round_trip(protocol):
    value = {"a": [1, 2.5, None, True], "b": ("text", (3, "x")), "c": {1, 2}}
    assert read(pickle.dumps(value, protocol)).value == value


@pytest.mark.parametrize("protocol", range(6))
def test_calls_are_refused_by_name_and_not_made(protocol, tmp_path):
    victim = tmp_path / "victim"
    data = pickle.dumps({"weights": 1, "x": Calls(os.mkdir, str(victim))}, protocol)
    with pytest.raises(AnncvtError, match=r"mkdir") as error:
        read(data)
    assert not victim.exists()
    assert "--trust-pickle" in error.value.fix


@pytest.mark.parametrize("function", [eval, exec, getattr, __import__, open])
def test_builtins_that_reach_code_are_refused(function, tmp_path):
    with pytest.raises(AnncvtError, match=function.__name__):
        read(pickle.dumps(Calls(function, "1")))


def test_objects_of_unknown_classes_are_inert():
    stand_in = read(pickle.dumps(Plain(), 2)).value
    assert isinstance(stand_in, pickles.Inert)
    assert stand_in.path.endswith("Plain") and vars(stand_in)["number"] == 3


def test_naming_a_module_does_not_import_it():
    data = b"\x80\x02canncvt_no_such_module\nThing\n)\x81."
    assert read(data).value.path == "anncvt_no_such_module.Thing"


def test_a_pickle_cannot_change_what_later_ones_see():
    # BUILD with slot state sets attributes on whatever is on the stack, here the tensor rebuilder and OrderedDict
    for name in (b"torch._utils\n_rebuild_tensor_v2", b"collections\nOrderedDict"):
        data = b"\x80\x02c" + name + b"\nN}X\x08\x00\x00\x00__call__K\x01s\x86b."
        with pytest.raises(AnncvtError, match="damaged"):
            read(data)
    assert read(pickle.dumps({"a": 1})).value == {"a": 1}


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # a memo slot that would allocate gigabytes
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",  # bytes longer than the file
        b"\x80\x02(((",
        b"",
        b"\x80\x02.",
        b"\x80\x63N.",
    ],
)
def test_broken_pickles_are_damaged_files(data):
    with pytest.raises(AnncvtError, match="damaged"):
        read(data)


def test_too_many_steps_are_refused(monkeypatch):
    monkeypatch.setattr(pickles, "MAX_OPCODES", 100)
    with pytest.raises(AnncvtError, match="absurdly large"):
        read(pickle.dumps(list(range(1000)), 2))


@pytest.mark.parametrize("numbers", [(-1, (2,), (1,)), (0, (-2,), (1,)), (0, (2,), (1, 1)), (0, ("2",), (1,))])
def test_impossible_tensors_are_refused(numbers):
    offset, size, stride = numbers
    # Written by hand, for pickle.dumps would want a real tensor.
    data = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    )
    items = b"".join(pickletools.optimize(pickle.dumps(item, 2))[2:-1] for item in (offset, size, stride, False, {}))
    with pytest.raises(AnncvtError, match="impossible"):
        read(data + items + b"tR.")


@fuzz(100)
@given(st.binary(max_size=300))
def test_random_bytes_raise_only_our_error(data):
    with contextlib.suppress(AnncvtError):
        read(b"\x80\x02" + data)
