"""Between tensors and rows of channels, as the formats with a table need them."""

from __future__ import annotations

import numpy as np

from kquant.grids.grid import Array, Grid, valid_scale


def to_rows(w: Array, axis: int | None) -> Array:
    """A row of float64 for every channel, or one for all."""
    w = np.asarray(w, np.float64)
    return w.reshape(1, -1) if axis is None else np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1)


def from_rows(scale: Array, table: Array, axis: int | None) -> Grid:
    """The grid of a scale for every row, and a table for all rows (levels,), or for each (rows, levels)."""
    scale = valid_scale(scale)
    if axis is None:
        scale, table = scale[0], table if table.ndim == 1 else table[0]
    return Grid(
        scale=np.asarray(scale),
        zero_point=np.zeros(np.shape(scale), np.int32),
        qmin=int(table.min()),
        qmax=int(table.max()),
        axis=axis,
        table=table.astype(np.int32),
    )
