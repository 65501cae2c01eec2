"""The adder ops written in standard ONNX operators, so that a runtime that knows nothing of ``ai.anncvt`` runs them.

An ONNX model carries these functions next to its ``ai.anncvt`` nodes. A runtime with a kernel of its own for an op
takes the kernel; any other replaces the node by the function.

There are two bodies. ``"scan"`` trades speed for memory that does not grow with the batch or with the number of output
channels. It takes one image at a time; of that image's windows (``C * kh * kw * H' * W'`` numbers) one block of taps at
a time; and for that block one output channel of every group at a time. What is alive is three copies of the windows and
two temporaries of a block. ``"one"`` has no control flow, which importers ask for that know none: one broadcast
subtraction of all windows and all filters, which needs the windows twice more for every output channel and image.

The integer op subtracts the padding's value from both operands, which leaves ``|x - w|`` as it is, so that zeros pad
it. Its windows and differences are whole numbers below 2**24 in float32, hence exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

DOMAIN = "ai.anncvt"
VERSION = 1
OP_TYPE, INTEGER_OP_TYPE = "Adder2d", "AdderInteger2d"
BODIES = ("scan", "one")
#: Operator-set versions the body is valid in (``Shape`` with start and end came with 15).
OPSETS = range(15, 24)
#: Differences computed in one step: 1 MB of float32.
BLOCK = 2**18
#: Taps of a block of integers: their sum, at most 255 each, is exact in float32.
MOST_INTEGER_TAPS = 2**16

_DOC = """y[n,o,p] = -sum over c, k of |x[n, c, p*strides + k*dilations - pads] - w[o,c,k]|

The layer of an adder neural network (AdderNet, arXiv 1912.13200, eq. 1).
x: [N, C, H, W]; w: [O, C/group, kh, kw]; y: [N, O, H', W'], sizes as for Conv.
pads: top, left, bottom, right. Padding is by zeros and is part of the sum: a padded tap contributes -|0 - w|.
x must be finite (infinity times zero in the window extraction is NaN)."""

_INTEGER_DOC = """y[n,o,p] = -sum over c, k of |x[n, c, p*strides + k*dilations - pads] - w[o,c,k]|

The layer of an adder neural network (AdderNet, arXiv 1912.13200, eq. 1) on integers of one grid.
x: [N, C, H, W] uint8; w: [O, C/group, kh, kw] uint8; y: [N, O, H', W'] int32, sizes as for Conv, exact.
pads: top, left, bottom, right. Padding is by pad_value and is part of the sum: a padded tap contributes
-|pad_value - w|."""


@dataclass(frozen=True)
class _Operands:
    """What the text of a body calls its operands, and how sums are kept."""

    x: str
    w: str
    integer: bool


_FLOAT, _INTEGER = _Operands("x", "w", False), _Operands("x_centred", "w_centred", True)

_CENTRED = """
  pad = Constant <value_int: int = @pad_value> ()
  centre = Cast <to: int = 1> (pad)
  x_float = Cast <to: int = 1> (x)
  x_centred = Sub (x_float, centre)
  w_float = Cast <to: int = 1> (w)
  w_centred = Sub (w_float, centre)
"""

# The windows are extracted by a convolution with one-hot filters: filter k copies the pixel that kernel position k
# sees. It understands strides, pads and dilations, and needs no sizes known in advance. All sizes come from Shape, none
# from constants; Constant nodes hold tensors because importers stumble over the list-of-integers form.
_SIZES = """
  one = Constant <value: tensor = int64[1] {1}> ()
  channels = Shape <start: int = 1, end: int = 2> (x)
  filters = Shape <start: int = 0, end: int = 1> (w)
  depth = Shape <start: int = 1, end: int = 2> (w)
  kernel = Shape <start: int = 2> (w)
  area = ReduceProd <keepdims: int = 1> (kernel)
  taps = Mul (depth, area)
  groups = Div (channels, depth)
  group_filters = Div (filters, groups)
  images_shape = Shape <start: int = 0, end: int = 1> (x)
