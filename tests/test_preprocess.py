import pytest
from torch import nn

from anncvt.errors import AnncvtError
from anncvt.preprocess import choose_preprocess


class Notes:
    def __init__(self):
        self.lines = []

    def note(self, message):
        self.lines.append(message)


@pytest.mark.parametrize(
    ("stem", "size"),
    [
        (nn.Conv2d(3, 4, 3, 1, 1), (3, 32, 32)),
        (nn.Conv2d(3, 4, 7, 2, 3), (3, 224, 224)),
        (nn.Conv2d(1, 4, 3), (1, 32, 32)),
        (nn.Conv1d(2, 4, 3, 2), (2, 224)),
        (nn.Conv3d(3, 4, 3), (3, 32, 32, 32)),
        (nn.Linear(4, 4), (3, 224, 224)),
    ],
)
def test_default_size_follows_the_stem(stem, size):
    notes = Notes()
    chosen = choose_preprocess(nn.Sequential(stem), None, progress=notes)
    assert chosen.input_size == size
    assert len(notes.lines) == 1 and "--input-size" in notes.lines[0] and "--mean" in notes.lines[0]


def test_default_normalisation():
    chosen = choose_preprocess(nn.Conv2d(3, 4, 3), None)
    assert chosen.mean == (0.485, 0.456, 0.406) and chosen.std == (0.229, 0.224, 0.225)
    chosen = choose_preprocess(nn.Conv2d(2, 4, 3), None)
    assert chosen.mean == (0.0, 0.0) and chosen.std == (1.0, 1.0)


@pytest.mark.parametrize(
    ("given", "size"), [(64, (3, 64, 64)), ((64,), (3, 64, 64)), ((48, 64), (3, 48, 64)), ((3, 48, 64), (3, 48, 64))]
)
def test_sizes_as_given(given, size):
    notes = Notes()
    chosen = choose_preprocess(nn.Conv2d(3, 4, 3), None, input_size=given, mean=(0.5,), std=(0.5,), progress=notes)
    assert chosen.input_size == size and chosen.mean == (0.5,) * 3
    assert notes.lines == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"input_size": (1, 32, 32)}, "reads 3 channels, not 1"),
        ({"input_size": 0}, "not positive"),
        ({"input_size": (3, 3, 32, 32)}, "has 4 numbers"),
        ({"mean": (0.5, 0.5)}, "--mean has 2 numbers for 3"),
        ({"std": (0.5, 0.5, 0.0)}, "must not contain 0"),
    ],
)
def test_flags_that_do_not_fit(flags, message):
    with pytest.raises(AnncvtError, match=message):
        choose_preprocess(nn.Conv2d(3, 4, 3), None, **flags)


def test_a_network_that_states_its_own_preprocessing():
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    network.pretrained_cfg = {"input_size": (3, 299, 299), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    notes = Notes()
    chosen = choose_preprocess(network, None, progress=notes)
    assert (chosen.input_size, chosen.mean, chosen.std) == ((3, 299, 299), (0.5,) * 3, (0.5,) * 3)
    assert notes.lines == []


def test_the_first_registered_convolution_need_not_read_the_image():
    network = nn.Sequential(nn.Conv2d(64, 8, 1), nn.Conv2d(3, 64, 1))
    with pytest.raises(AnncvtError, match="reads 64 channels, not 3"):
        choose_preprocess(network, None, input_size=(3, 32, 32))
    network.pretrained_cfg = {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert choose_preprocess(network, None, input_size=(3, 32, 32)).input_size == (3, 32, 32)


def test_videos():
    assert choose_preprocess(nn.Sequential(nn.Conv3d(3, 8, 3, 2)), None).input_size == (3, 16, 112, 112)
