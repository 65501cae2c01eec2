"""Post-training quantization: from a float adder network and some images to a network of integers.

``|x - w|`` needs ``x`` and ``w`` on one grid, so the weights of an adder layer live on the grid of its input (or, with
filter groups, on the grid of their group's copy of it). Weights outside the grid are clamped without loss: for x inside
low..high, ``|x - w| = |x - clip(w)| + |w - clip(w)|``, and the last term is a constant of the filter. Kept
convolutions have int8 weights with a scale per filter. Layers are quantised in order, each on what the integer network
before it computes, and the line that BatchNorm draws through an adder's output is fitted again on the integers.

Source: Redistribution of Weights and Activations for AdderNet Quantization, NeurIPS 2022 (shared scale, filter groups,
lossless clamp of weights, percentile range).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from anncvt.errors import AnncvtError
from anncvt.images import Images
from anncvt.passes.filter_groups import filter_groups
from anncvt.passes.pieces import Piece, Pieces
from anncvt.passes.pieces_of import pieces_of
from anncvt.passes.ranges import METHODS, choose_grid, grid_over, lost_output
from anncvt.passes.samples import Samples, collect, take
from anncvt.program import Preprocess, Program
from anncvt.progress import SILENT, Progress
from anncvt.runtime.integer import Epilogue, Grid, Step
from anncvt.runtime.integer_network import INPUT, IntegerNetwork, verify
from anncvt.runtime.integer_torch import accumulate, finish, rearrange

BITS = (8, 6, 5, 4)
#: Largest multiplier of an epilogue, in bits with its sign: what a small hardware multiplier takes.
MULTIPLIER_BITS = 16
FULL_MULTIPLIER = 1 << (MULTIPLIER_BITS - 1)
#: Multipliers are made smaller so that totals fit 32 bits, of which kernels multiply and shift twice as many at once;
#: but no smaller than half of this, with which a byte changes by no more than an eighth of a step.
SHORT_MULTIPLIER = 2**11
#: Integer logits reach about this far.
LOGIT_RANGE = 2**15
MAX_SHIFT = 31
#: Parts of a layer's range that a filter group may choose.
NARROWED = (1.0, 0.85, 0.7, 0.55, 0.4)
#: Images that this choice looks at.
NARROWING_IMAGES = 16


@dataclass(frozen=True)
class QuantizeConfig:
    """What can be chosen.

    Attributes:
        bits: of the input and the weights of adders. Everything else has 8: kept convolutions, and feature maps that
            are read by more than adders.
        groups: filter groups of a layer at most, each with a scale and a copy of the input of its own.
        range: how a grid's range is chosen, one of :data:`anncvt.passes.ranges.METHODS`.
        power_of_two: scales are powers of two.
        images: calibration images at most.
        fit: fit the line behind each adder again; without, it is that of its BatchNorm.
    """

    bits: int = 8
    groups: int = 1
    range: str = "mse"
    power_of_two: bool = False
    images: int = 512
    fit: bool = True


def quantize(
    program: Program,
    images: Images,
    config: QuantizeConfig | None = None,
    *,
    trained_on: IntegerNetwork | None = None,
    progress: Progress = SILENT,
) -> IntegerNetwork:
    """Quantise the student of ``program``; the program stays as it is.

    Args:
        images: like those it will see; labels are not looked at.
        trained_on: the student was trained for this network: grids that adders read and filter groups stay.

    Raises:
        AnncvtError: no student, no images, an operator that integers do not have, or a sum that may overflow.
    """
    config = config or QuantizeConfig()
    if program.student is None:
        raise AnncvtError("there is no adder network to quantize", fix="`anncvt convert MODEL -o DIR` first")
    if config.bits not in BITS or config.groups < 1 or config.range not in METHODS:
        raise AnncvtError(
            f"cannot quantize to {config.bits} bits in {config.groups} groups with range {config.range!r}",
            fix=f"bits are {', '.join(map(str, BITS))}; groups 1 or more; ranges {', '.join(METHODS)}",
        )
    if len(images) == 0:
        raise AnncvtError("no images to calibrate with", where=images.name, fix="name data with at least one image")
    begin = time.monotonic()
    some = images.subset(torch.arange(min(len(images), config.images)))
    pieces = pieces_of(program)
    samples = collect(program, pieces, some, progress=progress)
    network = _Quantizer(pieces, program.preprocess, samples, config, trained_on).network(some, progress)
    verify(network)
    network.settings["seconds"] = round(time.monotonic() - begin, 3)
    return network


def pixel_table(preprocess: Preprocess, *, power_of_two: bool = False) -> tuple[Grid, np.ndarray]:
    """The input's grid, over every value a pixel can take, and the integer of each pixel: ``[C, 256]`` uint8."""
    channels = preprocess.input_size[0]
    pixels = np.arange(256) / 255
    mean, std = (np.broadcast_to(np.asarray(v, np.float64), channels) for v in (preprocess.mean, preprocess.std))
    values = (pixels[None] - mean[:, None]) / std[:, None]
    grid = grid_over(min(values.min(), 0.0), max(values.max(), 0.0), 8, power_of_two=power_of_two)
    return grid, grid.quantise(values)