"""


def _one_hot(operands: _Operands) -> str:
    return f"""
  square = Concat <axis: int = 0> (area, area)
  zeros = ConstantOfShape <value: tensor = float[1] {{0.0}}> (square)
  identity = EyeLike (zeros)
  identity_like = CastLike (identity, {operands.x})
  one_hot_shape = Concat <axis: int = 0> (area, one, kernel)
  one_hot = Reshape (identity_like, one_hot_shape)
"""


def _weights(operands: _Operands) -> str:
    """``weights``: [O/groups, groups, taps, 1]"""
    return f"""
  weight_shape = Concat <axis: int = 0> (groups, group_filters, taps, one)
  grouped_weights = Reshape ({operands.w}, weight_shape)
  weights = Transpose <perm: ints = [1, 0, 2, 3]> (grouped_weights)
"""


def _blocks(operands: _Operands) -> str:
    """The taps of an image, cut into blocks whose differences fit in a core's own cache.

    Streamed through memory, a step takes up to twice as long. Zeros fill the last block of windows and of weights
    alike: ``|0 - 0|`` adds nothing. ``windows`` ``[groups, taps, H'*W']`` become ``window_blocks``
    ``[blocks, groups, block_taps, H'*W']``.
    """
    most = "most_taps = Max (affordable, one)"
    no_sums = f"""
    float_zeros = ConstantOfShape <value: tensor = float[1] {{0.0}}> (sums_shape)
    no_sums = CastLike (float_zeros, {operands.x})"""
    if operands.integer:
        most = f"""exact = Constant <value: tensor = int64[1] {{{MOST_INTEGER_TAPS}}}> ()
    limited = Min (affordable, exact)
    most_taps = Max (limited, one)"""
        no_sums = "no_sums = ConstantOfShape <value: tensor = int32[1] {0}> (sums_shape)"
    return f"""
    outputs = Shape <start: int = 2> (windows)
    budget = Constant <value: tensor = int64[1] {{{BLOCK}}}> ()
    tap_size = Mul (groups, outputs)
    affordable = Div (budget, tap_size)
    {most}
    rounded_taps = Add (taps, most_taps)
    last_tap = Sub (rounded_taps, one)
    blocks = Div (last_tap, most_taps)
    rounded_blocks = Add (taps, blocks)
    last_block = Sub (rounded_blocks, one)
    block_taps = Div (last_block, blocks)
    filled_taps = Mul (block_taps, blocks)
    fill = Sub (filled_taps, taps)
    window_pads = Concat <axis: int = 0> (first, first, first, first, fill, first)
    filled_windows = Pad (windows, window_pads)
    window_blocks_shape = Concat <axis: int = 0> (groups, blocks, block_taps, outputs)
    split_windows = Reshape (filled_windows, window_blocks_shape)
    window_blocks = Transpose <perm: ints = [1, 0, 2, 3]> (split_windows)
    weight_pads = Concat <axis: int = 0> (first, first, first, first, first, first, fill, first)
    filled_weights = Pad (weights, weight_pads)
    weight_blocks_shape = Concat <axis: int = 0> (group_filters, groups, blocks, block_taps, one)
    split_weights = Reshape (filled_weights, weight_blocks_shape)
    weight_blocks = Transpose <perm: ints = [2, 0, 1, 3, 4]> (split_weights)
    row_shape = Concat <axis: int = 0> (one, block_taps)
    minus_ones = ConstantOfShape <value: tensor = float[1] {{-1.0}}> (row_shape)
    minus = CastLike (minus_ones, {operands.x})
    sums_shape = Concat <axis: int = 0> (group_filters, groups, outputs)
    {no_sums}
    fewer_outputs = Less (outputs, block_taps)
    narrow = Squeeze (fewer_outputs, first)
