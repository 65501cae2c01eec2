import json
import socket
import sys
from pathlib import Path

import pytest
import torch
from networks import Residual
from recorder import Recorder
from torch import nn

from anncvt import folder, zoo
from anncvt.errors import AnncvtError
from anncvt.loading import build, load


@pytest.fixture
def saved(tmp_path):
    """A checkpoint beside the Python file of its architecture, and the network it holds."""
    torch.manual_seed(0)
    network = Residual().eval()
    (tmp_path / "anncvt_arch.py").write_text(Path(sys.modules["networks"].__file__).read_text())
    torch.save(network.state_dict(), tmp_path / "net.pth")
    return tmp_path / "net.pth", network


def test_a_checkpoint_with_its_architecture_beside_it(saved):
    path, network = saved
    notes = Recorder()
    program = load(path, arch="anncvt_arch:Residual", arch_args={"classes": 5}, progress=notes)
    assert program.source.arch_path == str(path.parent) and len(program.source.sha256) == 64
    assert any("anncvt_arch:Residual from" in line for line in notes.notes)
    assert not program.teacher.training and program.stage == "loaded"
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(program.teacher(x), network(x))


def test_one_part_of_several_is_told_from_a_wrong_architecture(saved):
    path, network = saved
    part = path.with_name("net-00001-of-00002.pth")
    torch.save(dict(list(network.state_dict().items())[:5]), part)
    with pytest.raises(AnncvtError, match="do not fit") as error:
        load(part, arch="anncvt_arch:Residual")
    assert "index" in error.value.fix


def test_complex_weights_for_a_real_network_are_refused(saved):
    path, network = saved
    torch.save({name: value + 0j for name, value in network.state_dict().items()}, path)
    with pytest.raises(AnncvtError, match="holds complex numbers"):
        load(path, arch="anncvt_arch:Residual")


def test_build_gives_the_architecture_again(saved):
    path, network = saved
    source = load(path, arch="anncvt_arch:Residual").source
    built = build(source)
    assert list(built.state_dict()) == list(network.state_dict())


def test_the_architecture_is_in_the_current_folder(saved, tmp_path_factory, monkeypatch):
    path, _ = saved
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "anncvt_arch_here.py").write_text((path.parent / "anncvt_arch.py").read_text())
    monkeypatch.chdir(elsewhere)
    assert load(path, arch="anncvt_arch_here:Residual").source.arch_path == str(elsewhere)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"classes": 7}, ["head.weight is [5, 8] there and [7, 8]", "(and 1 more)"]),
        ({"width": 8}, ["stem.weight is [4, 3, 3, 3] there and [8, 3, 3, 3]"]),
    ],
)
def test_a_wrong_architecture_names_the_first_differences(saved, arguments, parts):
    with pytest.raises(AnncvtError) as error:
        load(saved[0], arch="anncvt_arch:Residual", arch_args=arguments)
    assert all(part in str(error.value) for part in parts)
    assert "--arch-args" in error.value.fix


def test_another_number_of_classes_is_recognised(saved):
    with pytest.raises(AnncvtError) as error:
        load(saved[0], arch="anncvt_arch:Residual", arch_args={"classes": 7})
    assert "num_classes=5" in error.value.fix


def test_weights_alone_ask_for_the_architecture(saved):
    with pytest.raises(AnncvtError, match="nothing says for which network") as error:
        load(saved[0])
    assert "--arch" in error.value.fix


def test_weights_that_are_not_numbers(saved):
    path, network = saved
    table = network.state_dict()
    table["conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(table, path)
    with pytest.raises(AnncvtError, match=r"conv1.weight holds NaN"):
        load(path, arch="anncvt_arch:Residual")


def test_prefixes_are_taken_off_and_it_says_so(saved):
    path, network = saved
    torch.save({f"module._orig_mod.{name}": value for name, value in network.state_dict().items()}, path)
    notes = Recorder()
    program = load(path, arch="anncvt_arch:Residual", progress=notes)
    assert torch.equal(program.teacher.conv1.weight, network.conv1.weight)
    assert "net.pth: 'module._orig_mod.' taken off the names" in notes.notes


def test_half_precision_weights_load_into_the_architecture_as_it_is(saved):
    path, network = saved
    torch.save(network.half().state_dict(), path)
    assert load(path, arch="anncvt_arch:Residual").teacher.conv1.weight.dtype == torch.float32


def test_a_module_in_python_is_copied():
    network = Residual().train()
    program = load(network, input_size=8)
    assert program.teacher is not network and network.training and not program.teacher.training
    assert program.source.arch is None and program.source.model == "Residual"
    with pytest.raises(AnncvtError, match="Python object"):
        build(program.source)


def test_wrappers_of_modules_are_taken_off():
    assert isinstance(load(nn.DataParallel(Residual())).teacher, Residual)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_modules_are_refused():
    with pytest.raises(AnncvtError, match="TorchScript"):
        load(torch.jit.script(nn.Conv2d(3, 4, 3)))


def test_a_factory_as_model():
    notes = Recorder()
    program = load("networks:Residual", arch_args={"width": 6}, progress=notes)
    assert program.teacher.stem.out_channels == 6 and program.source.arch == "networks:Residual"
    assert any("random" in line for line in notes.notes)


def test_lazy_layers_are_refused():
    with pytest.raises(AnncvtError, match="has lazy layers"):
        load("torch.nn:LazyConv2d", arch_args={"out_channels": 4, "kernel_size": 3})
    with pytest.raises(AnncvtError, match="has lazy layers"):
        load(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2)))


