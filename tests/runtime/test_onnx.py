"""The exported file: what is in it, who can read it, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator
from torch import nn

from anncvt.errors import AnncvtError
from anncvt.loading import load
from anncvt.nn import AdderConv1d, AdderConv2d, AdderConv3d
from anncvt.passes.choice import Choice
from anncvt.passes.plan import plan
from anncvt.passes.rewrite import rewrite
from anncvt.program import LayerPlan, Plan, Preprocess, Program, Record, Source
from anncvt.runtime import onnx_file
from anncvt.runtime.onnx import export, export_network, metadata, run, session
from anncvt.runtime.onnx_body import DOMAIN, OPSETS

SIZE = (3, 12, 10)


class Net(nn.Module):
    """A convolution stem, a residual adder block, groups, asymmetric padding, an inserted norm, a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.residual, self.residual_bn = AdderConv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.grouped = AdderConv2d(8, 16, 3, 2, 1, groups=2, bias=True, norm=True)
        self.uneven = AdderConv2d(16, 16, (2, 3), padding="same", norm=True)
        self.mirrored = AdderConv2d(16, 8, 3, padding=1, dilation=1, padding_mode="reflect", norm=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        x = (x + self.residual_bn(self.residual(x))).relu()
        x = self.mirrored(self.uneven(self.grouped(x)).relu())
        return self.fc(x.mean((2, 3)))


class Volumes(nn.Module):
    """Adders over one and three dimensions, which are composites of the 2-d op."""

    def __init__(self):
        super().__init__()
        self.line, self.line_bn = AdderConv1d(4, 6, 3, stride=2, padding=1), nn.BatchNorm1d(6)
        self.block, self.block_bn = AdderConv3d(1, 3, (2, 3, 3), padding=(1, 1, 0)), nn.BatchNorm3d(3)

    def forward(self, x):
        x = self.line_bn(self.line(x))
        return self.block_bn(self.block(x[:, None, :, :, None].repeat(1, 1, 1, 1, 4))).flatten(1)


class Plain(nn.Module):
    """What ordinary networks are made of; padding and splitting changed in opset 18."""

    def __init__(self):
        super().__init__()
        self.stem, self.adder, self.bn = nn.Conv2d(3, 4, 3), AdderConv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        y = self.bn(self.adder(self.stem(x).relu())).relu()
        first, second = nn.functional.pad(y, (1, 1, 2, 0), mode="reflect").chunk(2, 1)
        y = nn.functional.pad(torch.cat([first + second, second], 1), (0, 0, 0, 0, 0, 3))[:, :4]
        y = nn.functional.hardswish(nn.functional.avg_pool2d(nn.functional.max_pool2d(y, 2), 2)).mean((2, 3))
        return self.fc(nn.functional.dropout(y, training=self.training))


def settled(network, *size):
    """The network with batch statistics that fit its activations."""
    torch.manual_seed(0)
    for norm in network.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.momentum = None  # a plain average
    network.train()
    with torch.no_grad():
        for _ in range(10):
            network(torch.randn(8, *size))
    return network.eval()


def program_of(student, size=SIZE):
    layer = LayerPlan("residual", "Conv2d", "swap", "dense", (8, 12, 10), (8, 12, 10), (3, 3), (1, 1), 1, 1, 2, 0)
    return Program(
        Source("/home/someone/models/net.pth", arch="zoo:net"),
        Preprocess(size, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)),
        teacher=nn.Identity(),
        student=student,
        plan=Plan((layer,)),
        history=[Record("distilled", 1.0, {"top1": 61.5, "top5": 90.0, "loss": 0.1}, 0, {})],
        classes=["cat", "dog", "Ærø", "d", "e"],
    )


def inputs(batch, size=SIZE):
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(batch))


@pytest.fixture(scope="module")
def student():
    return settled(Net(), *SIZE)


@pytest.fixture(scope="module")
def exported(student, tmp_path_factory):
    return export(program_of(student), tmp_path_factory.mktemp("export") / "model.onnx")


def assert_close(actual, network, x):
    with torch.no_grad():
        wanted = network(x).numpy()
    np.testing.assert_allclose(actual, wanted, atol=1e-4 * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_stock_onnxruntime_agrees_with_torch(exported, student, batch):
    x = inputs(batch)
    assert_close(run(session(exported, threads=1), x.numpy()), student, x)


def test_reference_evaluator_agrees_with_torch(exported, student):
    x = inputs(2)
    assert_close(ReferenceEvaluator(onnx.load(exported)).run(None, {"image": x.numpy()})[0], student, x)


def test_structure(exported):
    model = onnx.load(exported)
    onnx.checker.check_model(model, full_check=True)
    inferred = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    (image,), (logits,) = inferred.graph.input, inferred.graph.output
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (image, logits)]
    assert (image.name, logits.name) == ("image", "logits")
    assert shapes == [["batch", *SIZE], ["batch", 5]]
    adders = {node.name: node for node in model.graph.node if node.domain == DOMAIN}
    assert list(adders) == ["residual", "grouped", "uneven", "mirrored"]
    for node in adders.values():
        assert {a.name for a in node.attribute} == {"strides", "pads", "dilations", "group"}
    assert [list(a.ints) for a in adders["uneven"].attribute if a.name == "pads"] == [[0, 1, 1, 1]]
    assert [(f.domain, f.name) for f in model.functions] == [(DOMAIN, "Adder2d")]
    assert {o.domain: o.version for o in model.opset_import} == {"": 18, DOMAIN: 1}