"""


# The sum over taps is a product with -1s: matrix products are the best-tuned operator of a runtime, and the sign saves
# a Neg. A broadcast subtraction costs onnxruntime by the number of rows, so the longer axis goes last: output positions
# in the early layers of a network, taps in the late ones (there up to twice as fast).
# block: [groups, block_taps, H'*W'], weight: [groups, block_taps, 1] of one output channel per group.
_OUTPUTS_LAST = """
        sums_of_columns = Scan <num_scan_inputs: int = 1,
            body: graph = filter_of_columns (float[g, t, u] weight) => (float[g, l] filter_sum) {
          difference = Sub (block, weight)
          distance = Abs (difference)
          product = MatMul (minus, distance)
          filter_sum = Squeeze (product, one)
        }> (block_weights)
"""
_TAPS_LAST = """
        block_rows = Transpose <perm: ints = [0, 2, 1]> (block)
        weight_rows_shape = Concat <axis: int = 0> (group_filters, groups, one, block_taps)
        weight_rows = Reshape (block_weights, weight_rows_shape)
        column_shape = Concat <axis: int = 0> (block_taps, one)
        minus_column = Reshape (minus, column_shape)
        sums_of_rows = Scan <num_scan_inputs: int = 1,
            body: graph = filter_of_rows (float[g, u, t] weight_row) => (float[g, l] filter_row_sum) {
          row_difference = Sub (block_rows, weight_row)
          row_distance = Abs (row_difference)
          row_product = MatMul (row_distance, minus_column)
          filter_row_sum = Squeeze (row_product, last)
        }> (weight_rows)
"""


def _scan(operands: _Operands) -> str:
    """The images are walked by a Loop and not a Scan because onnx's ReferenceEvaluator hands a function's attributes
    only to the bodies of Loop. It also concatenates what a Loop collects where the standard says stack; the last
    Reshape accepts both.
    """
    sums = "int32" if operands.integer else "float"
    addition = "sums_after = Add (sums_before, block_sums)"
    if operands.integer:
        addition = """block_integers = Cast <to: int = 6> (block_sums)
      sums_after = Add (sums_before, block_integers)"""
    return f"""
  first = Constant <value: tensor = int64[1] {{0}}> ()
  last = Constant <value: tensor = int64[1] {{-1}}> ()
  rest = Constant <value: tensor = int64[1] {{-1}}> ()
  images = Squeeze (images_shape, first)
  always = Constant <value: tensor = bool {{1}}> ()
  windows_shape = Concat <axis: int = 0> (groups, taps, rest)
  sums = Loop <body: graph = image (int64 index, bool before) => (bool after, {sums}[o, p, q] image_sums) {{
    after = Identity (before)
    pixels = Gather <axis: int = 0> ({operands.x}, index)
    planes = Unsqueeze (pixels, one)
    copies = Conv <strides: ints = @strides, pads: ints = @pads, dilations: ints = @dilations> (planes, one_hot)
    windows = Reshape (copies, windows_shape)
    {_blocks(operands)}
    filter_sums = Scan <num_scan_inputs: int = 2,
        body: graph = block_of_taps ({sums}[f, g, l] sums_before, float[g, t, l] block, float[f, g, t, u] block_weights)
        => ({sums}[f, g, l] sums_after) {{
      block_sums = If (narrow) <
        then_branch: graph = taps_last () => (float[f, g, l] sums_of_rows) {{{_TAPS_LAST}}},
        else_branch: graph = outputs_last () => (float[f, g, l] sums_of_columns) {{{_OUTPUTS_LAST}}}>
      {addition}
    }}> (no_sums, window_blocks, weight_blocks)
    group_sums = Transpose <perm: ints = [1, 0, 2]> (filter_sums)
    image_size = Shape <start: int = 2> (copies)
    image_shape = Concat <axis: int = 0> (filters, image_size)
    image_sums = Reshape (group_sums, image_shape)
  }}> (images, always)
  size = Shape <start: int = -2> (sums)
  y_shape = Concat <axis: int = 0> (images_shape, filters, size)
  y = Reshape (sums, y_shape)
