"""Requantization on tensors against the kernels' formulas in numpy (`arithmetic.py`)."""

import numpy as np
import pytest
import tensorflow as tf

from kquant.targets.litert import arithmetic
from kquant.targets.litert import fixed_point as fixed

# name -> (on tensors, on integers)
FORMULAS = {
    "away": (fixed.double_rounding(True), arithmetic.multiply_double_rounding),
    "up": (fixed.double_rounding(False), arithmetic.multiply_double_rounding_up),
    "single": (fixed.single_rounding, arithmetic.multiply_single_rounding),
    "reduced": (fixed.reduced, arithmetic.multiply_reduced),
}


def both(name, acc, scales):
    """(what the tensor formula makes of the accumulators, what the kernel does)."""
    ours, theirs = FORMULAS[name]
    s_x, s_w, s_y = (np.asarray(s, np.float32) for s in scales)
    real = s_x.astype(np.float64) * s_w.astype(np.float64) / s_y.astype(np.float64)
    found = ours(tf.constant(acc, tf.float64), *map(tf.constant, (s_x, s_w, s_y))).numpy()
    return found, theirs(np.asarray(acc, np.int64), arithmetic.quantize_multiplier(real))


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("low, high", [(1e-9, 1e-5), (1e-4, 1.0), (1.0, 60.0)])  # the last: exponents above 0
def test_integers_are_the_kernels(name, low, high):
    rng = np.random.default_rng(0)
    factor = np.exp(rng.uniform(np.log(low), np.log(high), 16))
    s_x, s_y = np.exp(rng.uniform(-6, 0, 2))
    largest = int(2**23 / max(1.0, high))  # results within what float32 holds; they are clamped to 16 bits anyway
    acc = rng.integers(-largest, largest, (500, 16))
    found, expected = both(name, acc, (s_x, factor * s_y / s_x, s_y))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("shift", [1, 3, 8])
def test_ties(name, shift):
    acc = np.arange(-41, 42, 2) << (shift - 1)  # halves at a factor of 2^-shift
    found, expected = both(name, acc, (2.0**-shift, 1.0, 1.0))
    np.testing.assert_array_equal(found, expected)
    exact = acc / 2.0**shift
    away = np.sign(exact) * np.floor(np.abs(exact) + 0.5)
    # at a factor of 1/2 nothing is left for the second rounding
    is_away = name == "single" or (name == "away" and shift > 1)
    np.testing.assert_array_equal(found, away if is_away else np.floor(exact + 0.5))


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("factor", [2.0**-33, 2.0**-60, 2.0**-100])
def test_a_factor_that_vanishes_gives_zero(name, factor):
    acc = np.array([-(2**24), -1, 0, 1, 2**24])
    found, expected = both(name, acc, (factor, 1.0, 1.0))
    np.testing.assert_array_equal(found, np.zeros(5))
    np.testing.assert_array_equal(expected, np.zeros(5))


def test_double_rounding_by_channel():
    half_away = np.array([True, False])
    acc = tf.constant([[-6.0, -6.0], [6.0, 6.0]])
    found = fixed.double_rounding(half_away)(acc, tf.constant(0.25), tf.constant([1.0, 1.0]), tf.constant(1.0))
    np.testing.assert_array_equal(found, [[-2, -1], [2, 2]])


def test_in_float32_rounds_half_to_even_with_a_float32_factor():
    rng = np.random.default_rng(1)
    s_x, s_w, s_y = (rng.uniform(0.001, 0.2, n).astype(np.float32) for n in ((), 8, ()))
    acc = rng.integers(-(2**20), 2**20, (500, 8)).astype(np.float32)
    found = fixed.in_float32(*map(tf.constant, (acc, s_x, s_w, s_y)))
    np.testing.assert_array_equal(found, np.rint(acc * (s_x * s_w / s_y)))
    ties = fixed.in_float32(tf.constant([-3.0, -1.0, 1.0, 3.0, 5.0]), tf.constant(0.5), tf.constant(1.0), 1.0)
    np.testing.assert_array_equal(ties, [-2, 0, 0, 2, 2])


@pytest.mark.parametrize("name", ["float32", *FORMULAS])
def test_gradients_are_those_of_the_real_product(name):
    requantize = fixed.in_float32 if name == "float32" else FORMULAS[name][0]
    values = [tf.constant(v) for v in (np.float32([-700, 3, 91]), np.float32(0.02), np.float32(0.3), np.float32(0.11))]
    acc, s_x, s_w, s_y = (v.numpy().astype(np.float64) for v in values)
    with tf.GradientTape() as tape:
        tape.watch(values)
        total = tf.reduce_sum(requantize(*values))
    found = tape.gradient(total, values)
    ideal = acc * s_x * s_w / s_y
    expected = [np.full(3, s_x * s_w / s_y), *(ideal.sum() / s for s in (s_x, s_w)), -ideal.sum() / s_y]
    for g, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-5)


def test_multiplier_is_that_of_the_kernels():
    rng = np.random.default_rng(2)
    special = [1.0, 1 - 2.0**-40, 0.5, 2.0**-32, 2.0**-33, 0.75, 2.0**20]
    real = np.concatenate([np.exp(rng.uniform(-24, 12, 1000)), special])
    mantissa, exponent = fixed.multiplier(tf.constant(real))
    expected = arithmetic.quantize_multiplier(real)
    np.testing.assert_array_equal(mantissa, expected.mantissa)
    np.testing.assert_array_equal(exponent, expected.exponent)


def test_bits_and_shifts():
    values = np.array([1, 2, 3, 255, 256, 2**31, 2**40 - 1])
    np.testing.assert_array_equal(fixed.bit_length(tf.constant(values)), [int(v).bit_length() for v in values])
    x, shift = np.arange(-9, 10), np.int64(2)
    np.testing.assert_array_equal(fixed.shift_right(tf.constant(x), tf.constant(shift)), np.floor(x / 4 + 0.5))
    np.testing.assert_array_equal(fixed.shift_right(tf.constant(x), tf.constant(shift * 0)), x)
