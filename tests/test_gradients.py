"""Values of the computed, gradients of the ideal."""

import numpy as np
import pytest
import tensorflow as tf

from kquant.gradients import exact, round_ste

RUNS = {
    "eager": lambda f: f,
    "graph": tf.function,
    "xla": lambda f: tf.function(f, jit_compile=True),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_round_ste_rounds_half_to_even_and_passes_gradients(run):
    x = tf.constant([-2.5, -1.5, -0.5, 0.5, 1.5, 2.4])
    weight = tf.constant([1.0, -2.0, 3.0, 4.0, 5.0, -6.0])

    def value_and_gradient(v):
        with tf.GradientTape() as tape:
            tape.watch(v)
            y = round_ste(v)
        return y, tape.gradient(y, v, weight)

    y, gradient = run(value_and_gradient)(x)
    np.testing.assert_array_equal(y, [-2, -2, 0, 0, 2, 2])
    np.testing.assert_array_equal(gradient, weight)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_exact_has_the_value_of_one_and_the_gradient_of_the_other(run):
    x = tf.constant([-2.0, 0.3, 1.7])

    def value_and_gradient(v):
        with tf.GradientTape() as tape:
            tape.watch(v)
            y = exact(v**2, tf.floor(v) * 100.0 * v)  # the computed has a gradient of its own, which must not count
        return y, tape.gradient(y, v)

    y, gradient = run(value_and_gradient)(x)
    np.testing.assert_allclose(y, np.floor(x) * 100 * x)
    np.testing.assert_allclose(gradient, 2 * x)


def test_gradients_of_exact_chain():
    x = tf.constant(3.0)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = exact(5.0 * round_ste(2.0 * x), tf.constant(-1.0)) * 7.0
    assert (float(y), float(tape.gradient(y, x))) == (-7.0, 70.0)
