"""Integers that minimize a quadratic form, one column at a time: sequential rounding, then coordinate descent.

Minimize (u - t)^T A (u - t) over integers low <= u <= high. Sequential rounding is Babai's nearest plane, which is what
GPTQ computes (arXiv 2210.17323; arXiv 2507.18553 shows that they are the same): with A = L L^T the form is
sum_k L_kk^2 (u_k - c_k)^2, c_k depends on u_j, j > k only, and u_k = round(c_k) from the last to the first.
Coordinate descent (QuantEase, arXiv 2309.01885) then moves each coordinate to its best integer while the others rest,
u_k <- round(u_k - r_k / A_kk) with r = A (u - t), until nothing moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.grids.grid import nearest

Array = np.ndarray[Any, Any]
_BLOCK = 64  # coordinates between two matrix products; these are TensorFlow's: BLAS threads stall on a busy machine


@dataclass(frozen=True, eq=False)
class Quadratic:
    """Columns u of integers that are to come near to t in the metric A.

    Attributes:
        metric: A, positive definite [groups, k, k].
        target: t, in steps of the grid [groups, k, m].
        low: smallest integer, broadcasts against `target`.
        high: largest integer.
        levels: the integers that are allowed, in rising order: (levels,) for all, or [levels, groups, k, m]; None where
            all from `low` to `high` are.
        free: 1 where the integer is to be found, 0 where it is 0 in any case, of the shape of `target`; None where all
            are.
        unit: what is found are multiples of it, from `low` to `high` times, of the shape of `target`: weights of a
            column that have scales of their own are in one unit so. None for 1; there are no `levels` beside it.
    """

    metric: Array
    target: Array
    low: Array
    high: Array
    levels: Array | None = None
    free: Array | None = None
    unit: Array | None = None

    def nearest(self) -> Array:
        """Every coordinate rounded on its own."""
        return self.held(rounded(self.target, self.low, self.high, self.levels, self.unit))

    def held(self, u: Array) -> Array:
        """The integers with 0 where they are not free."""
        return u if self.free is None else u * self.free

    def cost(self, u: Array) -> Array:
        """(u - t)^T A (u - t) of every column [groups, 1, m], float64."""
        e = u.astype(np.float64) - self.target
        return (e * tf.matmul(self.metric, e)).numpy().sum(axis=1, keepdims=True)

    def better(self, u: Array, v: Array) -> Array:
        """Column by column the one with the lower cost, u where they tie."""
        return np.where(self.cost(v) < self.cost(u), v, u)


def rounded(x: Array, low: Array, high: Array, levels: Array | None, unit: Array | None = None) -> Array:
    """The nearest of the integers from `low` to `high`, of these times a `unit`, or of the `levels`."""
    if unit is not None:
        return np.minimum(np.maximum(np.rint(x / unit), low), high) * unit
    if levels is None:
        return np.minimum(np.maximum(np.rint(x), low), high)
    if levels.ndim == 1:
        return levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]
    return nearest(x, levels)


def _of_row(levels: Array | None, k: int) -> Array | None:
    """The levels of the coordinates number k."""
    return levels if levels is None or levels.ndim == 1 else levels[:, :, k]


def descent(problem: Quadratic, sweeps: int = 50, start: Array | None = None) -> Array:
    """Coordinate descent from sequentially rounded integers and from the nearest ones; the better for each column.

    Args:
        problem: what to solve.
        sweeps: at most so many passes over the coordinates.
        start: other integers to begin with, beside these.

    Returns:
        Integers as float32 [groups, k, m]; no column costs more than its nearest integers.
    """
    nearest = problem.nearest()
    starts = [nearest, sequential(problem), *([] if start is None else [start.astype(nearest.dtype)])]
    best = nearest
    for found in np.split(descend(problem, np.concatenate(starts, 2), sweeps), len(starts), 2):
        best = problem.better(best, found)
    return best.astype(np.float32)


def sequential(problem: Quadratic) -> Array:
    """Babai's nearest plane with clipping; the coordinate with the largest A_kk is rounded first."""
    order = np.argsort(np.diagonal(problem.metric, axis1=1, axis2=2), axis=1, kind="stable")
    metric = np.take_along_axis(np.take_along_axis(problem.metric, order[:, :, None], 1), order[:, None, :], 2)
    t = np.take_along_axis(problem.target, order[:, :, None], 1).astype(np.float32)
    factor = tf.linalg.cholesky(metric).numpy()
    factor = (factor / np.diagonal(factor, axis1=1, axis2=2)[:, None, :]).astype(np.float32)
    levels = problem.levels
    if levels is not None and levels.ndim > 1:
        levels = np.take_along_axis(levels, order[None, :, :, None], 2)
    free, unit = (
        None if a is None else np.take_along_axis(a, order[:, :, None], 1) for a in (problem.free, problem.unit)
    )
    u, error, low, high = np.empty_like(t), np.zeros_like(t), problem.low[:, 0], problem.high[:, 0]
    for end in range(t.shape[1], 0, -_BLOCK):
        block = slice(max(0, end - _BLOCK), end)
        later = tf.matmul(factor[:, end:, block], error[:, end:], transpose_a=True).numpy()
        inner, centre, now = factor[:, block, block], t[:, block] - later, u[:, block]
        for k in reversed(range(now.shape[1])):
            at = block.start + k
            step = None if unit is None else unit[:, at]
            now[:, k] = rounded(centre[:, k], low, high, _of_row(levels, at), step)
            if free is not None:
                now[:, k] *= free[:, at]
            moved = now[:, k] - t[:, block][:, k]
            centre[:, :k] -= inner[:, k, :k, None] * moved[:, None]
        error[:, block] = now - t[:, block]
    out = np.empty_like(u)
    np.put_along_axis(out, order[:, :, None], u, 1)
    return out


