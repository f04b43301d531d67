"""AdaRound's continuous relaxation: learn whether each weight is rounded down or up (white paper, eq. 32-35).

With floor(t) the lower neighbour of a weight in steps of its grid, the integer is u = floor(t) + h(V), where

    h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)                                     (eq. 33)
    loss + lambda sum_ij 1 - |2 h(V_ij) - 1|^beta                                            (eq. 32, 34)

Adam minimizes the sum; the regularizer, which drives h to 0 or 1, starts after a fifth of the iterations, and beta
falls from 20 to 2. Loops are compiled and their gradients derived by hand. Every column's loss is divided by that of
its nearest integers, times the number of its weights, so that lambda does not depend on the scale of the data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.quantize.descent import Quadratic

Array = np.ndarray[Any, Any]
Tensor = Any
ZETA, GAMMA = 1.1, -0.1
WARM_UP = 0.2  # part of the iterations without the regularizer
BETA = (20.0, 2.0)
RATE = 0.02
REGULARIZATION = 3.0  # beside a loss of about 1 per weight: less leaves weights undecided (the paper's is absolute)
_UNLIMITED = 3.0e38


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V), eq. 33."""
    return tf.clip_by_value(tf.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def regularizer(h: Tensor, beta: Tensor) -> Tensor:
    """1 - |2 h - 1|^beta for every weight, eq. 34."""
    return 1.0 - tf.pow(tf.abs(2 * h - 1), beta)


def _slope(v: Tensor, h: Tensor) -> Tensor:
    """d h / d V."""
    s = tf.sigmoid(v)
    return tf.where((h > 0) & (h < 1), s * (1 - s) * (ZETA - GAMMA), 0.0)


def _anneal(gradient: Callable[[Tensor, Tensor], Tensor], part: Tensor, iterations: Tensor) -> Tensor:
    """h after Adam.

    Args:
        gradient: (h, number of the iteration) -> d loss / d h.
        part: h at the start, in [0, 1].
        iterations: how many, int32.
    """
    v = -tf.math.log((ZETA - GAMMA) / (part - GAMMA) - 1)
    total = tf.cast(iterations, tf.float32)

    def step(i: Tensor, v: Tensor, mean: Tensor, square: Tensor) -> tuple[Tensor, ...]:
        h, now = rectified_sigmoid(v), tf.cast(i, tf.float32)
        progress = tf.maximum(0.0, (now / total - WARM_UP) / (1 - WARM_UP))
        beta = BETA[1] + (BETA[0] - BETA[1]) * (1 - progress)
        signed = 2 * h - 1
        pull = -2 * beta * tf.pow(tf.abs(signed), beta - 1) * tf.sign(signed)
        pull = tf.where(progress > 0, REGULARIZATION * pull, 0.0)
        g = (gradient(h, i) + pull) * _slope(v, h)
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * tf.square(g)
        corrected = mean / (1 - tf.pow(0.9, now + 1))
        v -= RATE * corrected / (tf.sqrt(square / (1 - tf.pow(0.999, now + 1))) + 1e-8)
        return i + 1, v, mean, square

    zeros = tf.zeros_like(v)
    state = tf.while_loop(lambda i, *_: i < iterations, step, (tf.constant(0), v, zeros, zeros))
    return rectified_sigmoid(state[1])


def _neighbours(problem: Quadratic) -> tuple[Array, Array]:
    """The lower neighbours on the grid, and how far above them (0 to 1) the weights are."""
    lower = np.clip(np.floor(problem.target), problem.low, problem.high - 1)
    return lower, np.clip(problem.target - lower, 0, 1)


def _per_nearest(loss: Array, weights: int) -> Array:
    """The factor that divides a loss by that of the nearest integers."""
    return weights / np.maximum(loss, 1e-12 * max(float(loss.max()), 1e-30))


@tf.function(jit_compile=True)
def _anneal_gram(metric: Tensor, offset: Tensor, factor: Tensor, part: Tensor, iterations: Tensor) -> Tensor:
    return _anneal(lambda h, i: 2 * factor * tf.matmul(metric, h + offset), part, iterations)


def relax_gram(problem: Quadratic, iterations: int) -> Array:
    """The relaxation on the quadratic form; the data is not touched.

    Returns:
        Integers as float32 [groups, k, m]; no column costs more than its nearest integers.
    """
    lower, part = _neighbours(problem)
    nearest = problem.nearest()
    factor = _per_nearest(problem.cost(nearest), lower.shape[1])
    tensors = [tf.constant(t, tf.float32) for t in (problem.metric, lower - problem.target, factor, part)]
    up = _anneal_gram(*tensors, tf.constant(iterations)).numpy() >= 0.5
    return problem.better(nearest, problem.held(lower + up)).astype(np.float32)


def _clipped(y: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    return tf.minimum(tf.maximum(y, lo), hi)


@tf.function
def _anneal_rows(
    x: Tensor,
    y: Tensor,
    limits: tuple[Tensor, Tensor],
    base: tuple[Tensor, Tensor, Tensor],
    part: Tensor,
    iterations: Tensor,
    batch: Tensor,
    seed: Tensor,
) -> Tensor:
    scale, lower, factor = base
    lo, hi = limits

    def gradient(h: Tensor, i: Tensor) -> Tensor:
        where = tf.random.stateless_uniform([batch], tf.stack([seed, i]), 0, tf.shape(x)[1], tf.int32)
        rows, wanted = tf.gather(x, where, axis=1), tf.gather(y, where, axis=1)
        found = tf.matmul(rows, (lower + h) * scale)
        error = tf.where((found > lo) & (found < hi), _clipped(found, lo, hi) - _clipped(wanted, lo, hi), 0.0)
        return 2 * factor * scale * tf.matmul(rows, error, transpose_a=True) / tf.cast(batch, tf.float32)

    return _anneal(gradient, part, iterations)


def relax_rows(
    problem: Quadratic,
    scale: Array,
    rows: tuple[Array, Array],
    limits: tuple[Array, Array],
    *,
    iterations: int,
    batch: int,
    seed: int,
) -> Array:
    """The relaxation by stochastic gradients, with the activation in the loss (eq. 35).

    Args:
        problem: grid and weights; its metric is not used.
        scale: of the grid, broadcasts against the weights [groups, k, m].
        rows: x^ - E x^ [groups, n, k] and y - E y [groups, n, m], y the float layer's output before its activation.
        limits: the activation's clip (lo, hi), less E y; broadcast against y, infinite where there is none.
        iterations: how many.
        batch: rows of a minibatch.
        seed: of their draw.

    Returns:
        Integers as float32 [groups, k, m]; no column has a larger error on all rows than its nearest integers.
    """
    lower, part = _neighbours(problem)
    x, y = (tf.constant(t, tf.float32) for t in rows)
    lo, hi = (tf.constant(np.clip(t, -_UNLIMITED, _UNLIMITED), tf.float32) for t in limits)
    steps = tf.constant(scale, tf.float32)

    def loss(u: Array) -> Array:
        error = _clipped(tf.matmul(x, tf.constant(u, tf.float32) * steps), lo, hi) - _clipped(y, lo, hi)
        return tf.reduce_mean(tf.square(error), axis=1, keepdims=True).numpy().astype(np.float64)

    nearest = problem.nearest()
    nearest_loss = loss(nearest)
    factor = _per_nearest(nearest_loss, lower.shape[1])
    base = (steps, *(tf.constant(t, tf.float32) for t in (lower, factor)))
    counts = (tf.constant(t, tf.int32) for t in (iterations, batch, seed))
    up = _anneal_rows(x, y, (lo, hi), base, tf.constant(part, tf.float32), *counts).numpy() >= 0.5
    found = problem.held(lower + up)
    return np.where(loss(found) <= nearest_loss, found, nearest).astype(np.float32)
