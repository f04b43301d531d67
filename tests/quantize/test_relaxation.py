"""AdaRound's relaxation: its functions, and what the two solvers reach."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from kquant.quantize import relaxation
from kquant.quantize.descent import Quadratic, descent
from kquant.quantize.relaxation import rectified_sigmoid, regularizer, relax_gram, relax_rows


def layer(groups: int = 1, k: int = 16, m: int = 6, n: int = 600, seed: int = 0) -> tuple[Quadratic, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(groups, n, k)) @ (np.eye(k) + 0.5 * rng.normal(size=(groups, k, k)))
    x = (x - x.mean(axis=1, keepdims=True)).astype(np.float32)
    high = np.full((1, 1, 1), 7)
    t = rng.normal(size=(groups, k, m)) * 3
    return Quadratic(x.transpose(0, 2, 1).astype(np.float64) @ x / n, t, -high, high), x


def test_the_rectified_sigmoid_and_the_regularizer() -> None:
    v = tf.constant([-10.0, 0.0, 10.0])
    np.testing.assert_allclose(rectified_sigmoid(v), [0, 0.5, 1])
    np.testing.assert_allclose(regularizer(rectified_sigmoid(v), 2.0), [0, 1, 0])


@pytest.mark.parametrize("beta", [2.0, 20.0])
def test_the_slope_is_the_derivative(beta: float) -> None:
    v = tf.linspace(-2.0, 2.0, 9)
    with tf.GradientTape() as tape:
        tape.watch(v)
        h = rectified_sigmoid(v)
    np.testing.assert_allclose(relaxation._slope(v, h), tape.gradient(h, v), atol=1e-6)


@pytest.mark.parametrize("groups", [1, 3])
def test_gram_lands_on_a_neighbour_and_beats_nearest(groups: int) -> None:
    p, _ = layer(groups)
    u = relax_gram(p, 500)
    inside = (p.target > -7) & (p.target < 7)
    assert np.isin((u - np.floor(p.target))[inside], [0, 1]).all()
    assert (np.abs(u) <= 7).all()
    assert (p.cost(u) <= p.cost(p.nearest())).all()
    assert p.cost(u).sum() < 0.8 * p.cost(p.nearest()).sum()
    assert p.cost(descent(p)).sum() < 1.05 * p.cost(u).sum()


def test_the_regularizer_decides_for_every_weight() -> None:
    p, _ = layer()
    lower, part = relaxation._neighbours(p)
    factor = relaxation._per_nearest(p.cost(p.nearest()), lower.shape[1])
    tensors = (tf.constant(t, tf.float32) for t in (p.metric, lower - p.target, factor, part))
    h = relaxation._anneal_gram(*tensors, tf.constant(2000)).numpy()
    assert np.mean((h > 0.05) & (h < 0.95)) < 0.05


def test_gram_does_not_depend_on_the_scale_of_the_data() -> None:
    p, _ = layer()
    large = Quadratic(p.metric * 1e4, p.target, p.low, p.high)
    assert np.mean(relax_gram(p, 200) != relax_gram(large, 200)) < 0.02


def test_rows_with_an_activation() -> None:
    p, x = layer()
    scale = np.full((1, 1, 1), 0.1)
    y = x @ (p.target * scale).astype(np.float32)
    lo, hi = np.full((1, 1, 6), -0.5), np.full((1, 1, 6), np.inf)
    u = relax_rows(p, scale, (x, y), (lo, hi), iterations=500, batch=64, seed=0)

    def loss(u: np.ndarray) -> np.ndarray:
        return np.square(np.maximum(x @ (u * scale), lo) - np.maximum(y, lo)).mean(axis=1)

    assert (loss(u) <= loss(p.nearest()) * (1 + 1e-5)).all()
    assert loss(u).sum() < 0.9 * loss(p.nearest()).sum()
    np.testing.assert_array_equal(u, relax_rows(p, scale, (x, y), (lo, hi), iterations=500, batch=64, seed=0))
