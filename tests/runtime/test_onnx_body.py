"""The bodies of the ops in standard operators, against the references, in every engine that claims ONNX."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, inliner, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from anncvt.runtime import integer, reference
from anncvt.runtime.geometry import output_size
from anncvt.runtime.onnx_body import (
    BLOCK,
    BODIES,
    DOMAIN,
    OPSETS,
    VERSION,
    adder2d_function,
    adder_integer2d_function,
)


def one_node(opset, channels, size, weight, stride, pads, dilation, groups, *, body="scan", pad_value=None):
    """A model that is one node, integer where it has a ``pad_value``, its batch, height and width open."""
    function, more = adder2d_function(opset, body), {}
    if pad_value is not None:
        function, more = adder_integer2d_function(opset, body), {"pad_value": pad_value}
    element = helper.np_dtype_to_tensor_dtype(weight.dtype)
    geometry = {"strides": stride, "pads": pads, "dilations": dilation, "group": groups}
    node = helper.make_node(function.name, ["x", "w"], ["y"], domain=DOMAIN, **geometry, **more)
    result = element if pad_value is None else TensorProto.INT32
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", element, ["batch", channels, *size])],
        [helper.make_tensor_value_info("y", result, ["batch", weight.shape[0], None, None])],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)


def in_onnxruntime(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def in_reference_evaluator(model, x):
    return ReferenceEvaluator(model).run(None, {"x": x})[0]


def expected(x, weight, *config):
    return reference.forward(torch.from_numpy(x), torch.from_numpy(weight), *config).numpy()


def integers(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def exact(x, weight, stride, pads, dilation, groups, pad_value):
    return integer.adder(x, weight, integer.Window(tuple(stride), tuple(pads), tuple(dilation), groups), pad_value)


def normal(*shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@st.composite
def layers(draw):
    def pair(low, high):
        return [draw(st.integers(low, high)), draw(st.integers(low, high))]

    groups, kernel, dilation = draw(st.integers(1, 3)), pair(1, 3), pair(1, 2)
    channels, filters = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    pads = pair(0, 2) + pair(0, 2)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [draw(st.integers(max(1, r - pads[i] - pads[i + 2]), 8)) for i, r in enumerate(reach)]
    return channels, filters, groups, kernel, size, pair(1, 3), pads, dilation, draw(st.integers(1, 3))


@settings(max_examples=40, deadline=None)
@given(layers(), st.sampled_from(OPSETS), st.sampled_from(BODIES))
def test_equals_the_reference(layer, opset, body):
    channels, filters, groups, kernel, size, stride, pads, dilation, batch = layer
    x, weight = normal(batch, channels, *size), normal(filters, channels // groups, *kernel, seed=1)
    model = one_node(opset, channels, size, weight, stride, pads, dilation, groups, body=body)
    y = in_onnxruntime(model, x)
    assert y.shape == (batch, filters, *output_size(size, kernel, stride, pads, dilation))
    np.testing.assert_allclose(y, expected(x, weight, stride, pads, dilation, groups), rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(layers(), st.sampled_from(OPSETS), st.sampled_from(BODIES), st.integers(0, 255))
def test_integers_equal_the_reference(layer, opset, body, pad_value):
    channels, filters, groups, kernel, size, stride, pads, dilation, batch = layer
    x, weight = integers(batch, channels, *size), integers(filters, channels // groups, *kernel, seed=1)
    config = (stride, pads, dilation, groups)
    y = in_onnxruntime(one_node(opset, channels, size, weight, *config, body=body, pad_value=pad_value), x)
    np.testing.assert_array_equal(y, exact(x, weight, *config, pad_value), strict=True)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("taps", [70_000, 2**17 + 5])
def test_sums_beyond_the_whole_numbers_of_float32(body, taps):
    x = np.resize(np.array([0, 255, 254], np.uint8), (1, taps, 1, 1))
    weight = (255 - x).reshape(1, taps, 1, 1)
    config = ([1, 1], [0] * 4, [1, 1], 1)
    y = in_onnxruntime(one_node(18, taps, (1, 1), weight, *config, body=body, pad_value=0), x)
    assert y.item() == exact(x, weight, *config, 0).item() < -(2**24)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("opset", OPSETS)
def test_integers_in_every_engine(opset, body):
    x, weight = integers(2, 4, 7, 6), integers(6, 2, 2, 3, seed=1)
    config = ([2, 1], [1, 0, 2, 1], [1, 2], 2)
    model = one_node(opset, 4, [None, None], weight, *config, body=body, pad_value=77)
    inlined = inliner.inline_local_functions(model)
    for variant in (model, inlined):
        onnx.checker.check_model(variant, full_check=True)
        shape_inference.infer_shapes(variant, strict_mode=True, data_prop=True)
    wanted = exact(x, weight, *config, 77)
    for y in (in_onnxruntime(model, x), in_onnxruntime(inlined, x), in_reference_evaluator(model, x)):
        np.testing.assert_array_equal(y, wanted, strict=True)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset_in_every_engine(opset, body):
    x, weight = normal(2, 4, 7, 6), normal(6, 2, 2, 3, seed=1)
    config = ([2, 1], [1, 0, 2, 1], [1, 2], 2)
    model = one_node(opset, 4, [None, None], weight, *config, body=body)
    inlined = inliner.inline_local_functions(model)
    for variant in (model, inlined):
        onnx.checker.check_model(variant, full_check=True)
        shape_inference.infer_shapes(variant, strict_mode=True, data_prop=True)
    wanted = expected(x, weight, *config)
    for y in (in_onnxruntime(model, x), in_onnxruntime(inlined, x), in_reference_evaluator(model, x)):
        assert y.shape == wanted.shape
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "size", "groups"),
    [(7, (67, 67), 1), (14, (67, 40), 2), (600, (7, 7), 1)],
    ids=["filled block", "groups", "few positions"],
)
def test_large_layers_are_summed_in_blocks(channels, size, groups):
    assert channels * 9 * size[0] * size[1] > BLOCK
    x, weight = normal(1, channels, *size), normal(2, channels // groups, 3, 3, seed=1)
    config = ([1, 1], [1, 1, 1, 1], [1, 1], groups)
    y = in_onnxruntime(one_node(18, channels, size, weight, *config), x)
    np.testing.assert_allclose(y, expected(x, weight, *config), rtol=1e-5)


def test_one_model_takes_any_batch_and_size():
    weight, config = normal(3, 2, 3, 3, seed=1), ([1, 1], [1, 1, 1, 1], [1, 1], 1)
    model = one_node(18, 2, [None, None], weight, *config)
    for shape in ((1, 2, 5, 5), (4, 2, 3, 9), (2, 2, 1, 1)):
        x = normal(*shape)
        np.testing.assert_allclose(in_onnxruntime(model, x), expected(x, weight, *config), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("body", BODIES)
def test_empty_batch(body):
    model = one_node(18, 2, [5, 4], normal(3, 2, 3, 3), [1, 1], [1, 1, 1, 1], [1, 1], 1, body=body)
    assert in_onnxruntime(model, normal(0, 2, 5, 4)).shape == (0, 3, 5, 4)


def test_element_type_is_open():
    x, weight = normal(2, 2, 4, 4, dtype="float64"), normal(3, 2, 3, 3, seed=1, dtype="float64")
    config = ([1, 1], [1, 1, 1, 1], [1, 1], 1)
    model = one_node(18, 2, [4, 4], weight, *config)
    onnx.checker.check_model(model, full_check=True)
    y = in_reference_evaluator(model, x)
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, expected(x, weight, *config), rtol=1e-12)


def test_integer_padding_is_part_of_the_sum():
    """A pixel that the padding surrounds: eight taps see the padding's value and cost what it is away."""
    weight = np.full((1, 1, 3, 3), 20, np.uint8)
    model = one_node(18, 1, [1, 1], weight, [1, 1], [1, 1, 1, 1], [1, 1], 1, pad_value=250)
    assert in_onnxruntime(model, np.full((1, 1, 1, 1), 5, np.uint8)).item() == -(8 * 230 + 15)


def test_padding_is_part_of_the_sum():
    """A pixel that the padding surrounds: eight taps see zero and still cost |0 - w|."""
    weight = np.full((1, 1, 3, 3), 2, dtype="float32")
    model = one_node(18, 1, [1, 1], weight, [1, 1], [1, 1, 1, 1], [1, 1], 1)
    assert in_onnxruntime(model, np.full((1, 1, 1, 1), 5, dtype="float32")).item() == -(8 * 2 + 3)


@pytest.mark.parametrize("opset", [OPSETS[0] - 1, OPSETS[-1] + 1])
def test_unknown_opset_is_refused(opset):
    with pytest.raises(ValueError, match=str(opset)):
        adder2d_function(opset)
    with pytest.raises(ValueError, match=str(opset)):
        adder_integer2d_function(opset)
