"""Uniform quantization: all integers of a range that is chosen by one of the methods of `grids.ranges`."""

from __future__ import annotations

from kquant.config.specs import QuantSpec
from kquant.grids.grid import Array, Grid, grid_from_range
from kquant.grids.ranges import weight_range


def uniform(w: Array, spec: QuantSpec, axis: int | None, importance: Array | None) -> Grid:
    """The grid that covers the range of the spec's method; see `formats.weight_grid`."""
    return grid_from_range(*weight_range(spec.method, w, spec, axis), spec, axis)
