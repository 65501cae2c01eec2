import pytest
import torch
from networks import Residual

from anncvt.checkpoint import Checkpoint, read
from anncvt.errors import AnncvtError
from anncvt.state_dict import WRAPPERS, compare, fit, load_strict, weights


@pytest.fixture(scope="module")
def network():
    return Residual()


def unwrap(value):
    return weights(Checkpoint("state_dict", value), "file.pt")


@pytest.mark.parametrize("key", WRAPPERS)
def test_wrappers(network, key):
    found = unwrap({key: network.state_dict(), "epoch": 3, "optimizer": {"lr": 0.1}})
    assert list(found.tensors) == list(network.state_dict())
    assert found.notes == (f"weights taken from '{key}'",)


def test_wrapped_twice_and_under_a_name_of_its_own(network):
    assert unwrap({"checkpoint": {"model": network.state_dict()}}).tensors
    assert unwrap({"student": network.state_dict(), "epoch": 1}).tensors


def test_a_figure_that_is_a_tensor_hides_no_weights(network):
    """What the ImageNet example of PyTorch writes, as many repositories after it."""
    found = unwrap({"epoch": 3, "state_dict": network.state_dict(), "best_acc1": torch.tensor(71.2)})
    assert list(found.tensors) == list(network.state_dict())


def test_the_average_is_named_where_both_are_there(network):
    found = unwrap({"model_ema": network.state_dict(), "model": network.state_dict()})
    assert found.notes == ("weights taken from 'model' (also there: model_ema; save those alone to convert them)",)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"generator": {"w": torch.ones(1)}, "critic": {"w": torch.ones(1)}}, "several networks"),
        ({"epoch": 3}, "no weights inside, under 'epoch'"),
        ({}, "no weights"),
        ([1, 2], "holds a list"),
        ({"state_dict": {"a": 1}}, "no weights"),
    ],
)
def test_what_holds_no_single_network_is_refused(value, message):
    with pytest.raises(AnncvtError, match=message):
        unwrap(value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "encoder_q.", "module._orig_mod.", "model.net.backbone."])
def test_prefixes_are_stripped_where_that_fits(network, prefix):
    table = {prefix + name: value for name, value in network.state_dict().items()}
    fitted, mismatch = fit(table, network)
    assert not mismatch and set(fitted) == set(network.state_dict())


def test_a_prefix_that_the_network_has_itself_stays():
    network = torch.nn.ModuleDict({"model": torch.nn.Linear(2, 2)})
    fitted, mismatch = fit(network.state_dict(), network)
    assert not mismatch and set(fitted) == {"model.weight", "model.bias"}


def test_mismatches_are_listed_by_kind(network):
    table = dict(network.state_dict())
    table["head.weight"] = torch.zeros(9, 8)
    del table["conv1.weight"]
    table["extra.weight"] = torch.zeros(1)
    mismatch = compare(table, network)
    assert mismatch.missing == ("conv1.weight",) and mismatch.unexpected == ("extra.weight",)
    assert mismatch.shapes == (("head.weight", (9, 8), (5, 8)),) and len(mismatch) == 3
    text = mismatch.describe()
    assert all(part in text for part in ("head.weight is [9, 8]", "lacks conv1.weight", "has no extra.weight"))


def test_batch_counters_may_be_missing(network):
    table = {n: v for n, v in network.state_dict().items() if not n.endswith("num_batches_tracked")}
    assert not compare(table, network)
    load_strict(network, table)
    with pytest.raises(RuntimeError, match="conv1"):
        load_strict(network, {n: v for n, v in table.items() if n != "conv1.weight"})


def test_modules_that_insist_on_a_version_get_theirs():
    class Versioned(torch.nn.Linear):
        _version = 2

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
            if local_metadata.get("version") != 2:
                raise ValueError("version")
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    network, table = Versioned(2, 2), dict(Versioned(2, 2).state_dict())
    load_strict(network, table)
    assert torch.equal(network.weight, table["weight"])


def test_a_pickled_module_with_nonsense_inside_is_damaged(tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1))
    network.__dict__["_buffers"] = 3
    torch.save(network, tmp_path / "w.pt")
    with pytest.raises(AnncvtError, match="damaged"):
        weights(read(tmp_path / "w.pt"), "w.pt")
