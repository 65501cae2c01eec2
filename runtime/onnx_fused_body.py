"""The fused ops written in standard ONNX operators and the adder ops, of floats and of integers.

Their tensors are blocked, ``[N, ceil(C/16), H, W, 16]``, lanes beyond the last channel zero: the layout that the native
library computes in, so that layers pass on what they have.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from anncvt.runtime.onnx_body import DOMAIN, INTEGER_OP_TYPE, OP_TYPE, VERSION

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
_INTEGER_DOC = """y = clip((AdderInteger2d(x, w) * multiplier + bias + 2**(shift-1)) >> shift, low, high)

x: [N, ceil(C/16), H, W, 16] uint8; w: [O, C/group, kh, kw] uint8; multiplier: [O] int32; bias: [O] int64;
y: [N, ceil(O/16), H', W', 16] uint8. Per output channel; int64 behind the adder; the shift is arithmetic, so
that ties round up. shift: 1 to 31; low, high: within 0 to 255. The other attributes are those of AdderInteger2d.
Lanes beyond the last channel are zero in x and in y."""
_INTEGER_RESIDUAL_DOC = _INTEGER_DOC.replace("+ bias +", "+ bias + residual * residual_multiplier +").replace(
    "y: [", "residual and y: ["
)
_CONVOLUTION_DOC = """y = clip((sums * multiplier + bias + 2**(shift-1)) >> shift, low, high)

sums: ConvInteger of x with the zero point pad_value, which padding has, and w with the zero point 128.
x: [N, C, H, W] uint8; w: [O, C/group, kh, kw] uint8; multiplier: [O] int32; bias: [O] int64;
y: [N, ceil(O/16), H', W', 16] uint8, lanes beyond the last channel zero. As in FusedAdderInteger2d."""
_BLOCKED_CONVOLUTION = "FusedConvInteger2dBlocked"
_BLOCKED_CONVOLUTION_DOC = _CONVOLUTION_DOC.replace("[N, C, H, W]", "[N, ceil(C/16), H, W, 16]")
_BLOCKED_CONVOLUTION_RESIDUAL_DOC = _BLOCKED_CONVOLUTION_DOC.replace(
    "+ bias +", "+ bias + residual * residual_multiplier +"
).replace("y: [", "residual and y: [")
_MAX_POOL_DOC = """MaxPool of x, [N, ceil(C/16), H, W, 16] uint8, over height and width; y is blocked as x is.

kernel_shape, strides, dilations: height and width; pads: top, left, bottom, right."""


def functions(opset: int) -> list[onnx.FunctionProto]:
    """``Block``, ``Unblock``, ``FusedAdder2d`` and ``FusedAdder2dResidual`` for models of operator-set ``opset``."""
    window = "strides, pads, dilations, group: int = 1, low, high"
    texts = {
        **_layouts(""),
        f"Fused{OP_TYPE} <{window}> (x, w, scale, shift) => (y)": (_fused(residual=False), _FUSED_DOC),
        f"Fused{OP_TYPE}Residual <{window}> (x, w, scale, shift, residual) => (y)": (
            _fused(residual=True),
            _RESIDUAL_DOC,
        ),
    }
    return _parse(texts, opset)


def integer_functions(opset: int) -> list[onnx.FunctionProto]:
    """The same on uint8, with ``Integer`` in their names, and what else of a network of integers is blocked."""
    window = "strides, pads, dilations, group: int = 1, pad_value: int = 0, shift, low, high"
    texts = {
        **_layouts("Integer"),
        f"Fused{INTEGER_OP_TYPE} <{window}> (x, w, multiplier, bias) => (y)": (
            _fused_integer(residual=False),
            _INTEGER_DOC,
        ),
        f"Fused{INTEGER_OP_TYPE}Residual <{window}, residual_multiplier> (x, w, multiplier, bias, residual) => (y)": (
            _fused_integer(residual=True),
            _INTEGER_RESIDUAL_DOC,
        ),
        f"FusedConvInteger2d <{window}> (x, w, multiplier, bias) => (y)": (
            "  plain = Identity (x)\n" + _CONVOLUTION + _PER_CHANNEL + _requantised("sums", residual=False),
            _CONVOLUTION_DOC,
        ),
        f"{_BLOCKED_CONVOLUTION} <{window}> (x, w, multiplier, bias) => (y)": (
            _blocked_convolution(residual=False),
            _BLOCKED_CONVOLUTION_DOC,
        ),
        f"{_BLOCKED_CONVOLUTION}Residual <{window}, residual_multiplier> (x, w, multiplier, bias, residual) => (y)": (
            _blocked_convolution(residual=True),
            _BLOCKED_CONVOLUTION_RESIDUAL_DOC,
        ),
        "MaxPoolInteger <kernel_shape, strides, pads, dilations> (x) => (y)": (_MAX_POOL, _MAX_POOL_DOC),
    }
    return _parse(texts, opset)


def _layouts(kind: str) -> dict[str, tuple[str, str]]:
    """The ops that change the layout; they are written the same for every element type."""
    return {
        f"Block{kind} (x) => (y)": (_block("x", "y"), _BLOCK_DOC),
        f"Unblock{kind} <channels> (x) => (y)": (_CHANNELS + _unblock("x", "y", "channels"), _UNBLOCK_DOC),
    }


def _parse(texts: dict[str, tuple[str, str]], opset: int) -> list[onnx.FunctionProto]:
    """Functions of bodies and descriptions by signature."""
    from onnx import parser

    imports = f'opset_import: ["" : {opset}, "{DOMAIN}" : {VERSION}], domain: "{DOMAIN}"'
    found = []
    for signature, (body, doc) in texts.items():
        constants = "".join(line for name, line in _CONSTANTS.items() if re.search(rf"\b{name}\b", body))
        function = parser.parse_function(f"<{imports}>\n{signature} {{{constants}{body}}}")
        function.doc_string = doc
        found.append(function)
    return found


_CONSTANTS = {
    name: f"  {name} = Constant <value: tensor = int64[1] {{{value}}}> ()\n"
    for name, value in (("zero", 0), ("one", 1), ("lanes", LANES), ("rest", -1))
}
_CHANNELS = """
  channel_count = Constant <value_int: int = @channels> ()
  channels = Reshape (channel_count, one)