def _adder_grids(network: IntegerNetwork, pieces: Pieces) -> dict[str, Grid]:
    """Of every tensor that an adder reads: by the name of the piece whose grid it is, or of the copy."""
    names = {piece.name for piece in pieces.order}
    read = {name for step in network.steps if step.op == "adder" for name in step.inputs}
    owners = {name: pieces.owners(name) if name in names else (name,) for name in read}
    return {owner: network.grid(name) for name in sorted(read) for owner in owners[name]}


@dataclass(frozen=True)
class _Line:
    """``slope * accumulator + offset`` per output channel, real numbers."""

    slope: Tensor
    offset: Tensor


class _Quantizer:
    def __init__(
        self,
        pieces: Pieces,
        preprocess: Preprocess,
        samples: dict[str, Samples],
        config: QuantizeConfig,
        trained_on: IntegerNetwork | None,
    ) -> None:
        self.pieces, self.samples, self.config = pieces, samples, config
        self.kept = {} if trained_on is None else _adder_grids(trained_on, pieces)
        steps = () if trained_on is None else trained_on.steps
        self.kept_groups = {step.name: step.filter_group for step in steps if step.filter_group is not None}
        self.sharing = pieces.sharing()
        self.input_shape: tuple[int, int, int] = preprocess.input_size  # type: ignore[assignment]
        grid, self.table = pixel_table(preprocess, power_of_two=config.power_of_two)
        self.grids = {INPUT: grid}
        self.steps: list[Step] = []
        self.values: dict[str, list[Tensor]] = {}

    def network(self, images: Images, progress: Progress) -> IntegerNetwork:
        chunk = max(1, 2**22 // math.prod(max((p.shape for p in self.pieces.order), key=math.prod)))
        table = torch.from_numpy(self.table).long()
        self.values[INPUT] = [
            torch.stack([table[c][part[:, c].long()] for c in range(part.shape[1])], 1).to(torch.uint8)
            for part in images.pixels.split(chunk)
        ]
        last = self._last_readers()
        with progress.task("quantizing", len(self.pieces.order)) as task, torch.no_grad():
            for at, piece in enumerate(self.pieces.order):
                self._add(piece)
                for name in [name for name in self.values if last.get(name.partition("@")[0], at) <= at]:
                    if name != piece.name:
                        del self.values[name]
                task.advance(1, layer=piece.name)
        settings = {name: value for name, value in asdict(self.config).items() if name != "images"}
        settings["images"] = len(images)
        return IntegerNetwork(tuple(self.steps), self.input_shape, self.grids[INPUT], self.table, settings)

    def _last_readers(self) -> dict[str, int]:
        """The last piece that reads a tensor, or a copy of it."""
        last: dict[str, int] = {}
        for at, piece in enumerate(self.pieces.order):
            for name in (*piece.inputs, *(() if piece.residual is None else (piece.residual,))):
                last[name] = at
        return last

    def _add(self, piece: Piece) -> None:
        if piece.scale is None:
            self._rearrange(piece)
            return
        is_last = piece is self.pieces.order[-1]
        grid = self._logit_grid(piece) if is_last else self._output_grid(piece)
        self.grids[piece.name] = grid
        step, line = self._step(piece, grid)
        accumulators = [accumulate(step, parts) for parts in self._inputs(step)]
        line = self._fitted(piece, line, accumulators)
        low, high = (-(2**31), 2**31 - 1) if is_last else _limits(piece, grid)
        epilogue = self._epilogue(line, grid, piece.residual, low, high, _largest_multiplier(step, is_last))
        residuals: Sequence[Tensor | None] = [None] * len(accumulators)
        if piece.residual is not None:
            residuals = self.values[piece.residual]
        self.values[piece.name] = [finish(epilogue, a, r) for a, r in zip(accumulators, residuals, strict=True)]
        self.steps.append(replace(step, epilogue=epilogue))

    def _rearrange(self, piece: Piece) -> None:
        grid = self.grids[piece.inputs[0]]
        self.grids[piece.name] = grid
        values = (grid.zero,) if piece.op == "pad" else ()
        step = Step(piece.name, piece.op, piece.inputs, piece.shape, grid, piece.window, piece.kernel)
        step = replace(step, pad_values=values, channels=piece.channels)
        self.values[piece.name] = [rearrange(step, parts) for parts in self._inputs(step)]
        self.steps.append(step)

    def _inputs(self, step: Step) -> Iterator[tuple[Tensor, ...]]:
        """What a step reads, a part of the images at a time."""
        return zip(*(self.values[name] for name in step.inputs), strict=True)

    def _output_grid(self, piece: Piece) -> Grid:
        """One for all that are concatenated: chosen with the first of them."""
        names = self.sharing.get(piece.name, (piece.name,))
        settled = next((grids[name] for grids in (self.kept, self.grids) for name in names if name in grids), None)
        bits = self.config.bits if self.config.groups == 1 and all(map(self._only_adders_read, names)) else 8
        return settled or self._choose(self._samples(names), bits)

    def _samples(self, names: Iterable[str]) -> Tensor:
        """What tensors hold in the float network, samples of all of them."""
        return torch.cat([self.samples[name].output.flatten() for name in names])

    def _choose(self, samples: Tensor, bits: int) -> Grid:
        return choose_grid(samples, bits, self.config.range, power_of_two=self.config.power_of_two)

    def _logit_grid(self, piece: Piece) -> Grid:
        largest = float(self.samples[piece.name].output.abs().max()) or 1.0
        return Grid(2.0 ** math.ceil(math.log2(largest / LOGIT_RANGE)), 0, 32)

    def _only_adders_read(self, name: str) -> bool:
        readers = [piece for piece in self.pieces.order if name in (*piece.inputs, piece.residual)]
        return all(
            piece.residual != name
            and (piece.op == "adder" or (piece.scale is None and self._only_adders_read(piece.name)))
            for piece in readers
        )

    def _step(self, piece: Piece, grid: Grid) -> tuple[Step, _Line]:
        """A piece as a step without epilogue, and the line through its accumulators as the float network has it."""
        assert piece.scale is not None and piece.shift is not None
        base = Step(piece.name, piece.op, piece.inputs, piece.shape, grid, piece.window, piece.kernel)
        base = replace(base, residual=piece.residual)
        if piece.op == "adder":
            return self._adder(piece, base)
        source = self.grids[piece.inputs[0]]
        if piece.op == "convolution":
            assert piece.weight is not None
            integers, scales = _int8(piece.weight, self.config.power_of_two)
            step = replace(base, weight=integers, pad_values=(source.zero,))
            return step, _Line(piece.scale * scales * source.scale, piece.shift)
        if piece.op == "sum_pool":
            taps = piece.kernel[0] * piece.kernel[1]
            offset = piece.shift - piece.scale * source.scale * source.zero * taps
            return replace(base, pad_values=(source.zero,)), _Line(piece.scale * source.scale, offset)
        return base, _Line(piece.scale * source.scale, piece.shift - piece.scale * source.scale * source.zero)

    def _adder(self, piece: Piece, base: Step) -> tuple[Step, _Line]:
        assert piece.weight is not None and piece.scale is not None and piece.shift is not None
        weight = piece.weight
        grouped = self.config.groups > 1 and piece.window.groups == 1
        if piece.name in self.kept_groups:
            members = torch.from_numpy(self.kept_groups[piece.name]).long()
        else:
            members = filter_groups(weight, self.config.groups if grouped else 1)
        names = [
            self._copy(piece, weight[members == at], at if grouped else None) for at in range(int(members.max()) + 1)
        ]
        grids = [self.grids[name] for name in names]
        scale, low, high, zero, top = (
            torch.tensor([float(getattr(grid, part)) for grid in grids], dtype=torch.float64)[members].view(-1, 1, 1, 1)
            for part in ("scale", "low", "high", "zero", "top")
        )
        clipped = torch.minimum(torch.maximum(weight, low), high)
        integers = ((clipped / scale).round() + zero).clamp(min=0).minimum(top)
        constant = -(weight - clipped).abs().sum((1, 2, 3))
        step = replace(
            base,
            inputs=tuple(names),
            weight=integers.to(torch.uint8).numpy(),
            filter_group=members.to(torch.uint8).numpy(),
            pad_values=tuple(grid.zero for grid in grids),
            clamp=(constant / scale.flatten()).float().numpy(),
        )
        return step, _Line(piece.scale * scale.flatten(), piece.shift + piece.scale * constant)

    def _copy(self, piece: Piece, weight: Tensor, group: int | None) -> str:
        """The input of an adder (of one of its filter groups) on a grid for adders; made if it is not there yet."""
        source = piece.inputs[0]
        if group is None and self.grids[source].bits == self.config.bits:
            return source
        name = f"{source}@{self.config.bits}" if group is None else f"{source}@{piece.name}.{group}"
        if name not in self.grids:
            before = self.grids[source]
            grid = self.kept.get(name) or self._copy_grid(piece, weight, group)
            shape = self.input_shape if source == INPUT else self.pieces[source].shape
            ones = torch.ones(shape[0], dtype=torch.float64)
            line = _Line(ones * before.scale, -ones * before.scale * before.zero)
            epilogue = self._epilogue(line, grid, None, 0, grid.top)
            self.values[name] = [finish(epilogue, part.int(), None) for part in self.values[source]]
            self.steps.append(Step(name, "rescale", (source,), shape, grid, epilogue=epilogue))
            self.grids[name] = grid
        return name

    def _copy_grid(self, piece: Piece, weight: Tensor, group: int | None) -> Grid:
        grid = self._choose(self._values(piece.inputs[0]), self.config.bits)
        return grid if group is None else self._narrowed(piece, weight, grid)

    def _values(self, name: str) -> Tensor:
        """What a tensor holds in the float network, a sample."""
        owners = self.pieces.owners(name)
        if owners != (INPUT,):
            return self._samples(owners)
        return self.grids[INPUT].scale * (self.values[INPUT][0].double() - self.grids[INPUT].zero)

    def _narrowed(self, piece: Piece, weight: Tensor, grid: Grid) -> Grid:
        """For one filter group: ``grid``, or the part of its range that loses least of what the filters compute."""
        source = self.grids[piece.inputs[0]]
        x = source.scale * (self.values[piece.inputs[0]][0][:NARROWING_IMAGES].double() - source.zero)
        candidates = [
            grid_over(share * grid.low, share * grid.high, grid.bits, power_of_two=self.config.power_of_two)
            for share in NARROWED
        ]
        return min(candidates, key=lambda candidate: lost_output(x.float(), weight.float(), piece.window, candidate))

    def _fitted(self, piece: Piece, line: _Line, accumulators: list[Tensor]) -> _Line:
        """The least-squares line from the integers to what the float network computes there; mean alone where that
        is all the data support or the layer is no adder."""
        if not self.config.fit or piece.weight is None:
            return line
        sample = self.samples[piece.name]
        a = take(accumulators, sample.at).double()
        target = sample.line.double()
        if piece.residual is not None:
            # What the residual lost on its way is made good here, as far as a line can.
            assert sample.residual is not None
            grid = self.grids[piece.residual]
            integers = take(self.values[piece.residual], sample.at).double()
            target = target + sample.residual - grid.scale * (integers - grid.zero)
        slope = line.slope
        if piece.op == "adder" and len(a) >= 64:
            spread = a.var(0, unbiased=False)
            fitted = ((a - a.mean(0)) * (target - target.mean(0))).mean(0) / spread.clamp(min=1e-9)
            ratio = fitted / slope
            slope = torch.where((spread > 0) & (ratio > 0.5) & (ratio < 2), fitted, slope)
        return _Line(slope, target.mean(0) - slope * a.mean(0))

    def _epilogue(
        self, line: _Line, grid: Grid, residual: str | None, low: int, high: int, most: int = FULL_MULTIPLIER
    ) -> Epilogue:
        """The line in integers; its multipliers are at most ``most``, those of accumulators."""
        slope, offset = (line.slope / grid.scale).numpy(), (line.offset / grid.scale).numpy() + grid.zero
        source = None if residual is None else self.grids[residual]
        ratio = 0.0 if source is None else source.scale / grid.scale
        limits = ((float(np.abs(slope).max()), most), (ratio, FULL_MULTIPLIER))
        shifts = [math.floor(math.log2((limit - 0.5) / value)) for value, limit in limits if value]
        shift = min(max(min(shifts, default=MULTIPLIER_BITS - 2), 1), MAX_SHIFT)
        multiplier = np.rint(slope * 2**shift).astype(np.int32)
        residual_multiplier = round(ratio * 2**shift)
        bias = np.rint(offset * 2**shift).astype(np.int64)
        if source is not None:
            bias -= residual_multiplier * source.zero
        return Epilogue(multiplier, bias, shift, low, high, residual_multiplier)


def _largest_multiplier(step: Step, is_last: bool) -> int:
    """The largest multiplier of accumulators with which kernels need no more than 32 bits, or that hardware takes."""
    if is_last or step.weight is None:
        return FULL_MULTIPLIER
    filters = step.weight.reshape(len(step.weight), -1)
    reach = filters.shape[1] if step.op == "adder" else int(np.abs(filters.astype(np.int64)).sum(1).max())
    # Sums of maxima, which some kernels add up in place of differences, are up to twice as large.
    short = ((1 << 31) - 1) // max(2 * 255 * reach, 1)
    return min(short, FULL_MULTIPLIER) if short >= SHORT_MULTIPLIER else FULL_MULTIPLIER


def _limits(piece: Piece, grid: Grid) -> tuple[int, int]:
    """The integers between which the activation leaves the output."""
    ends = [
        edge if math.isinf(value) else min(max(round(value / grid.scale) + grid.zero, 0), grid.top)
        for value, edge in ((piece.low, 0), (piece.high, grid.top))
    ]
    return ends[0], ends[1]


def _int8(weight: Tensor, power_of_two: bool) -> tuple[np.ndarray, Tensor]:
    """A convolution's weights as int8 and the scale of each filter."""
    scales = weight.flatten(1).abs().amax(1) / 127
    scales = torch.where(scales > 0, scales, 1.0)
    if power_of_two:
        scales = torch.exp2(scales.log2().ceil())
    integers = (weight / scales.view(-1, 1, 1, 1)).round().clamp(-127, 127)
    return integers.to(torch.int8).numpy(), scales
