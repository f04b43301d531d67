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

Array = np.ndarray[Any, Any]
_BLOCK = 32  # coordinates handled together; the rest of the update is one matrix product


@dataclass(frozen=True, eq=False)
class Quadratic:
    """Columns u of integers that are to come near to t in the metric A.

    Attributes:
        metric: A, positive definite [groups, k, k].
        target: t, in steps of the grid [groups, k, m].
        low: smallest integer, broadcasts against `target`.
        high: largest integer.
    """

    metric: Array
    target: Array
    low: Array
    high: Array

    def nearest(self) -> Array:
        """Every coordinate rounded on its own."""
        return np.clip(np.rint(self.target), self.low, self.high)

    def cost(self, u: Array) -> Array:
        """(u - t)^T A (u - t) of every column [groups, 1, m], float64."""
        e = u.astype(np.float64) - self.target
        return (e * (self.metric @ e)).sum(axis=1, keepdims=True)

    def better(self, u: Array, v: Array) -> Array:
        """Column by column the one with the lower cost, u where they tie."""
        return np.where(self.cost(v) < self.cost(u), v, u)


def descent(problem: Quadratic, sweeps: int = 50) -> Array:
    """Coordinate descent from sequentially rounded integers and from the nearest ones; the better for each column.

    Args:
        problem: what to solve.
        sweeps: at most so many passes over the coordinates.

    Returns:
        Integers as float32 [groups, k, m]; no column costs more than its nearest integers.
    """
    nearest = problem.nearest()
    first = problem.better(nearest, descend(problem, nearest, sweeps))
    return problem.better(first, descend(problem, sequential(problem), sweeps)).astype(np.float32)


def sequential(problem: Quadratic) -> Array:
    """Babai's nearest plane with clipping; the coordinate with the largest A_kk is rounded first."""
    order = np.argsort(np.diagonal(problem.metric, axis1=1, axis2=2), axis=1, kind="stable")
    metric = np.take_along_axis(np.take_along_axis(problem.metric, order[:, :, None], 1), order[:, None, :], 2)
    t = np.take_along_axis(problem.target, order[:, :, None], 1).astype(np.float32)
    factor = np.linalg.cholesky(metric)
    factor = (factor / np.diagonal(factor, axis1=1, axis2=2)[:, None, :]).astype(np.float32)
    u, low, high = np.zeros_like(t), problem.low.astype(np.float32), problem.high.astype(np.float32)
    for end in range(t.shape[1], 0, -_BLOCK):
        begin = max(0, end - _BLOCK)
        inner = factor[:, begin:end, begin:end]
        later = factor[:, end:, begin:end].transpose(0, 2, 1) @ (u[:, end:] - t[:, end:])
        centre = t[:, begin:end] - later
        for k in range(end - begin - 1, -1, -1):
            new = np.clip(np.rint(centre[:, k]), low[:, 0], high[:, 0])
            u[:, begin + k] = new
            error = new - t[:, begin + k]
            centre[:, :k] -= inner[:, k, :k, None] * error[:, None, :]
    out = np.empty_like(u)
    np.put_along_axis(out, order[:, :, None], u, 1)
    return out


def descend(problem: Quadratic, start: Array, sweeps: int = 50) -> Array:
    """Cyclic coordinate descent over integers; never raises the cost (but for float32 rounding).

    Columns do not depend on each other: those that a sweep leaves alone are at rest and drop out.
    """
    metric, out = problem.metric.astype(np.float32), start.astype(np.float32)
    residual = (problem.metric @ (out - problem.target)).astype(np.float32)
    shape = (*out.shape[:1], 1, *out.shape[2:])
    low, high = (np.broadcast_to(e, shape).astype(np.float32) for e in (problem.low, problem.high))
    axis = 2 if len(out) == 1 else 0  # a lone group drops columns, others drop whole groups
    u, active = out.copy(), np.arange(out.shape[axis])
    for _ in range(sweeps):
        before = u.copy()
        _sweep(metric, u, residual, low, high)
        keep = np.flatnonzero((u != before).any(axis=(0, 1) if axis == 2 else (1, 2)))
        out[(slice(None),) * axis + (active,)] = u
        if not keep.size:
            break
        active = active[keep]
        u, residual, low, high = (np.take(t, keep, axis) for t in (u, residual, low, high))
        metric = metric if axis == 2 else metric[keep]
    return out


def _sweep(metric: Array, u: Array, residual: Array, low: Array, high: Array) -> None:
    """Visit every coordinate once; u and r = A (u - t) are updated in place."""
    inverse = 1 / np.diagonal(metric, axis1=1, axis2=2)[:, :, None]
    for begin in range(0, u.shape[1], _BLOCK):
        block = slice(begin, begin + _BLOCK)
        inner, now, r = metric[:, block, block], u[:, block], residual[:, block].copy()
        old = now.copy()
        for k in range(now.shape[1]):
            step = np.rint(now[:, k] - r[:, k] * inverse[:, begin + k])
            step = np.minimum(np.maximum(step, low[:, 0]), high[:, 0]) - now[:, k]
            if step.any():
                now[:, k] += step
                r += inner[:, :, k, None] * step[:, None, :]
        change = now - old
        if change.any():
            residual += metric[:, :, block] @ change
