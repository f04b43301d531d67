"""Grids fitted to the integers that were found on them: scales, and levels that are free, by least squares.

With integers u of a column on levels l and the scale s, the error of the layer's output is (s u - t)^T A (s u - t), a
quadratic form in s, and one in the levels, too: s u = s S l with S [inputs, levels] saying which weight has which
level. So rounding and fitting take turns, and neither raises the error, as LQ-Nets and k-means do on the weights alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.grids.formats.shared_levels import codes_of, snapped, solved
from kquant.grids.grid import Grid, valid_scale
from kquant.quantize.descent import Quadratic, descent

Array = np.ndarray[Any, Any]
_ROUNDS = 4
_GAIN = 1e-3  # a round that gains less is the last


@dataclass(frozen=True, eq=False)
class Fit:
    """What is fitted.

    Attributes:
        problem_of: grid -> its problem, and its scale shaped to broadcast against the target.
        target: the weights [groups, k, m].
        metric: A [groups, k, k].
        design: see `formats.Format.design`.
    """

    problem_of: Callable[[Grid], tuple[Quadratic, Array]]
    target: Array
    metric: Array
    design: Callable[[Array], Array] | None = None

    def cost(self, grid: Grid, u: Array) -> float:
        """The error of all columns, in units of the weights."""
        problem, scale = self.problem_of(grid)
        return float((problem.cost(u) * np.square(scale, dtype=np.float64)).sum())


def refitted(fit: Fit, grid: Grid, u: Array, sweeps: int) -> tuple[Grid, Array]:
    """The grid and integers on it after rounds of fitting and descent; no worse than what is given.

    Args:
        fit: what is fitted.
        grid: with one table for all channels, or one for each of their blocks.
        u: integers less the zero point, which is 0 [groups, k, m].
        sweeps: of each descent.
    """
    cost = fit.cost(grid, u)
    for _ in range(_ROUNDS):
        moved, start = with_scales(fit, *with_levels(fit, grid, u))
        found = descent(fit.problem_of(moved)[0], sweeps, start)
        now = fit.cost(moved, found)
        if now >= cost:
            break
        grid, u, enough, cost = moved, found, now > (1 - _GAIN) * cost, now
        if enough:
            break
    return grid, u


def with_scales(fit: Fit, grid: Grid, u: Array) -> tuple[Grid, Array]:
    """The grid with the scales of least error for its integers: u^T A t / u^T A u."""
    product = tf.matmul(fit.metric, u.astype(np.float64)).numpy()
    total, mass = (fit.target * product).sum(axis=1), (u * product).sum(axis=1)
    if grid.axis is None:
        total, mass = total.sum(), mass.sum()
    total, mass = (np.reshape(x, np.shape(grid.scale)) for x in (total, mass))
    scale = np.where((mass > 0) & (total > 0), total / np.where(mass > 0, mass, 1.0), grid.scale)
    return replace(grid, scale=valid_scale(scale)), u


def with_levels(fit: Fit, grid: Grid, u: Array) -> tuple[Grid, Array]:
    """The grid with the levels of least error for the choice that its integers are, where they are free, and these."""
    if fit.design is None or grid.table is None or grid.table.ndim > 1:
        return grid, u
    problem, scale = fit.problem_of(grid)
    codes, count = codes_of(u, grid.table.astype(np.float64)), len(grid.table)
    chosen = [(codes == level) * scale.astype(np.float64) for level in range(count)]
    products = [tf.matmul(fit.metric, s).numpy() for s in chosen]
    metric = np.array([[np.vdot(a, b) for b in products] for a in chosen])
    total = np.array([np.vdot(b, fit.target) for b in products])
    levels = grid.table.astype(np.float64)
    moved, design, order = solved(
        levels, fit.design(grid.table), (metric + metric.T) / 2, total, problem.free is not None
    )
    table, step = snapped(moved, design)
    found = replace(
        grid,
        scale=np.asarray(grid.scale * np.float32(step)),
        table=table,
        qmin=int(table.min()),
        qmax=int(table.max()),
    )
    return found, problem.held(table[np.argsort(order)][codes].astype(np.float32))
