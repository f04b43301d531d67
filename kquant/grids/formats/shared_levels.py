"""Levels that all channels share, each on a scale of its own: alternating least squares.

The levels are l = D p with a design D [levels, parameters] and free parameters p: the identity where every level is
free (k-means), signs where they are sums of +-p_i (binary bases). One table for a tensor takes as many bytes as it has
levels, and the tensor as many distinct integers: coders and tables of runtimes profit, where a table for every channel
would cost more than it gains.
"""

from __future__ import annotations

import numpy as np

from kquant.grids.formats.rows import fitted, from_rows, importance_rows, to_rows
from kquant.grids.grid import Array, Grid

LARGEST = 127
_ROUNDS = 30
_RIDGE = 1e-6


def shared_levels(
    w: Array, axis: int | None, importance: Array | None, start: Array, design: Array, zero: bool = False
) -> Grid:
    """Levels and scales of least squared error, on the integers of an int8 tensor; see `formats.weight_grid`.

    Args:
        w, axis, importance: as of all formats.
        start: the levels to start from in rising order, in units of the root mean square of a channel.
        design: D, its rows in the order of `start`.
        zero: the level nearest to 0 is 0.
    """
    rows, v = to_rows(w, axis), importance_rows(w, axis, importance)
    size = np.sqrt(np.square(rows).mean(axis=1))
    scale, levels = np.where(size > 0, size, 1.0), start.astype(np.float64)
    for _ in range(_ROUNDS):
        codes = codes_of(rows / scale[:, None], levels)
        weight = v * np.square(scale)[:, None]
        mass, total = (np.bincount(codes.ravel(), x.ravel(), len(levels)) for x in (weight, v * rows * scale[:, None]))
        levels, design, _ = solved(levels, design, np.diag(mass), total, zero)
        scale = fitted(rows, v, levels[codes_of(rows / scale[:, None], levels)], scale)
    table, step = snapped(levels, design)
    return from_rows(np.where(size > 0, scale * step, 0.0), table, axis)


def codes_of(steps: Array, levels: Array) -> Array:
    """The number of the nearest level, the lower one of two that are equally near."""
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, steps)


def solved(levels: Array, design: Array, metric: Array, total: Array, zero: bool) -> tuple[Array, Array, Array]:
    """The levels D p, in rising order, that minimize l^T H l - 2 l^T b; D in their order; and which each of them was.

    Levels that nothing determines stay where they are.

    Args:
        levels: as they are.
        design: D [levels, parameters].
        metric: H [levels, levels].
        total: b.
        zero: the level nearest to 0 is 0.
    """
    h = design.T @ metric @ design
    ridge = _RIDGE * np.trace(h) / len(h) + np.finfo(np.float64).tiny
    step = np.linalg.solve(h + ridge * np.eye(len(h)), design.T @ (total - metric @ levels))
    moved = levels + design @ step
    if zero:
        moved[np.argmin(np.abs(moved))] = 0.0
    order = np.argsort(moved, kind="stable")
    return moved[order], design[order], order


def snapped(levels: Array, design: Array) -> tuple[Array, float]:
    """The levels as integers of int8, with their parameters rounded, and the step between integers."""
    parameters = np.linalg.lstsq(design, levels, rcond=None)[0]
    terms = np.abs(design).sum(axis=1).max()  # each of them is rounded by up to a half
    step = np.abs(levels).max() / (LARGEST - (terms - 1) / 2)
    if step == 0:
        return np.zeros(len(levels), np.int32), 1.0
    return np.sort(np.rint(design @ np.rint(parameters / step))).astype(np.int32), float(step)
