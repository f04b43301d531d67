"""Between tensors and rows of channels, as the formats with a table need them, and the scales that fit a table."""

from __future__ import annotations

import numpy as np

from kquant.grids.grid import Array, Grid, nearest, valid_scale

_FACTORS = np.geomspace(0.15, 1.3, 24)  # of the scale at which the largest weight is the largest level
_REFINE = 3


def to_rows(w: Array, axis: int | None) -> Array:
    """A row of float64 for every channel, or one for all."""
    w = np.asarray(w, np.float64)
    return w.reshape(1, -1) if axis is None else np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1)


def importance_rows(w: Array, axis: int | None, importance: Array | None) -> Array:
    """How much the squared error of each weight counts, in rows; 1 by default."""
    return to_rows(np.ones_like(w) if importance is None else np.broadcast_to(importance, np.shape(w)), axis)


def from_rows(scale: Array, table: Array, axis: int | None) -> Grid:
    """The grid of a scale for every row, and one table for all (levels,).

    The scale of a row of zeros is 0 here, and negligible in the grid: its table may have no zero.
    """
    scale = valid_scale(np.where(scale > 0, scale, 1e-6 * np.max(scale)))
    scale = scale[0] if axis is None else scale
    return Grid(
        scale=np.asarray(scale),
        zero_point=np.zeros(np.shape(scale), np.int32),
        qmin=int(table.min()),
        qmax=int(table.max()),
        axis=axis,
        table=table.astype(np.int32),
    )


def scaled_table(w: Array, axis: int | None, importance: Array | None, table: Array) -> Grid:
    """The scales of least squared error for given levels: the best of some, then alternating least squares.

    min sum v (w - a l)^2 over a and over levels l of the table: at the nearest levels a = sum v w l / sum v l^2.
    """
    rows, v = to_rows(w, axis), importance_rows(w, axis, importance)
    levels, largest = table.astype(np.float64), np.abs(rows).max(axis=1) / max(-table[0], table[-1])
    best, least = largest, np.full(len(rows), np.inf)

    def attempt(scale: Array) -> Array:
        nonlocal best, least
        a = np.where(scale > 0, scale, 1.0)[:, None]
        found = nearest(rows / a, levels)
        cost = (v * np.square(rows - a * found)).sum(axis=1)
        best, least = np.where(cost < least, scale, best), np.minimum(cost, least)
        return fitted(rows, v, found, scale)

    for factor in _FACTORS:
        attempt(largest * factor)
    scale = best
    for _ in range(_REFINE):
        scale = attempt(scale)
    attempt(scale)
    return from_rows(best, table, axis)


def fitted(rows: Array, v: Array, levels: Array, scale: Array) -> Array:
    """The scale of least squared error of every row whose weights have these levels; `scale` where all are zero."""
    mass, total = (v * np.square(levels)).sum(axis=1), (v * rows * levels).sum(axis=1)
    return np.where((mass > 0) & (total > 0), total / np.where(mass > 0, mass, 1.0), scale)