@pytest.mark.parametrize("model", [Residual, {"weight": torch.ones(1)}, 3])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(AnncvtError, match="a network is expected") as error:
        load(model)
    assert "nn.Module" in error.value.fix


def test_a_factory_that_imports_torchvision_works_beside_a_cpu_torch(tmp_path, monkeypatch):
    """Its import fails there until the missing schemas are declared."""
    declared = []
    monkeypatch.setattr(zoo, "import_torchvision", lambda: declared.append(True))
    monkeypatch.setattr(zoo, "declared_here", declared, raising=False)
    (tmp_path / "anncvt_with_torchvision.py").write_text(
        "from anncvt import zoo\n"
        "if not zoo.declared_here:\n"
        "    raise RuntimeError('operator torchvision::nms does not exist')\n"
        "from torch.nn import Conv2d\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = {"in_channels": 3, "out_channels": 4, "kernel_size": 3}
    assert isinstance(load("anncvt_with_torchvision:Conv2d", arch_args=arguments).teacher, nn.Conv2d)
    assert declared == [True]


@pytest.mark.parametrize(
    ("model", "message"),
    [("missing.pth", "no such file"), ("no_such_module:net", "no module"), ("a/b:c.pth", "no such file")],
)
def test_models_that_are_not_there(model, message):
    with pytest.raises(AnncvtError, match=message):
        load(model)


def test_a_folder_is_not_a_checkpoint(tmp_path):
    with pytest.raises(AnncvtError, match="a folder"):
        load(tmp_path)


def test_a_pickled_module_of_torch_classes_brings_its_architecture(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    torch.save(network, tmp_path / "net.pt")
    program = load(tmp_path / "net.pt")
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(program.teacher(x), network(x))
    assert torch.equal(build(program.source)(x), network(x))


def test_arguments_that_nothing_takes_are_refused(tmp_path):
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), tmp_path / "net.pt")
    with pytest.raises(AnncvtError, match="built already"):
        load(tmp_path / "net.pt", arch_args={"n": 3}, input_size=8)


@pytest.mark.parametrize(
    ("model", "arch", "message"),
    [
        (Residual(), {"arch": "anncvt_arch:Residual"}, "is given"),
        (Residual(), {"arch_args": {"width": 8}}, "is given"),
        ("anncvt_arch:Residual", {"arch": "anncvt_arch:Residual"}, "names a network"),
        (Residual().to("meta"), {}, "without values"),
    ],
)
def test_what_contradicts_itself_is_refused(model, arch, message):
    with pytest.raises(AnncvtError, match=message):
        load(model, input_size=8, **arch)


def test_a_pickled_module_of_other_classes_needs_its_architecture(tmp_path, saved):
    network = saved[1]
    torch.save(network, tmp_path / "whole.pt")
    with pytest.raises(AnncvtError, match=r"networks\.Residual") as error:
        load(tmp_path / "whole.pt")
    assert "--arch" in error.value.fix
    program = load(tmp_path / "whole.pt", arch="anncvt_arch:Residual")
    assert torch.equal(program.teacher.conv1.weight, network.conv1.weight)


