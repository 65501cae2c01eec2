"""The fused ops written in standard ONNX operators and ``ai.anncvt::Adder2d``.

Their tensors are blocked, ``[N, ceil(C/16), H, W, 16]``, lanes beyond the last channel zero: the layout that the native
library computes in, so that layers pass on what they have.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from anncvt.runtime.onnx_body import DOMAIN, VERSION

if TYPE_CHECKING:
    import onnx

#: Channels side by side.
LANES = 16

_BLOCK_DOC = "x [N, C, H, W] as [N, ceil(C/16), H, W, 16]; lanes beyond the last channel are zero."
_UNBLOCK_DOC = "The first `channels` channels of x, [N, ceil(channels/16), H, W, 16], as [N, channels, H, W]."
_FUSED_DOC = """y = clip(scale * Adder2d(x, w) + shift, low, high), per output channel

x: [N, ceil(C/16), H, W, 16]; w: [O, C/group, kh, kw]; scale, shift: [O]; y: [N, ceil(O/16), H', W', 16].
Lanes beyond the last channel are zero in x and in y. The attributes are those of Adder2d, low and high."""
_RESIDUAL_DOC = _FUSED_DOC.replace("+ shift,", "+ shift + residual,").replace("y: [", "residual and y: [")


def functions(opset: int) -> list[onnx.FunctionProto]:
    """``Block``, ``Unblock``, ``FusedAdder2d`` and ``FusedAdder2dResidual`` for models of operator-set ``opset``."""
    window = "strides, pads, dilations, group: int = 1, low, high"
    texts = {
        "Block (x) => (y)": (_block("x", "y"), _BLOCK_DOC),
        "Unblock <channels> (x) => (y)": (_CHANNELS + _unblock("x", "y", "channels"), _UNBLOCK_DOC),
        f"FusedAdder2d <{window}> (x, w, scale, shift) => (y)": (_fused(residual=False), _FUSED_DOC),
        f"FusedAdder2dResidual <{window}> (x, w, scale, shift, residual) => (y)": (
            _fused(residual=True),
            _RESIDUAL_DOC,
        ),
    }
    return [_parse(signature, body, doc, opset) for signature, (body, doc) in texts.items()]


def _parse(signature: str, body: str, doc: str, opset: int) -> onnx.FunctionProto:
    from onnx import parser

    imports = f'opset_import: ["" : {opset}, "{DOMAIN}" : {VERSION}], domain: "{DOMAIN}"'
    constants = "".join(line for name, line in _CONSTANTS.items() if re.search(rf"\b{name}\b", body))
    function = parser.parse_function(f"<{imports}>\n{signature} {{{constants}{body}}}")
    function.doc_string = doc
    return function


_CONSTANTS = {
    name: f"  {name} = Constant <value: tensor = int64[1] {{{value}}}> ()\n"
    for name, value in (("zero", 0), ("one", 1), ("lanes", LANES), ("rest", -1))
}
_CHANNELS = """
  channel_count = Constant <value_int: int = @channels> ()
  channels = Reshape (channel_count, one)
"""


def _block(x: str, y: str) -> str:
    return f"""
  {x}_channels = Shape <start: int = 1, end: int = 2> ({x})
  {x}_batch = Shape <start: int = 0, end: int = 1> ({x})
  {x}_size = Shape <start: int = 2> ({x})
  {x}_more = Add ({x}_channels, lanes)
  {x}_rounded = Sub ({x}_more, one)
  {x}_blocks = Div ({x}_rounded, lanes)
  {x}_lanes = Mul ({x}_blocks, lanes)
  {x}_fill = Sub ({x}_lanes, {x}_channels)
  {x}_pads = Concat <axis: int = 0> (zero, zero, zero, zero, zero, {x}_fill, zero, zero)
  {x}_filled = Pad ({x}, {x}_pads)
  {x}_shape = Concat <axis: int = 0> ({x}_batch, {x}_blocks, lanes, {x}_size)
  {x}_split = Reshape ({x}_filled, {x}_shape)
  {y} = Transpose <perm: ints = [0, 1, 3, 4, 2]> ({x}_split)
"""


def _unblock(x: str, y: str, channels: str) -> str:
    return f"""
  {x}_planes = Transpose <perm: ints = [0, 1, 4, 2, 3]> ({x})
  {x}_batch = Shape <start: int = 0, end: int = 1> ({x})
  {x}_size = Shape <start: int = 2, end: int = 4> ({x})
  {x}_shape = Concat <axis: int = 0> ({x}_batch, rest, {x}_size)
  {x}_all = Reshape ({x}_planes, {x}_shape)
  {y} = Slice ({x}_all, zero, {channels}, one)
"""


def _fused(residual: bool) -> str:
    window = "strides: ints = @strides, pads: ints = @pads, dilations: ints = @dilations, group: int = @group"
    added = _unblock("residual", "plain_residual", "filters") + "  total = Add (shifted, plain_residual)\n"
    return f"""
  group_count = Constant <value_int: int = @group> ()
  groups = Reshape (group_count, one)
  depth = Shape <start: int = 1, end: int = 2> (w)
  filters = Shape <start: int = 0, end: int = 1> (w)
  channels = Mul (depth, groups)
{_unblock("x", "plain", "channels")}
  sums = {DOMAIN}.Adder2d <{window}> (plain, w)
  per_channel = Constant <value: tensor = int64[4] {{1, -1, 1, 1}}> ()
  scales = Reshape (scale, per_channel)
  shifts = Reshape (shift, per_channel)
  scaled = Mul (sums, scales)
  shifted = Add (scaled, shifts)
{added if residual else "  total = Identity (shifted)"}
  low = Constant <value_float: float = @low> ()
  high = Constant <value_float: float = @high> ()
  clipped = Clip (total, low, high)
{_block("clipped", "y")}"""
