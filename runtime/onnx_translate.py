"""torch network -> ONNX graph with bare ``ai.anncvt::Adder2d`` nodes, and nothing in it about this machine."""

from __future__ import annotations

import ast
import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir
import torch
from onnx.defs import OpSchema
from onnxscript import values

import anncvt.runtime.op  # noqa: F401  (registers torch.ops.anncvt.adder2d)
from anncvt.errors import AnncvtError, first_line
from anncvt.program import versions
from anncvt.runtime.geometry import expand_padding
from anncvt.runtime.inference import inference_copy
from anncvt.runtime.onnx_body import DOMAIN, OP_TYPE, VERSION, adder2d_function

if TYPE_CHECKING:
    from torch import nn
    from torch.onnx import ONNXProgram

#: The lowest opset that torch's exporter writes; older ones are converted from it.
EXPORTER_OPSET = 18
#: Where operators wait that the converter shall leave alone.
_HELD = f"{DOMAIN}.held"


def translate(
    network: nn.Module, input_size: Sequence[int], opset: int, body: str, image: str, logits: str
) -> onnx_ir.Model:
    """The network in eval mode as an ONNX model from ``image`` ``[batch, *input_size]`` to ``logits``.

    Adders are ``ai.anncvt::Adder2d`` nodes named after their layers. The op's body is attached last: the exporter's
    optimiser would inline it and onnx's version converter would drop it.

    Raises:
        AnncvtError: torch's exporter or the opset cannot express the network.
    """
    model = _torch_export(network, input_size, max(opset, EXPORTER_OPSET), image, logits).model
    shape = model.graph.inputs[0].shape
    if len(model.graph.outputs) != 1 or shape is None or not isinstance(shape[0], onnx_ir.SymbolicDim):
        raise AnncvtError(
            "the network does not map a batch of any size to one tensor",
            fix="wrap it in a module that returns one tensor and does not fix the batch size",
        )
    _clean(model)
    if opset < EXPORTER_OPSET:
        model = _lower(model, opset)
    if any(node.domain == DOMAIN for node in model.graph.all_nodes()):
        function = onnx_ir.serde.deserialize_function(adder2d_function(opset, body))
        model.functions[function.identifier()] = function
    return model


def _lower(model: onnx_ir.Model, opset: int) -> onnx_ir.Model:
    """Rewrite for an older opset; the op's body must not be there yet, the converter drops functions.

    Raises:
        AnncvtError: an operator does not exist there, by its name and the opset it needs.
    """
    from onnx import defs, version_converter

    held = [node for node in model.graph.all_nodes() if _unchanged(node)]
    for node in held:
        node.domain = _HELD
    model.opset_imports[_HELD] = VERSION
    try:
        lowered = onnx_ir.from_proto(version_converter.convert_version(onnx_ir.to_proto(model), opset))
    except (RuntimeError, ValueError) as error:
        found = re.search(r"(?:for|of) (\w+)(?: exists)?\s*$", str(error))
        what, needed = first_line(error), EXPORTER_OPSET
        if found and defs.has(found[1]):
            needed = defs.get_schema(found[1], EXPORTER_OPSET).since_version
            what = f"{found[1]} needs opset {needed}"
        raise AnncvtError(
            f"this network cannot be expressed in opset {opset}: {what}", fix=f"export with --opset {needed} or above"
        ) from error
    for node in lowered.graph.all_nodes():
        if node.domain == _HELD:
            node.domain = ""
    del lowered.opset_imports[_HELD]
    return lowered


def _unchanged(node: onnx_ir.Node) -> bool:
    """Whether the converter cannot rewrite ``node`` for an older opset, but it means the same there as it stands.

    Attributes that opset 18 brought and that say nothing are removed.
    """
    if node.domain not in ("", "ai.onnx"):
        return False
    # Reductions; 0 is its default, and the converter leaves it behind.
    if node.attributes.get_int("noop_with_empty_axes", 1) == 0:
        node.attributes.pop("noop_with_empty_axes")
    if node.op_type == "Split" and "num_outputs" in node.attributes:
        axis, shape = node.attributes.get_int("axis", 0), node.inputs[0].shape if node.inputs[0] else None
        size = shape[axis] if shape is not None else None
        if isinstance(size, int) and size % len(node.outputs) == 0:  # older ones split equally where nothing is said
            node.attributes.pop("num_outputs")
    if node.op_type == "Pad":
        return len(node.inputs) < 4 or node.inputs[3] is None
    return node.op_type == "Identity" or (node.op_type == "Split" and "num_outputs" not in node.attributes)


def _torch_export(network: nn.Module, input_size: Sequence[int], opset: int, image: str, logits: str) -> ONNXProgram:
    batch = torch.export.Dim("batch")
    try:
        with _quiet("torch.onnx", "onnxscript"):
            exported = torch.onnx.export(
                inference_copy(network),
                (torch.zeros(2, *input_size),),  # not 1: a batch of one is taken for a constant
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=({0: batch},),
                input_names=[image],
                output_names=[logits],
                custom_translation_table={torch.ops.anncvt.adder2d.default: _node_builder()},
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
        raise AnncvtError(
            f"torch's exporter does not take this network: {first_line(_root(error))}",
            fix="check that it runs on a batch of two and that its forward does not depend on the data",
        ) from error
    assert exported is not None
    return exported


def _node_builder() -> Callable[..., Any]:
    """The translation of ``torch.ops.anncvt.adder2d`` to a bare node that states every attribute.

    The schema stays private to the builder: registered with onnx, it would take precedence over the op's body in shape
    inference.
    """
    schema = OpSchema(
        OP_TYPE,
        DOMAIN,
        VERSION,
        inputs=[OpSchema.FormalParameter("x", "T"), OpSchema.FormalParameter("w", "T")],
        outputs=[OpSchema.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[
            *(OpSchema.Attribute(name, OpSchema.AttrType.INTS, "") for name in ("strides", "pads", "dilations")),
            OpSchema.Attribute("group", OpSchema.AttrType.INT, ""),
        ],
    )
    node = values.Op(values.Opset(DOMAIN, VERSION), OP_TYPE, schema)

    def adder2d(x, weight, stride, padding, dilation, groups, gradient="full"):
        pads = list(expand_padding(padding))
        return node(x, weight, strides=list(stride), pads=pads, dilations=list(dilation), group=groups)

    return adder2d


def _clean(model: onnx_ir.Model) -> None:
    """Remove what the exporter notes about this machine (stack traces, file names); name adders after their layers."""
    seen: dict[str, int] = {}
    for node in model.graph.all_nodes():
        if node.domain == DOMAIN and (layer := _layer(node)):
            seen[layer] = seen.get(layer, 0) + 1
            node.name = layer if seen[layer] == 1 else f"{layer}:{seen[layer]}"
    model.producer_name, model.producer_version = "anncvt", versions().get("anncvt", "unknown")
    model.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    everything = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        everything.extend(node.outputs)
    for value in everything:
        value.metadata_props.clear()


def _layer(node: onnx_ir.Node) -> str | None:
    """Qualified name of the module a node came from, from the exporter's list ``['', 'a', 'a.b', 'adder2d']``."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    return scopes[-2] if len(scopes) > 1 else None


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Silence the exporter's remarks: what matters of them becomes an error of ours."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