def test_metadata(exported):
    entries = {entry.key: entry.value for entry in onnx.load(exported).metadata_props}
    assert entries["anncvt.source"] == "net.pth"
    assert json.loads(entries["anncvt.preprocess"]) == {
        "input_size": list(SIZE),
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.2],
    }
    assert json.loads(entries["anncvt.classes"]) == ["cat", "dog", "Ærø", "d", "e"]
    assert json.loads(entries["anncvt.accuracy"]) == {"top1": 61.5, "top5": 90.0}
    assert set(json.loads(entries["anncvt.versions"])) == {"torch", "onnx"}
    assert len(entries["anncvt.plan"]) == 64


def test_accuracy_is_that_of_these_weights():
    program = program_of(None)
    program.history.append(Record("evaluated", 1.0, {"student": {"top1": 62.0}, "teacher": {"top1": 80.0}}, 0, {}))
    assert json.loads(metadata(program)["anncvt.accuracy"]) == {"top1": 62.0}
    program.history.append(Record("distilled", 1.0, {"loss": 0.1}, 0, {}))
    assert "anncvt.accuracy" not in metadata(program)


def test_no_trace_of_the_machine(exported):
    content = exported.read_bytes()
    for secret in (b"/home", b"site-packages", b"stack_trace", b"test_onnx", str(exported.parent).encode()):
        assert secret not in content


def test_same_program_same_bytes(exported, student, tmp_path):
    assert export(program_of(student), tmp_path / "again.onnx").read_bytes() == exported.read_bytes()


def test_the_student_is_left_alone_and_exported_in_eval_mode(tmp_path):
    network = settled(Plain(), *SIZE).train()
    network.bn.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    path = export(program_of(network), tmp_path / "model.onnx")
    assert network.training and not network.bn.training and network.adder.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())
    x = inputs(3)
    assert_close(run(session(path), x.numpy()), network.eval(), x)


def test_adders_over_one_and_three_dimensions(tmp_path):
    network = settled(Volumes(), 4, 9)
    path = export(program_of(network, (4, 9)), tmp_path / "model.onnx")
    names = [node.name for node in onnx.load(path).graph.node if node.domain == DOMAIN]
    assert names == ["line", "block", "block:2"]
    for batch in (1, 3):
        x = inputs(batch, (4, 9))
        assert_close(run(session(path), x.numpy()), network, x)


@pytest.mark.parametrize(
    "opset", [opset if opset in (15, 18, 23) else pytest.param(opset, marks=pytest.mark.slow) for opset in OPSETS]
)
def test_opsets(opset, tmp_path):
    network = settled(Plain(), *SIZE)
    path = export(program_of(network), tmp_path / "model.onnx", opset=opset)
    model = onnx.load(path)
    assert {o.domain: o.version for o in model.opset_import} == {"": opset, DOMAIN: 1}
    assert {o.domain: o.version for o in model.functions[0].opset_import} == {"": opset}
    x = inputs(2)
    assert_close(run(session(path), x.numpy()), network, x)


def test_network_without_adders_has_no_function(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 10 * 8, 5)).eval()
    path = export_network(network, SIZE, tmp_path / "model.onnx")
    assert not onnx.load(path).functions
    x = inputs(2)
    assert_close(run(session(path), x.numpy()), network, x)


def test_large_weights_go_beside_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "MAX_EMBEDDED_BYTES", 100)
    network = settled(Plain(), *SIZE)
    path = export(program_of(network), tmp_path / "model.onnx")
    (data,) = tmp_path.glob("model-*.data")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, data.name])
    x = inputs(2)
    assert_close(run(session(path), x.numpy()), network, x)


