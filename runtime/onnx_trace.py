"""An exported integer network in onnxruntime, with everything it computes on the way."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import NamedTuple

from anncvt.errors import AnncvtError
from anncvt.program import Preprocess
from anncvt.runtime.integer import Array
from anncvt.runtime.integer_network import IntegerNetwork, digest
from anncvt.runtime.onnx import INPUT, session
from anncvt.runtime.onnx import run as onnx_run
from anncvt.runtime.onnx_integer import accumulator_of, blocked_of, integers_of


class Trace(NamedTuple):
    """By the names of the steps; accumulators of those that have one that is not inside a fused node."""

    integers: dict[str, Array]
    accumulators: dict[str, Array]
    logits: Array  # [N, classes] float32


def run(path: str | Path, network: IntegerNetwork, pixels: Array) -> Trace:
    """What the file computes of ``pixels``, ``[N, C, H, W]`` uint8.

    The logits are those of the file as it is; for the rest it is opened with every value as an output.

    Raises:
        AnncvtError: the file is missing, damaged, or not that of ``network``.
    """
    import torch

    from anncvt.images import normalise

    untouched = session(path)
    told = untouched.get_modelmeta().custom_metadata_map
    if json.loads(told.get("anncvt.integers", "{}")).get("sha256") != digest(network):
        raise AnncvtError(
            "it does not hold the integer network of the folder",
            where=str(path),
            fix="export it again: `anncvt export DIR --int8`",
        )
    preprocess = Preprocess(**json.loads(told["anncvt.preprocess"]))
    images = normalise(torch.from_numpy(pixels), preprocess).numpy()
    found = _values(path, network, images, untouched.anncvt.library)
    integers = {}
    for step in network.steps:
        value = found.get(integers_of(step.name))
        integers[step.name] = _plain(found[blocked_of(step.name)], step.shape[0]) if value is None else value
    accumulators = {step.name: accumulator_of(step.name) for step in network.steps}
    return Trace(
        integers,
        {name: found[value] for name, value in accumulators.items() if value in found},
        onnx_run(untouched, images),
    )


def _plain(blocked: Array, channels: int) -> Array:
    """``[N, ceil(C/16), H, W, 16]`` as ``[N, C, H, W]``."""
    planes = blocked.transpose(0, 1, 4, 2, 3)
    return planes.reshape(len(planes), -1, *planes.shape[3:])[:, :channels]


def _values(path: str | Path, network: IntegerNetwork, images: Array, library: Path | None) -> dict[str, Array]:
    """All values of the steps that the graph has, computed by the same kernels that the file itself gets."""
    import onnx

    model = onnx.load(path)
    described = {value.name: value for value in model.graph.value_info}
    of_steps = [of(step.name) for step in network.steps for of in (integers_of, blocked_of, accumulator_of)]
    names = [name for name in of_steps if name in described]
    model.graph.output.extend(described[name] for name in names)
    with tempfile.TemporaryDirectory(prefix="anncvt-") as folder:
        onnx.save(model, Path(folder, "traced.onnx"))
        traced = session(Path(folder, "traced.onnx"), library=library or "none")
    return dict(zip(names, traced.run(names, {INPUT: images}), strict=True))
