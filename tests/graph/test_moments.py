"""Moments in closed form against numerical integration and Monte Carlo simulation."""

from __future__ import annotations

from math import erf, exp, pi, sqrt

import numpy as np
import pytest

from kquant.graph.moments import Moments, clipped_normal, joined, regroup, through


@pytest.mark.parametrize("lo, hi", [(0, np.inf), (0, 6), (-1, 1), (-np.inf, 2), (-np.inf, np.inf), (3, 4)])
def test_clipped_normal_equals_numerical_integration(lo, hi):
    rng = np.random.default_rng(0)
    mean, std = rng.normal(0, 4, 300), np.exp(rng.normal(0, 1, 300))
    z = np.linspace(-9, 9, 36001)[:, None]
    weight = np.exp(-z * z / 2) / np.exp(-z * z / 2).sum()
    x = np.clip(mean + std * z, lo, hi)
    expected = (weight * x).sum(0)
    found = clipped_normal(mean, std, lo, hi)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], np.sqrt((weight * (x - expected) ** 2).sum(0)), rtol=1e-4, atol=1e-6)


def test_clipped_normal_agrees_with_monte_carlo_and_caps_by_channel():
    rng = np.random.default_rng(0)
    mean, std, cap = rng.normal(1, 2, 50), rng.uniform(0.1, 3, 50), rng.uniform(0.5, 8, 50)
    x = np.clip(rng.normal(mean, std, (200_000, 50)), 0, cap)
    found = clipped_normal(mean, std, 0, cap)
    np.testing.assert_allclose(found[0], x.mean(0), atol=0.01 * std.max())
    np.testing.assert_allclose(found[1], x.std(0), atol=0.01 * std.max())


def test_relu_is_the_formula_of_the_white_paper():
    beta, gamma = -0.3, 0.7
    density, cdf = exp(-((beta / gamma) ** 2) / 2) / sqrt(2 * pi), 0.5 * (1 + erf(-beta / gamma / sqrt(2)))
    mean, _ = clipped_normal(np.asarray([beta]), np.asarray([gamma]), 0.0, np.inf)
    assert mean[0] == pytest.approx(gamma * density + beta * (1 - cdf), rel=1e-12)


def test_clipped_normal_of_constants_and_extremes():
    mean, std = clipped_normal(np.asarray([-1.0, 2.0, 9.0]), np.zeros(3), 0.0, 6.0)
    assert mean.tolist() == [0, 2, 6] and std.tolist() == [0, 0, 0]
    mean, std = clipped_normal(np.asarray([-1e30, 1e30, 1.0]), np.asarray([1e-20, 1.0, 1e6]), 0.0, 6.0)
    assert mean[0] == 0 and mean[1] == 6 and abs(mean[2] - 3) < 1e-5
    assert std[:2].max() < 1e-5 and abs(std[2] - 3) < 1e-5


def test_a_mixture_has_the_moments_of_its_parts_together():
    rng = np.random.default_rng(0)
    first, second = rng.normal(1, 2, (300, 3)), rng.uniform(-1, 4, (100, 3))
    both = Moments.sample(np.concatenate([first, second]))
    mixed = Moments.mixture([Moments.sample(first), Moments.sample(second)], [0.75, 0.25])
    for found, expected in zip(vars(mixed).values(), vars(both).values(), strict=True):
        np.testing.assert_allclose(found, expected)


def test_channels_that_come_together_and_apart():
    rows = np.random.default_rng(1).normal(size=(50, 6))
    x, merged = Moments.sample(rows), Moments.sample(rows.reshape(-1, 2))
    np.testing.assert_allclose(regroup(x, 2, 4).mean, np.tile(merged.mean, 2))
    np.testing.assert_allclose(regroup(x, 2, 4).std, np.tile(merged.std, 2))
    np.testing.assert_array_equal(joined([x, merged]).high, np.concatenate([x.high, merged.high]))


def test_through_a_linear_function_all_is_exact():
    x = Moments.normal([0.5, -2.0], [1.0, 0.25])
    y = through(lambda v: -3 * v + 1, x)
    np.testing.assert_allclose(y.mean, -3 * x.mean + 1, atol=1e-8)
    np.testing.assert_allclose(y.std, 3 * x.std, rtol=1e-6)
    np.testing.assert_allclose([y.low, y.high], [-3 * x.high + 1, -3 * x.low + 1], rtol=1e-6)