def descend(problem: Quadratic, start: Array, sweeps: int = 50) -> Array:
    """Cyclic coordinate descent over integers; never raises the cost (but for float32 rounding).

    Columns do not depend on each other: those that a sweep leaves alone are at rest and drop out.

    Args:
        problem: what to solve.
        start: integers [groups, k, n m], n starts side by side.
        sweeps: at most so many passes over the coordinates.
    """
    metric, out = problem.metric.astype(np.float32), start.astype(np.float32)
    starts = out.shape[2] // problem.target.shape[2]
    t = np.tile(problem.target.astype(np.float32), starts)
    low, high = (_per_column(e, problem.target, starts) for e in (problem.low, problem.high))
    levels = None if problem.levels is None else problem.levels.astype(np.float32)
    own = levels is not None and levels.ndim > 1
    if own and levels is not None:
        levels = np.tile(levels, starts)
    free, unit = (None if a is None else np.tile(a, starts) for a in (problem.free, problem.unit))
    axis = 2 if len(out) == 1 else 0  # a lone group drops columns, others drop whole groups
    u, active = out.copy(), np.arange(out.shape[axis])
    for _ in range(sweeps):
        before = u.copy()
        _sweep(metric, u, t, (low, high), levels, free, unit)
        keep = np.flatnonzero((u != before).any(axis=(0, 1) if axis == 2 else (1, 2)))
        out[(slice(None),) * axis + (active,)] = u
        if not keep.size:
            break
        active = active[keep]
        u, t, low, high = (np.take(a, keep, axis) for a in (u, t, low, high))
        levels = np.take(levels, keep, axis + 1) if own and levels is not None else levels
        free, unit = (None if a is None else np.take(a, keep, axis) for a in (free, unit))
        metric = metric if axis == 2 else metric[keep]
    return out


def _per_column(edge: Array, target: Array, starts: int) -> Array:
    """A bound of the integers as float32 [groups, 1, n m]."""
    return np.tile(np.broadcast_to(edge, (len(target), 1, target.shape[2])).astype(np.float32), starts)


def _sweep(
    metric: Array,
    u: Array,
    t: Array,
    limits: tuple[Array, Array],
    levels: Array | None,
    free: Array | None,
    unit: Array | None,
) -> None:
    """Visit every coordinate once; u is updated in place."""
    low, high = (limit[:, 0] for limit in limits)
    inverse, error = 1 / np.diagonal(metric, axis1=1, axis2=2)[:, :, None], u - t
    for begin in range(0, u.shape[1], _BLOCK):
        block = slice(begin, begin + _BLOCK)
        inner, now = metric[:, block, block], u[:, block]
        residual = tf.matmul(metric[:, block], error).numpy()
        for k in range(now.shape[1]):
            at = begin + k
            step = None if unit is None else unit[:, at]
            new = rounded(now[:, k] - residual[:, k] * inverse[:, at], low, high, _of_row(levels, at), step)
            new = new if free is None else new * free[:, at]
            residual[:, k + 1 :] += inner[:, k + 1 :, k, None] * (new - now[:, k])[:, None]
            now[:, k] = new
        error[:, block] = now - t[:, block]
