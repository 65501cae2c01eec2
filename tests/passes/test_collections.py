"""Real architectures of torchvision and timm, random weights: converted and stored, or refused with a reason."""

import pytest
import torch

from anncvt import folder, zoo
from anncvt.errors import AnncvtError
from anncvt.loading import load
from anncvt.passes.observe import observe
from anncvt.passes.plan import plan
from anncvt.passes.rewrite import rewrite
from anncvt.passes.trace import trace

pytestmark = pytest.mark.slow

CONVERTED = {
    "torchvision": [
        "alexnet",
        "convnext_tiny",
        "deeplabv3_mobilenet_v3_large",
        "densenet121",
        "efficientnet_b0",
        "googlenet",
        "inception_v3",
        "mnasnet0_5",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "regnet_y_400mf",
        "resnet18",
        "resnext50_32x4d",
        "shufflenet_v2_x0_5",
        "squeezenet1_1",
        "vgg11_bn",
    ],
    "timm": [
        "bat_resnext26ts",
        "coat_tiny",
        "coatnet_0_224",
        "convmixer_768_32",
        "cspresnet50",
        "dla34",
        "efficientvit_m0",
        "fastvit_t8",
        "ghostnet_050",
        "hardcorenas_a",
        "hrnet_w18_small",
        "mobilevit_xxs",
        "poolformer_s12",
        "repvgg_a0",
        "selecsls42",
        "skresnet18",
        "tf_efficientnet_b0",
        "tresnet_m",
    ],
}
REFUSED = {
    "torchvision": [("vit_b_16", "stem"), ("raft_small", "2 inputs")],
    "timm": [("nf_regnet_b0", "ScaledStdConv2d"), ("deit_tiny_patch16_224", "Linear"), ("mixer_s32_224", "stem")],
}


def cases(table):
    return [pytest.param(z, n, id=f"{z}:{n}") for z, listed in table.items() for n in listed]


def network_of(collection, name):
    if not zoo.names(collection):
        pytest.skip(f"{collection} is not installed")
    torch.manual_seed(0)
    return zoo.build(collection, name, {})


@pytest.mark.parametrize(("collection", "name"), cases(CONVERTED))
@pytest.mark.filterwarnings("ignore")
def test_converted_and_stored(collection, name, tmp_path):
    network = network_of(collection, name)
    size = 299 if name == "inception_v3" else None
    program = rewrite(plan(load(network, input_size=size)))
    folder.save(program, tmp_path / "x.ann")
    opened = folder.open_folder(tmp_path / "x.ann", model=network)
    assert opened.plan == program.plan
    for mine, other in ((program.teacher, opened.teacher), (program.student, opened.student)):
        theirs = other.state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in mine.state_dict().items())


@pytest.mark.parametrize(("collection", "name"), cases(CONVERTED))
@pytest.mark.filterwarnings("ignore")
def test_graphs_and_the_forward_pass_see_the_same_norms(collection, name):
    network = network_of(collection, name).eval()
    size = load(network).preprocess.input_size
    readers, calls = trace(network).readers, observe(network, size).calls
    norms = {n for n, module in network.named_modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)}
    for layer, call in calls.items():
        if layer in readers:
            assert set(readers[layer]) & norms == set(call.readers) & norms, layer


@pytest.mark.parametrize(
    ("collection", "name", "reason"),
    [pytest.param(z, n, r, id=f"{z}:{n}") for z, listed in REFUSED.items() for n, r in listed],
)
def test_refused_with_the_reason(collection, name, reason):
    network = network_of(collection, name)
    with pytest.raises(AnncvtError, match=reason):
        plan(load(network))
