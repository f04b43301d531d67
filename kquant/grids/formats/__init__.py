"""Number formats of weights: ways of making a grid, one file each, with one signature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from kquant.config.specs import QuantSpec
from kquant.grids.formats.blocks import as_tables, block_axis_of, blocks_of
from kquant.grids.formats.kmeans import kmeans
from kquant.grids.formats.ternary import ternary
from kquant.grids.formats.uniform import uniform
from kquant.grids.grid import Array, Grid
from kquant.grids.ranges import finite_weights

# values, spec, axis of the channels (None for one scale), importance of each value (second moments) -> grid
Format = Callable[[Array, QuantSpec, int | None, Array | None], Grid]
FORMATS: Mapping[str, Format] = MappingProxyType({"uniform": uniform, "ternary": ternary, "kmeans": kmeans})


def weight_grid(w: Any, spec: QuantSpec, axis: int | None = None, importance: Any = None, name: str = "") -> Grid:
    """The grid of a weight tensor in the format of its spec, for kernels that have one scale per channel.

    Args:
        w: the weights, finite.
        spec: its format, bits, and how ranges are chosen.
        axis: the axis of the channels; None for one scale.
        importance: how much the squared error of each weight counts (second moments of what it multiplies), in the
            shape of `w`; equally by default.
        name: the layer's name, for messages.

    Raises:
        ModelError: the weights are not finite.
    """
    w = finite_weights(w, name)
    if spec.block is None:
        return FORMATS[spec.format](w, spec, axis, importance)
    if axis is None:  # few values with one scale: there is nothing to divide
        return uniform(w, replace(spec, block=None), None, importance)
    along = block_axis_of(w.ndim, axis)
    parts = [FORMATS[spec.format](part, spec, axis, None) for part in blocks_of(w, spec.block, along)]
    return as_tables(parts, spec.block, along)
