"""Which kernel computes an integer layer on which processor."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from tvm import tirx

from anncvt.runtime.kernels import integer, integer_depthwise, integer_forms, integer_pack, integer_tiling
from anncvt.runtime.kernels.deployment import Deployment
from anncvt.runtime.kernels.integer_forms import Form
from anncvt.runtime.kernels.integer_layer import IntegerLayer
from anncvt.runtime.kernels.integer_pack import Requantisation
from anncvt.runtime.kernels.integer_tiling import IntegerTiling


@dataclass(frozen=True)
class Plan:
    """A layer, the instructions for it, and how it is cut."""

    layer: IntegerLayer
    form: Form
    cut: IntegerTiling

    @classmethod
    def of(cls, layer: IntegerLayer, deployment: Deployment) -> Plan:
        """The plan for the processor of ``deployment``."""
        if layer.depthwise:
            return cls(layer, integer_depthwise.form_of(layer, deployment.features), integer_depthwise.CUT)
        return cls.with_form(layer, integer_forms.choose(layer.mode, deployment.architecture, deployment.features))

    @classmethod
    def with_form(cls, layer: IntegerLayer, form: Form) -> Plan:
        """The plan for a layer that is not depthwise, with instructions of the caller's choice."""
        return cls(layer, form, integer_tiling.tiling(layer, form))

    def build(self) -> tirx.PrimFunc:
        """The kernel, for any batch.

        Arguments: ``x``; ``weight``, then ``multiplier`` and ``offset`` or (int32 result) ``base``, then
        ``parameters``, as :meth:`pack` makes them; ``residual`` if the layer has one; ``y``.
        """
        if self.layer.depthwise:
            return integer_depthwise.build(self.layer, self.form)
        return integer.build(self.layer, self.form, self.cut)

    def pack(self, weight: np.ndarray, zero: int, end: Requantisation | None) -> list[np.ndarray]:
        """The constants of the kernel.

        Args:
            weight: ``[O, C/groups, kh, kw]``, uint8 (adder) or int8.
            zero: value of a padded pixel; zero point of the input of a convolution.
            end: how sums become uint8; None for an int32 result.
        """
        layer, form, cut = self.layer, self.form, self.cut
        if layer.depthwise:
            first = integer_depthwise.pack_weight(layer, form, weight)
            layer = dataclasses.replace(layer, groups=1)  # the constants of one long row of lanes
        else:
            first = integer_pack.pack_weight(layer, form, cut, weight)
        return [first, *integer_pack.pack_constants(layer, form, cut, weight, zero, end)]


def generate(layer: IntegerLayer) -> tirx.PrimFunc:
    """The kernel of ``layer`` for this machine."""
    return Plan.of(layer, Deployment.parse("cpu")).build()