"""
_PER_CHANNEL = "  per_channel = Constant <value: tensor = int64[4] {1, -1, 1, 1}> ()\n"
_CONVOLUTION = """
  pad_integer = Constant <value_int: int = @pad_value> ()
  x_zero = Cast <to: int = 2> (pad_integer)
  w_zero = Constant <value: tensor = uint8 {128}> ()
  sums = ConvInteger <strides: ints = @strides, pads: ints = @pads, dilations: ints = @dilations, group: int = @group>
                     (plain, w, x_zero, w_zero)
"""
_MAX_POOL = """
  planes = Transpose <perm: ints = [0, 1, 4, 2, 3]> (x)
  batch = Shape <start: int = 0, end: int = 1> (x)
  blocks = Shape <start: int = 1, end: int = 2> (x)
  size = Shape <start: int = 2, end: int = 4> (x)
  shape = Concat <axis: int = 0> (batch, rest, size)
  all = Reshape (planes, shape)
  pooled = MaxPool <kernel_shape: ints = @kernel_shape, strides: ints = @strides, pads: ints = @pads,
                    dilations: ints = @dilations> (all)
  new_size = Shape <start: int = 2, end: int = 4> (pooled)
  new_shape = Concat <axis: int = 0> (batch, blocks, lanes, new_size)
  split = Reshape (pooled, new_shape)
  y = Transpose <perm: ints = [0, 1, 3, 4, 2]> (split)
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


def _plain() -> str:
    """``plain``, of the blocked ``x`` of a layer."""
    return f"""
  group_count = Constant <value_int: int = @group> ()
  groups = Reshape (group_count, one)
  depth = Shape <start: int = 1, end: int = 2> (w)
  filters = Shape <start: int = 0, end: int = 1> (w)
  channels = Mul (depth, groups)
{_unblock("x", "plain", "channels")}"""


def _sums(op: str, *more: str) -> str:
    """``sums``, what the adder makes of the blocked ``x``; ``more``: its attributes beyond those of every adder."""
    given = ["strides: ints = @strides", "pads: ints = @pads", "dilations: ints = @dilations", "group: int = @group"]
    return f"""{_plain()}
  sums = {DOMAIN}.{op} <{", ".join([*given, *more])}> (plain, w)
{_PER_CHANNEL}"""


def _fused(residual: bool) -> str:
    added = _unblock("residual", "plain_residual", "filters") + "  total = Add (shifted, plain_residual)\n"
    return f"""
{_sums(OP_TYPE)}
  scales = Reshape (scale, per_channel)
  shifts = Reshape (shift, per_channel)
  scaled = Mul (sums, scales)
  shifted = Add (scaled, shifts)
{added if residual else "  total = Identity (shifted)"}
  low_float = Constant <value_float: float = @low> ()
  high_float = Constant <value_float: float = @high> ()
  low = CastLike (low_float, total)
  high = CastLike (high_float, total)
  clipped = Clip (total, low, high)
{_block("clipped", "y")}"""


def _fused_integer(residual: bool) -> str:
    return _sums(INTEGER_OP_TYPE, "pad_value: int = @pad_value") + _requantised("sums", residual)


def _blocked_convolution(residual: bool) -> str:
    return _plain() + _CONVOLUTION + _PER_CHANNEL + _requantised("sums", residual)


def _requantised(sums: str, residual: bool) -> str:
    """ONNX shifts no signed integers, and its division drops fractions: so the sum is clamped before the shift."""
    added = f"""
{_unblock("residual", "plain_residual", "filters")}
  wide_residual = Cast <to: int = 7> (plain_residual)
  residual_factor = Constant <value_int: int = @residual_multiplier> ()
  share = Mul (wide_residual, residual_factor)
  total = Add (rounded, share)
"""
    return f"""
  wide_sums = Cast <to: int = 7> ({sums})
  wide_multiplier = Cast <to: int = 7> (multiplier)
  factors = Reshape (wide_multiplier, per_channel)
  offsets = Reshape (bias, per_channel)
  two = Constant <value_int: int = 2> ()
  bits = Constant <value_int: int = @shift> ()
  unit = Pow (two, bits)
  half = Div (unit, two)
  scaled = Mul (wide_sums, factors)
  shifted = Add (scaled, offsets)
  rounded = Add (shifted, half)
{added if residual else "  total = Identity (rounded)"}
  low = Constant <value_int: int = @low> ()
  high = Constant <value_int: int = @high> ()
  unity = Constant <value_int: int = 1> ()
  least = Mul (low, unit)
  beyond = Add (high, unity)
  above = Mul (beyond, unit)
  most = Sub (above, unity)
  clamped = Clip (total, least, most)
  divided = Div (clamped, unit)
  bytes = Cast <to: int = 2> (divided)
{_block("bytes", "y")}"""
