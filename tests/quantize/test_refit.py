"""Scales and levels fitted to integers: closed forms, and no step that raises the error."""

from __future__ import annotations

import numpy as np
import pytest

from kquant.grids.formats import FORMATS
from kquant.grids.grid import Grid
from kquant.quantize.descent import Quadratic, descent
from kquant.quantize.refit import Fit, refitted, with_levels, with_scales

RNG = np.random.default_rng(0)


def fit(k: int = 20, m: int = 6, design=None) -> Fit:
    rows = RNG.normal(size=(1, 3 * k, k)) @ (np.eye(k) + 0.5 * RNG.normal(size=(k, k)))
    metric = rows.transpose(0, 2, 1) @ rows / (3 * k)
    target = RNG.standard_t(4, size=(1, k, m)) * RNG.uniform(0.2, 2, m)

    def problem_of(grid: Grid) -> tuple[Quadratic, np.ndarray]:
        scale = grid.scale.reshape(1, 1, -1)
        levels = grid.table.astype(np.float32)
        return Quadratic(metric, target / scale, np.full((1, 1, 1), -127), np.full((1, 1, 1), 127), levels), scale

    return Fit(problem_of, target, metric, design)


def grid(table, m: int = 6, scale: float = 0.3) -> Grid:
    table = np.asarray(table, np.int32)
    return Grid(np.full(m, scale, np.float32), np.zeros(m, np.int32), int(table[0]), int(table[-1]), 1, table)


def test_scales_are_those_of_least_error() -> None:
    f, start = fit(), grid([-1, 0, 1], scale=1.0)
    u = descent(f.problem_of(start)[0])
    found, _ = with_scales(f, start, u)
    for factor in (0.99, 1.01):
        other = grid([-1, 0, 1])
        other = Grid(found.scale * np.float32(factor), other.zero_point, -1, 1, 1, other.table)
        assert f.cost(found, u) < f.cost(other, u)
    factor = np.linalg.cholesky(f.metric[0]).T
    for c in range(6):  # the same from a least squares solver
        want = np.linalg.lstsq((factor @ u[0, :, c])[:, None], factor @ f.target[0, :, c], rcond=None)[0]
        assert found.scale[c] == pytest.approx(want[0], rel=1e-5)


def test_free_levels_are_those_of_least_error() -> None:
    f = fit(design=FORMATS["kmeans"].design)
    start = grid([-127, -40, 30, 120], scale=0.01)
    u = descent(f.problem_of(start)[0])
    found, moved = with_levels(f, start, u)
    assert f.cost(found, moved) < f.cost(start, u)
    factor = np.linalg.cholesky(f.metric[0]).T
    chosen = [np.concatenate([factor @ ((u[0, :, c] == level) * start.scale[c]) for c in range(6)])
              for level in start.table]  # fmt: skip
    want = np.linalg.lstsq(np.stack(chosen, 1), np.concatenate([*(factor @ f.target[0]).T]), rcond=None)[0]
    np.testing.assert_allclose(found.table * found.scale[0] / start.scale[0], want, rtol=0.02, atol=1.0)
    assert np.abs(found.table).max() == 127


@pytest.mark.parametrize(
    "name, table",
    [("ternary", [-1, 0, 1]), ("binary", [-1, 1]), ("kmeans", [-127, -30, 30, 127]), ("binary_bases", [-9, -3, 3, 9])],
)
def test_rounds_lower_the_error_and_stay_on_the_format(name, table) -> None:
    f = fit(design=FORMATS[name].design)
    start = grid(table, scale=2.0 / max(table))
    u = descent(f.problem_of(start)[0])
    before = f.cost(start, u)
    found, moved = refitted(f, start, u, sweeps=20)
    assert f.cost(found, moved) < 0.95 * before
    assert np.isin(moved, found.table).all() and np.abs(found.table).max() <= 127
    if name in ("ternary", "binary"):
        np.testing.assert_array_equal(found.table, table)
    if name == "binary_bases":
        np.testing.assert_array_equal(found.table, -found.table[::-1])
