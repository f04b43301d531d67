"""Integer least squares against brute force and the definition of the algorithms."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from kquant.quantize.descent import Quadratic, descend, descent, sequential


def problem(groups: int = 1, k: int = 8, m: int = 5, seed: int = 0, bits: int = 4) -> Quadratic:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(groups, 2 * k, k)) @ (np.eye(k) + 0.7 * rng.normal(size=(groups, k, k)))
    metric = rows.transpose(0, 2, 1) @ rows / (2 * k)
    high = np.full((1, 1, 1), 2 ** (bits - 1) - 1)
    return Quadratic(metric, rng.normal(size=(groups, k, m)) * high / 2, -high, high)


def assert_feasible(p: Quadratic, u: np.ndarray) -> None:
    np.testing.assert_array_equal(u, np.rint(u))
    assert (u >= p.low).all() and (u <= p.high).all()


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("k", [1, 9, 70])
def test_never_worse_than_nearest_and_at_rest(groups: int, bits: int, k: int) -> None:
    p = problem(groups, k, bits=bits)
    u = descent(p, sweeps=1000)
    assert_feasible(p, u)
    assert (p.cost(u) <= p.cost(p.nearest())).all()
    if k > 1:
        assert p.cost(u).sum() < 0.9 * p.cost(p.nearest()).sum()
    for i, step in itertools.product(range(k), (-1, 1)):  # no single move helps
        v = u.copy()
        v[:, i] = np.clip(v[:, i] + step, p.low[:, 0], p.high[:, 0])
        assert (p.cost(v) >= p.cost(u) * (1 - 1e-5) - 1e-5).all()


def test_near_the_optimum_of_small_problems() -> None:
    p = problem(k=6, m=20, bits=2)
    grid = np.array(list(itertools.product([-1, 0, 1], repeat=6)), np.float64).T[None]
    best = np.array([p_cost.min() for p_cost in (column_costs(p, grid, j) for j in range(20))])
    found = p.cost(descent(p)).ravel()
    assert (found >= best - 1e-5).all()
    assert found.sum() <= 1.5 * best.sum() < 0.6 * p.cost(p.nearest()).sum()
    assert np.mean(found <= best + 1e-5) >= 0.5


def column_costs(p: Quadratic, candidates: np.ndarray, column: int) -> np.ndarray:
    return Quadratic(p.metric, p.target[:, :, [column]], p.low, p.high).cost(candidates)


def test_a_diagonal_metric_is_rounded_to_nearest() -> None:
    p = problem(groups=3)
    p = Quadratic(np.eye(8) * np.arange(1, 9) * np.ones((3, 1, 1)), p.target, p.low, p.high)
    np.testing.assert_array_equal(descent(p), p.nearest())
    np.testing.assert_array_equal(sequential(p), p.nearest())


def test_integers_on_the_grid_stay() -> None:
    p = problem(groups=2)
    p = Quadratic(p.metric, p.nearest(), p.low, p.high)
    np.testing.assert_array_equal(descent(p), p.target)


def test_sequential_rounding_is_gptq() -> None:
    """GPTQ as published: round a weight, spread its error over the rest by the inverse of what is left of A."""
    p = problem(k=40, m=7)
    order = np.argsort(np.diagonal(p.metric[0]), kind="stable")[::-1]
    t, u, left = p.target[0].copy(), np.zeros((40, 7)), list(order)
    while left:
        inverse = np.linalg.inv(p.metric[0][np.ix_(left, left)])
        k = left[0]
        u[k] = np.clip(np.rint(t[k]), -7, 7)
        t[left] -= inverse[:, :1] * (t[k] - u[k]) / inverse[0, 0]
        left = left[1:]
    np.testing.assert_array_equal(sequential(p)[0], u)


def test_descent_from_the_nearest_lowers_the_cost_with_every_sweep() -> None:
    p = problem(k=40)
    costs = [p.cost(descend(p, p.nearest(), sweeps)).sum() for sweeps in (1, 2, 3, 50, 100)]
    assert costs[0] < p.cost(p.nearest()).sum()
    assert all(b <= a for a, b in itertools.pairwise(costs))
    assert costs[-1] == costs[-2]


@pytest.mark.parametrize("groups", [1, 3])
def test_starts_side_by_side_do_not_meddle(groups: int) -> None:
    p = problem(groups, k=70)
    starts = [p.nearest(), sequential(p)]
    both = descend(p, np.concatenate(starts, 2))
    for start, found in zip(starts, np.split(both, 2, 2), strict=True):
        alone = descend(p, start)
        assert np.mean(found != alone) < 0.01  # products of another shape round differently
        np.testing.assert_allclose(p.cost(found), p.cost(alone), rtol=0.02)


def test_arguments_stay() -> None:
    p = problem(groups=2, k=70)
    before = [a.copy() for a in (p.metric, p.target, p.nearest())]
    start = before[2].copy()
    descend(p, start)
    descent(p)
    for now, then in zip((p.metric, p.target, start), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_levels_that_all_share_are_those_of_every_weight() -> None:
    """(levels,) gives what the same levels give for every weight, of which ties go to the lower one."""
    p, levels = problem(groups=2, k=70, m=4), np.array([-7, -2, -1, 0, 3, 7], np.float32)
    each = np.broadcast_to(levels[:, None, None, None], (6, *p.target.shape))
    shared, own = (Quadratic(p.metric, p.target, p.low, p.high, v) for v in (levels, each))
    found = descent(shared)
    np.testing.assert_array_equal(found, descent(own))
    assert np.isin(found, levels).all()
    better = descent(shared, start=found)
    assert (shared.cost(better) <= shared.cost(found) * (1 + 1e-6)).all()


def test_weights_with_scales_of_their_own_are_multiples_of_them() -> None:
    """A unit for every weight is the same as the levels that it makes."""
    p = problem(groups=2, k=70, m=4)
    unit = np.random.default_rng(1).uniform(0.3, 1, p.target.shape).astype(np.float32)
    levels = np.arange(-7, 8, dtype=np.float32)[:, None, None, None] * unit
    scaled, listed = Quadratic(p.metric, p.target, p.low, p.high, unit=unit), replace(p, levels=levels)
    found, other = descent(scaled), descent(listed)
    assert_feasible(p, np.rint(found / unit))
    np.testing.assert_allclose(found / unit, np.rint(found / unit), atol=1e-5)
    assert (scaled.cost(found) <= scaled.cost(scaled.nearest())).all()
    assert scaled.cost(found).sum() == pytest.approx(listed.cost(other).sum(), rel=0.02)