"""


def _one(operands: _Operands) -> str:
    """Differences of integers are summed as integers: all taps at once may pass what float32 holds exactly."""
    sums = "sums = ReduceSum <keepdims: int = 0> (distances, tap_axis)"
    if operands.integer:
        sums = """integer_distances = Cast <to: int = 6> (distances)
  sums = ReduceSum <keepdims: int = 0> (integer_distances, tap_axis)"""
    return f"""
  plane_count = Mul (images_shape, channels)
  plane_size = Shape <start: int = 2> (x)
  planes_shape = Concat <axis: int = 0> (plane_count, one, plane_size)
  planes = Reshape ({operands.x}, planes_shape)
  copies = Conv <strides: ints = @strides, pads: ints = @pads, dilations: ints = @dilations> (planes, one_hot)
  size = Shape <start: int = 2> (copies)
  outputs = ReduceProd <keepdims: int = 1> (size)
  windows_shape = Concat <axis: int = 0> (images_shape, one, groups, taps, outputs)
  windows = Reshape (copies, windows_shape)
  differences = Sub (windows, weights)
  distances = Abs (differences)
  tap_axis = Constant <value: tensor = int64[1] {{3}}> ()
  {sums}
  negative = Neg (sums)
  grouped = Transpose <perm: ints = [0, 2, 1, 3]> (negative)
  y_shape = Concat <axis: int = 0> (images_shape, filters, size)
  y = Reshape (grouped, y_shape)
"""


def adder2d_function(opset: int, body: str = "scan") -> onnx.FunctionProto:
    """The body of ``ai.anncvt::Adder2d`` for models of operator-set version ``opset``.

    Inputs ``x`` and ``w``, output ``y``, attributes ``strides``, ``pads``, ``dilations`` (all required) and ``group``
    (1 where absent); see the function's ``doc_string``. The number of groups follows from the shapes.

    Args:
        body: one of :data:`BODIES`.

    Raises:
        ValueError: the body does not exist in that version.
    """
    signature = f"{OP_TYPE} <strides, pads, dilations, group: int = 1> (x, w) => (y)"
    return _function(signature, "", _FLOAT, opset, body, _DOC)


def adder_integer2d_function(opset: int, body: str = "scan") -> onnx.FunctionProto:
    """The body of ``ai.anncvt::AdderInteger2d``, on uint8 with exact int32 sums, see :func:`adder2d_function`.

    It has the attribute ``pad_value`` (0 where absent) besides: what padding holds.
    """
    signature = f"{INTEGER_OP_TYPE} <strides, pads, dilations, group: int = 1, pad_value: int = 0> (x, w) => (y)"
    return _function(signature, _CENTRED, _INTEGER, opset, body, _INTEGER_DOC)


def _function(signature: str, before: str, operands: _Operands, opset: int, body: str, doc: str) -> onnx.FunctionProto:
    if opset not in OPSETS:
        raise ValueError(f"the bodies exist for opset {OPSETS[0]} to {OPSETS[-1]}, not {opset}")
    from onnx import parser

    rest = {"scan": _scan, "one": _one}[body](operands)
    function = parser.parse_function(
        f'<opset_import: ["" : {opset}], domain: "{DOMAIN}">\n'
        f"{signature} {{{before}{_SIZES}{_one_hot(operands)}{_weights(operands)}{rest}}}"
    )
    function.doc_string = doc
    _drop_types(function.node)
    return function


def _drop_types(nodes: Iterable[onnx.NodeProto]) -> None:
    """Remove the data's types from subgraphs, which the parser asks for: they would pin the element type to float."""
    from onnx import TensorProto

    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                for value in (*attribute.g.input, *attribute.g.output):
                    if value.type.tensor_type.elem_type == TensorProto.FLOAT:
                        value.ClearField("type")
                _drop_types(attribute.g.node)
