"""Real architectures of torchvision and timm, random weights: converted and stored, or refused with a reason.

The whole sweep is ``make coverage``; these are one of each kind that once was trouble.
"""

import sys
from pathlib import Path

import pytest
import torch

from anncvt import zoo
from anncvt.passes.observe import observe
from anncvt.passes.trace import trace

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import coverage

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CONVERTED = [
    "torchvision:alexnet",
    "torchvision:convnext_tiny",
    "torchvision:deeplabv3_mobilenet_v3_large",
    "torchvision:efficientnet_b0",
    "torchvision:googlenet",
    "torchvision:inception_v3",
    "torchvision:mc3_18",
    "torchvision:mobilenet_v3_small",
    "torchvision:resnext50_32x4d",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:vgg11_bn",
    "timm:bat_resnext26ts",
    "timm:coat_tiny",
    "timm:coatnet_nano_rw_224",
    "timm:convmixer_768_32",
    "timm:dla34",
    "timm:efficientvit_m0",
    "timm:fastvit_t8",
    "timm:hrnet_w18_small",
    "timm:mobilevit_xxs",
    "timm:nf_regnet_b0",
    "timm:repvgg_a0",
    "timm:skresnet18",
    "timm:tf_efficientnet_b0",
    "timm:tresnet_m",
]
REFUSED = [
    ("torchvision:vit_b_16", "stem"),
    ("torchvision:raft_small", "2 inputs"),
    ("timm:deit_tiny_patch16_224", "Linear"),
    ("timm:mixer_s32_224", "stem"),
]


def installed(name):
    collection, _, model = name.partition(":")
    if model not in zoo.names(collection):
        pytest.skip(f"{name} is not installed")


@pytest.mark.parametrize("name", CONVERTED)
def test_converted(name):
    installed(name)
    row = coverage.examine(name)
    assert row["status"] == "converted", row
    assert row["swapped"] > 0 and row["equal"] > 0 and row.get("onnx", "exported") == "exported"


@pytest.mark.parametrize(("name", "reason"), REFUSED)
def test_refused_with_the_reason(name, reason):
    installed(name)
    row = coverage.examine(name)
    assert row["status"] == "refused" and reason in row["reason"]


@pytest.mark.parametrize("name", ["torchvision:googlenet", "torchvision:shufflenet_v2_x0_5", "timm:coat_tiny"])
def test_graphs_and_the_forward_pass_see_the_same_norms(name):
    installed(name)
    network = zoo.build(*name.split(":"), {}).eval()
    size = coverage.choose_preprocess(network, name).input_size
    readers, calls = trace(network).readers, observe(network, size).calls
    norms = {n for n, module in network.named_modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)}
    for layer, call in calls.items():
        if layer in readers:
            assert set(readers[layer]) & norms == set(call.readers) & norms, layer
