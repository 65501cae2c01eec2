"""Files are old or new, never half: also when the disk is full."""

import contextlib
import resource

import pytest
import torch

from anncvt.errors import AnncvtError
from anncvt.files import write_state, write_tensors, write_text


@contextlib.contextmanager
def no_file_larger_than(size):
    """As if the disk was full: writing on fails with an error of the operating system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("write", "small", "large"),
    [
        (write_text, "text", "text" * 100_000),
        (write_state, {"a": torch.zeros(9)}, {"a": torch.zeros(100_000)}),
        (write_tensors, {"a": torch.zeros(9)}, {"a": torch.zeros(100_000)}),
    ],
    ids=["text", "state", "tensors"],
)
def test_what_was_there_stays_when_the_disk_is_full(tmp_path, write, small, large):
    target = tmp_path / "folder" / "file"
    write(target, small)
    kept = target.read_bytes()
    with no_file_larger_than(20_000), pytest.raises(AnncvtError, match=r"cannot write: .*File too large"):
        write(target, large)
    assert target.read_bytes() == kept
    assert [path.name for path in target.parent.iterdir()] == ["file"]
    write(target, large)
    assert target.read_bytes() != kept
