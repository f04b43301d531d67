"""Seeded random models of what compares, chooses and counts, and of layers written in TensorFlow.

A choice jumps where a number meets a bound, so that such a model may differ from the float one by much in a few
entries.
"""

from __future__ import annotations

import keras
import tensorflow as tf
from keras import layers, ops

from tests.support.drawer import Drawer, Step, Tensor

SHAPE = (6, 5, 4)


def _choice(d: Drawer, x: Tensor) -> Tensor:
    """Truth values: compared, joined, counted, and choosing; also by constants."""
    axis, bound, fixed = d.pick(1, 2, 3), d.pick(0.0, 0.2, -0.1), d.rng.random((1, *x.shape[1:])) > 0.3
    places = d.rng.integers(0, x.shape[axis], (1, *x.shape[1:]))
    return d.pick(
        lambda t: ops.where(ops.logical_and(t > bound, ops.flip(t, axis) > bound), t, 0.5 * t),
        lambda t: t * ops.cast(ops.logical_or(t < bound, ops.roll(t, 1, axis) < bound), "float32"),
        lambda t: t + ops.where(ops.all(t > -1.0, axis, keepdims=True), 0.5, -0.25),
        lambda t: ops.where(ops.any(t > 0.5, axis, keepdims=True), t, ops.zeros_like(t)),
        lambda t: t - ops.cast(ops.equal(ops.relu(t), 0.0), "float32"),
        lambda t: t + ops.cast(ops.not_equal(ops.logical_not(t > bound), 0), "float32"),
        lambda t: ops.where(fixed, t, d.pick(0.0, 0.25)),
        lambda t: ops.where(fixed, ops.flip(t, axis), t),
        lambda t: ops.take_along_axis(t, places, axis),
        lambda t: ops.softmax(ops.where(fixed, t, -1e9), axis) + 0.1 * t,
    )(x)


def _written(d: Drawer, x: Tensor) -> Tensor:
    """A layer written in TensorFlow."""
    axis, method, factor = d.pick(1, 2, 3), d.pick("bilinear", "nearest"), d.pick(1.0, 0.5)
    kernel = d.rng.normal(0, 0.4, (3, 3, x.shape[-1], d.size(2, 4))).astype("float32")
    deep = d.rng.normal(0, 0.6, (2, 2, x.shape[-1], 1)).astype("float32")
    function = d.pick(
        lambda t: tf.nn.relu6(tf.nn.conv2d(t, kernel, 1, "SAME")),
        lambda t: tf.nn.depthwise_conv2d(t, deep, [1, 1, 1, 1], "SAME") + factor,
        lambda t: tf.concat([t, tf.reverse(t, [axis])], -1) if t.shape[-1] < 9 else tf.abs(t),
        lambda t: tf.reduce_max(t, axis, keepdims=True) - t,
        lambda t: tf.reshape(tf.transpose(tf.reshape(t, [tf.shape(t)[0], -1, t.shape[-1]]), [0, 2, 1]), tf.shape(t)),
        lambda t: tf.image.resize(t, (5, 4), method=method),
        lambda t: tf.nn.avg_pool2d(t, 2, 1, "SAME") + tf.where(t > 0.1, t, tf.zeros_like(t)),
        lambda t: tf.nn.swish(t) * factor - tf.math.softplus(t),
        lambda t: tf.pad(t, [[0, 0], [1, 0], [0, 1], [0, 0]]) if max(t.shape[1:3]) < 9 else tf.nn.relu(t),
        lambda t: tf.matmul(t, t, transpose_b=True) if t.shape[2] < 9 else tf.math.squared_difference(t, factor),
    )
    return layers.Lambda(function)(x)


def _mixed(d: Drawer, x: Tensor) -> Tensor:
    """A convolution, so that what follows has other numbers."""
    return layers.Conv2D(4, d.pick(1, 3), padding="same", activation=d.pick(None, "relu", "tanh"))(x)


STEPS: tuple[Step, ...] = (_choice, _choice, _written, _written, _mixed)


def random_choices(seed: int) -> keras.Model:
    """A model of 2 to 4 such steps behind a convolution, with random weights."""
    keras.utils.set_random_seed(seed)
    d = Drawer(seed)
    inputs = keras.Input(SHAPE)
    x = layers.Conv2D(4, 1, kernel_initializer="random_normal")(inputs)
    for _ in range(d.size(2, 4)):
        x = d.pick(*STEPS)(d, x)
    model = keras.Model(inputs, x, name=f"choices_{seed}")
    for weight in model.weights:
        weight.assign(d.rng.uniform(-0.6, 0.6, weight.shape))
    return model