def test_allowed_names_do_not_include_functions_of_the_library(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    network.extra = torch.hub.load
    torch.save(network, tmp_path / "net.pt")
    with pytest.raises(AnncvtError, match=r"torch\.hub\.load"):
        load(tmp_path / "net.pt")


class Opener:
    """Needs a call when unpickled; harmless, but nothing that could know that."""

    def __reduce__(self):
        return json.loads, ("3",)


def test_trust_pickle_runs_what_is_refused_otherwise(tmp_path, saved):
    path, network = saved
    torch.save({"state_dict": network.state_dict(), "x": Opener()}, path)
    with pytest.raises(AnncvtError, match=r"json\.loads"):
        load(path, arch="anncvt_arch:Residual")
    program = load(path, arch="anncvt_arch:Residual", trust_pickle=True)
    assert torch.equal(program.teacher.conv1.weight, network.conv1.weight)


needs_torchvision = pytest.mark.skipif(not zoo.names("torchvision"), reason="torchvision is not installed")


@needs_torchvision
def test_the_file_name_suggests_and_every_tensor_confirms(tmp_path):
    network = zoo.build("torchvision", "squeezenet1_1", {})
    torch.save(network.state_dict(), tmp_path / "squeezenet1_1-b8a52dc0.pth")
    notes = Recorder()
    program = load(tmp_path / "squeezenet1_1-b8a52dc0.pth", progress=notes)
    assert program.source.arch == "torchvision:squeezenet1_1" and program.preprocess.input_size == (3, 224, 224)
    assert any("strict match" in line for line in notes.notes)
    torch.save(zoo.build("torchvision", "squeezenet1_0", {}).state_dict(), tmp_path / "squeezenet1_1-b8a52dc0.pth")
    with pytest.raises(AnncvtError, match="do not fit torchvision:squeezenet1_1"):
        load(tmp_path / "squeezenet1_1-b8a52dc0.pth")


@needs_torchvision
def test_what_training_scripts_note_beside_the_weights_suggests_too(tmp_path):
    network = zoo.build("torchvision", "squeezenet1_1", {})
    path = tmp_path / "model_best.pth.tar"
    torch.save({"arch": "squeezenet1_1", "state_dict": network.state_dict(), "best_acc1": torch.tensor(58.2)}, path)
    assert load(path).source.arch == "torchvision:squeezenet1_1"
    torch.save({"arch": "my_net", "state_dict": network.state_dict()}, path)
    with pytest.raises(AnncvtError, match="nothing says for which network"):
        load(path)


@needs_torchvision
def test_ambiguous_names_are_listed_not_guessed(tmp_path, monkeypatch):
    network = zoo.build("torchvision", "squeezenet1_1", {})
    torch.save(network.state_dict(), tmp_path / "net.pth")
    pair = [zoo.Candidate("torchvision", "squeezenet1_1")] * 2
    monkeypatch.setattr(zoo, "candidates", lambda path, stated: pair)
    with pytest.raises(AnncvtError, match="several architectures fit") as error:
        load(tmp_path / "net.pth")
    assert "--arch torchvision:squeezenet1_1" in error.value.fix


@needs_torchvision
def test_unknown_names_suggest_close_ones():
    with pytest.raises(AnncvtError, match="no architecture 'resnet19'") as error:
        load("torchvision:resnet19")
    assert "resnet18" in error.value.fix


@needs_torchvision
def test_without_pretrained_weights_a_named_network_is_random_and_says_so(monkeypatch):
    real = zoo.build

    def offline(zoo_name, name, arguments, *, pretrained=False):
        if pretrained:
            raise OSError("no route to host")
        return real(zoo_name, name, arguments)

    monkeypatch.setattr(zoo, "build", offline)
    notes = Recorder()
    program = load("torchvision:squeezenet1_1", progress=notes)
    assert program.history[0].metrics["weights"] == "random"
    assert any("RANDOM" in line and "no route" in line for line in notes.notes)


@needs_torchvision
@pytest.mark.parametrize(
    ("name", "size", "heads"),
    [
        ("googlenet", 64, {"aux_logits": True, "init_weights": False}),
        ("inception_v3", 107, {"aux_logits": True, "init_weights": False}),
        ("deeplabv3_mobilenet_v3_large", 64, {"aux_loss": True, "weights_backbone": None}),
    ],
)
def test_published_networks_are_built_again_without_their_weights(name, size, heads, monkeypatch, tmp_path):
    """Factories make other networks with weights than without: fewer heads or more, another normalisation in front."""
    models = zoo.import_torchvision().models
    torch.manual_seed(0)
    weights = models.get_model(name, weights=None, **heads).state_dict()
    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", lambda *args, **kwargs: weights)
    program = load(f"torchvision:{name}", input_size=size)
    assert program.history[0].metrics["weights"] == "pretrained"
    folder.save(program, tmp_path / "net.ann")
    again = folder.open_folder(tmp_path / "net.ann")
    pixels, published = torch.rand(2, 3, size, size), models.get_model(name, weights="DEFAULT").eval()

    def logits(network, mean, std):
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        with torch.no_grad():
            found = network((pixels - mean) / std)
        return found["out"] if isinstance(found, dict) else found

    expected = logits(published, zoo.IMAGENET_MEAN, zoo.IMAGENET_STD)
    for network in (program.teacher, again.teacher):
        assert not getattr(network, "transform_input", False)
        found = logits(network, program.preprocess.mean, program.preprocess.std)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture
def hub_folder(tmp_path):
    """What the hub keeps of a timm model: config.json and weights."""
    if not zoo.names("timm"):
        pytest.skip("timm is not installed")
    from timm.models._hub import save_for_hf

    torch.manual_seed(0)
    network = zoo.build("timm", "test_resnet", {"num_classes": 7}).eval()
    zoo.state_preprocess(network, {"input_size": (3, 96, 96), "mean": (0.1, 0.2, 0.3)})
    save_for_hf(network, tmp_path / "hub", model_config={"num_classes": 7}, safe_serialization=True)
    return tmp_path / "hub", network


def test_a_config_beside_the_weights_says_the_architecture(hub_folder):
    place, network = hub_folder
    notes = Recorder()
    program = load(place / "model.safetensors", progress=notes)
    assert program.source.arch == "timm:test_resnet" and program.source.arch_args["num_classes"] == 7
    assert program.preprocess.input_size == (3, 96, 96) and program.preprocess.mean == (0.1, 0.2, 0.3)
    x = torch.randn(1, 3, 96, 96)
    assert torch.equal(program.teacher(x), network(x))
    assert any("config.json" in line for line in notes.notes)


def test_a_hostile_config_reads_no_other_file_and_makes_nothing_large(hub_folder, tmp_path):
    place, network = hub_folder
    config = json.loads((place / "config.json").read_text())
    torch.save({"state_dict": network.state_dict(), "x": Opener()}, tmp_path / "evil.pt")
    config["model_args"] = {"checkpoint_path": str(tmp_path / "evil.pt"), "pretrained": True}
    (place / "config.json").write_text(json.dumps(config))
    assert load(place / "model.safetensors").source.arch_args == {"num_classes": 7}
    config["model_args"] = {"channels": [1 << 20] * 4}
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(AnncvtError, match="do not fit timm:test_resnet"):
        load(place / "model.safetensors")
    for layers, message in (([1 << 30] * 4, "absurdly large"), ([1 << 17] * 4, "many times more layers")):
        config["model_args"] = {"layers": layers}
        (place / "config.json").write_text(json.dumps(config))
        with pytest.raises(AnncvtError, match=message) as error:
            load(place / "model.safetensors")
        assert "--arch" in error.value.fix


def test_hub_names_are_resolved_so_that_the_folder_opens_without_the_hub(hub_folder, tmp_path, monkeypatch):
    from huggingface_hub.errors import EntryNotFoundError
    from timm.models import _hub

    from anncvt import folder

    place, network = hub_folder

    def local(repo_id, filename, **_):
        assert repo_id == "someone/net"
        if not (place / filename).exists():
            raise EntryNotFoundError(filename)
        return str(place / filename)

    with monkeypatch.context() as patched:
        patched.setattr(_hub, "hf_hub_download", local)
        program = load("hf-hub:someone/net")
        assert program.history[0].metrics["weights"] == "pretrained"
    assert program.source.model == "hf-hub:someone/net" and program.source.arch == "timm:test_resnet"
    x = torch.randn(1, 3, 96, 96)
    assert torch.equal(program.teacher(x), network(x))
    folder.save(program, tmp_path / "net.ann")
    monkeypatch.setattr(_hub, "hf_hub_download", None)
    assert torch.equal(folder.open_folder(tmp_path / "net.ann").teacher(x), network(x))


@pytest.mark.parametrize(("proxies", "offline"), [({}, True), ({"https": "http://proxy"}, False)])
def test_without_network_the_hub_is_not_asked_again_and_again(monkeypatch, proxies, offline):
    if not zoo.names("timm"):
        pytest.skip("timm is not installed")
    from huggingface_hub import constants
    from timm.models import _hub

    seen = []

    def asked(*_, **__):
        seen.append(constants.HF_HUB_OFFLINE)
        raise OSError("no such thing in the cache")

    def unknown(*_):
        raise socket.gaierror("no such host")

    monkeypatch.setattr(_hub, "hf_hub_download", asked)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr("urllib.request.getproxies", lambda: proxies)
    with pytest.raises(AnncvtError, match="no such thing"):
        load("hf-hub:someone/net")
    assert seen == [offline] and not constants.HF_HUB_OFFLINE


def test_a_hub_that_does_not_answer_is_an_error_with_a_way_out(monkeypatch):
    if not zoo.names("timm"):
        pytest.skip("timm is not installed")
    from timm.models import _hub

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(_hub, "hf_hub_download", offline)
    recorder = Recorder()
    with pytest.raises(AnncvtError, match="no route to host") as error:
        load("hf-hub:someone/net", progress=recorder)
    assert "config.json" in error.value.fix and len(recorder.totals) == 1  # told what takes so long