def test_an_invalid_model_leaves_nothing_behind(tmp_path, monkeypatch):
    def invalid(*args, **kwargs):
        raise onnx.checker.ValidationError("no such thing")

    monkeypatch.setattr(onnx_file, "MAX_EMBEDDED_BYTES", 100)
    monkeypatch.setattr(onnx.checker, "check_model", invalid)
    assert "no such thing" in refusal(export, program_of(settled(Plain(), *SIZE)), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_body_without_control_flow(student, tmp_path):
    path = export(program_of(student), tmp_path / "model.onnx", body="one")
    (function,) = onnx.load(path).functions
    assert not {node.op_type for node in function.node} & {"Loop", "Scan", "If"}
    for batch in (1, 3):
        x = inputs(batch)
        assert_close(run(session(path), x.numpy()), student, x)


def refusal(call, *args, **kwargs):
    with pytest.raises(AnncvtError) as caught:
        call(*args, **kwargs)
    assert caught.value.fix
    return str(caught.value)


def test_refuses_to_export_without_student(tmp_path):
    assert "no adder network" in refusal(export, program_of(None), tmp_path / "model.onnx")


@pytest.mark.parametrize("opset", [14, 24, 0])
def test_refuses_opsets_outside_the_range(student, tmp_path, opset):
    assert str(opset) in refusal(export, program_of(student), tmp_path / "model.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


def test_refuses_an_opset_the_network_cannot_be_converted_to(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm((10, 8)), nn.Flatten()).eval()
    said = refusal(export_network, network, SIZE, tmp_path / "model.onnx", opset=16)
    assert "opset 16" in said and "LayerNormalization needs opset 17" in said
    assert not list(tmp_path.iterdir())


class DataDependent(nn.Module):
    def forward(self, x):
        return x if x.sum().item() > 0 else -x


class TwoOutputs(nn.Module):
    def forward(self, x):
        return x, x + 1


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.view(2, 3, 120)


@pytest.mark.parametrize("network", [DataDependent(), TwoOutputs(), FixedBatch()], ids=lambda n: type(n).__name__)
def test_refuses_networks_it_cannot_express(network, tmp_path):
    message = refusal(export_network, network, SIZE, tmp_path / "model.onnx")
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


def test_refuses_to_write_where_it_cannot(student, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert "cannot write" in refusal(export, program_of(student), tmp_path / "file" / "model.onnx")


def test_session_refuses_a_missing_file(tmp_path):
    assert "no such file" in refusal(session, tmp_path / "model.onnx")
    assert "a folder" in refusal(session, tmp_path)


@pytest.mark.parametrize("damage", [b"", b"<html>not a model</html>", None], ids=["empty", "html", "truncated"])
def test_session_refuses_a_damaged_file(exported, tmp_path, damage):
    path = tmp_path / "model.onnx"
    path.write_bytes(exported.read_bytes()[:-3000] if damage is None else damage)
    assert str(path) in refusal(session, path)


def changed(exported, path, change):
    model = onnx.load(exported)
    change(model)
    onnx.save(model, path)
    return path


def test_session_refuses_another_version_of_the_op(exported, tmp_path):
    def newer(model):
        next(entry for entry in model.opset_import if entry.domain == DOMAIN).version = 2

    assert "version 2" in refusal(session, changed(exported, tmp_path / "model.onnx", newer))


def test_session_refuses_a_model_whose_definition_was_dropped(exported, tmp_path):
    path = changed(exported, tmp_path / "model.onnx", lambda model: model.functions.pop())
    assert "ai.anncvt::Adder2d" in refusal(session, path)


def test_float16_weights_run_or_are_told(exported, student, tmp_path):
    from onnxruntime.transformers.float16 import convert_float_to_float16

    half = convert_float_to_float16(onnx.load(exported), keep_io_types=False)
    onnx.save(half, tmp_path / "half.onnx")
    x = inputs(2).numpy()
    opened = session(tmp_path / "half.onnx")
    assert "float16" in refusal(run, opened, x)
    found = run(opened, x.astype(np.float16)).astype(np.float32)
    with torch.no_grad():
        wanted = student(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, wanted, atol=0.05 * np.abs(wanted).max())


def test_session_refuses_weights_of_another_type_than_the_input(exported, tmp_path):
    def mixed(model):
        adder = next(node for node in model.graph.node if node.domain == DOMAIN)
        weight = next(tensor for tensor in model.graph.initializer if tensor.name == adder.input[1])
        half = numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), weight.name)
        weight.CopyFrom(half)

    message = refusal(session, changed(exported, tmp_path / "model.onnx", mixed))
    assert "does not open it" in message and "\n" not in message


def test_session_refuses_foreign_operators(exported, tmp_path):
    def foreign(model):
        model.graph.node[0].domain = "com.example"
        model.opset_import.add(domain="com.example", version=1)

    assert "com.example" in refusal(session, changed(exported, tmp_path / "model.onnx", foreign))


@pytest.mark.parametrize("shape", [(1, 3, 12, 11), (1, 1, 12, 10), (3, 12, 10)])
def test_run_refuses_images_of_another_size(exported, shape):
    message = refusal(run, session(exported), np.zeros(shape, "float32"))
    assert "batch x 3 x 12 x 10" in message


def test_run_refuses_another_type(exported):
    assert "float64" in refusal(run, session(exported), np.zeros((1, *SIZE)))


@pytest.mark.filterwarnings("ignore")
def test_kept_layers_in_old_weight_norm_are_exported(tmp_path):
    torch.manual_seed(0)
    kept = nn.utils.weight_norm(nn.Conv2d(3, 4, 3, padding=1))
    network = nn.Sequential(kept, nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    program = rewrite(plan(load(network, input_size=8), Choice(swap=("2",))))
    images = torch.rand(2, 3, 8, 8)
    wanted = program.student(images).detach()  # with gradients: its weight is now a computed tensor
    got = run(session(export(program, tmp_path / "x.onnx")), images.numpy())
    torch.testing.assert_close(torch.from_numpy(got), wanted)
