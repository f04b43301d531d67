"""Number formats of weights: ways of making a grid, one file each, with one signature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from kquant.config.specs import QuantSpec
from kquant.grids.formats.apot import apot
from kquant.grids.formats.binary import binary
from kquant.grids.formats.binary_bases import bases_design, binary_bases
from kquant.grids.formats.blocks import as_scales, as_tables, block_axis_of, blocks_of, fits_kernels
from kquant.grids.formats.kmeans import kmeans, kmeans_design
from kquant.grids.formats.power_of_two import power_of_two
from kquant.grids.formats.ternary import ternary
from kquant.grids.formats.uniform import uniform
from kquant.grids.grid import Array, Grid
from kquant.grids.ranges import finite_weights

# values, spec, axis of the channels (None for one scale), importance of each value (second moments) -> grid
Make = Callable[[Array, QuantSpec, int | None, Array | None], Grid]


@dataclass(frozen=True, kw_only=True)
class Format:
    """A way of making a grid.

    Attributes:
        make: values, spec, axis of the channels, importance -> grid.
        design: f(table of the grid) -> the matrix D [levels, parameters] of levels D p whose parameters p may be chosen
            anew (`shared_levels`); None where the scales alone are free.
    """

    make: Make
    design: Callable[[Array], Array] | None = None


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "uniform": Format(make=uniform),
        "power_of_two": Format(make=power_of_two),
        "apot": Format(make=apot),
        "kmeans": Format(make=kmeans, design=kmeans_design),
        "binary_bases": Format(make=binary_bases, design=bases_design),
        "ternary": Format(make=ternary),
        "binary": Format(make=binary),
    }
)


def weight_grid(
    w: Any,
    spec: QuantSpec,
    axis: int | None = None,
    importance: Any = None,
    name: str = "",
    block_scales: bool = False,
) -> Grid:
    """The grid of a weight tensor in the format of its spec, for kernels that have one scale per channel.

    Args:
        w: the weights, finite.
        spec: its format, bits, and how ranges are chosen.
        axis: the axis of the channels; None for one scale.
        importance: how much the squared error of each weight counts (second moments of what it multiplies), in the
            shape of `w`; equally by default.
        name: the layer's name, for messages.
        block_scales: the kernel reads scales of blocks, too: uniform weights get them where it takes the blocks.

    Raises:
        ModelError: the weights are not finite.
    """
    w = finite_weights(w, name)
    if spec.block is None:
        return FORMATS[spec.format].make(w, spec, axis, importance)
    if axis is None:  # few values with one scale: there is nothing to divide
        return uniform(w, replace(spec, block=None), None, importance)
    along = block_axis_of(w.ndim, axis)
    parts = [FORMATS[spec.format].make(part, spec, axis, None) for part in blocks_of(w, spec.block, along)]
    if block_scales and spec.format == "uniform" and fits_kernels(w.shape[along], spec.block):
        return as_scales(parts, spec.block, along)
    return as_tables(parts, spec.block, along)
