"""Layers written in TensorFlow's functions are traced as those of Keras are, and compute what they computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.util import dispatch

import kquant
from kquant.graph.tracing.trace import trace_model
from tests.support.tracing import build, ops, traced

L = keras.layers
RNG = np.random.default_rng(0)
KERNEL, DEEP = RNG.normal(size=(3, 3, 4, 2)).astype(np.float32), RNG.normal(size=(3, 3, 4, 1)).astype(np.float32)
SHAPE = (6, 8, 4)

FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "elementwise": lambda x: tf.nn.relu(x) + tf.constant(2.0) * tf.abs(x) - tf.square(tf.math.tanh(x)),
    "per channel": lambda x: tf.multiply(x, tf.constant([1.0, 2.0, 3.0, 4.0])),
    "clipped": lambda x: tf.minimum(tf.nn.leaky_relu(tf.clip_by_value(x, -0.5, 0.75), 0.3), tf.nn.relu6(x)),
    "softmax": lambda x: tf.nn.softmax(x, axis=-1),
    "means": lambda x: tf.reduce_mean(x, [1, 2]) + tf.reduce_max(x, axis=(1, 2)) + tf.reduce_sum(x, [1, 2]),
    "centred": lambda x: x - tf.reduce_mean(x, -1, keepdims=True),
    "length": lambda x: tf.math.l2_normalize(x, axis=-1),
    "joined": lambda x: tf.concat([x, tf.reverse(x, [1]), tf.roll(x, 1, 2)], axis=-1),
    "stacked": lambda x: tf.stack(tf.unstack(x, axis=1)[::2], axis=1),
    "split": lambda x: tf.split(x, 2, axis=-1)[0] * tf.split(x, [1, 3], axis=3)[0],
    "sliced": lambda x: tf.strided_slice(x, [0, 1, 0, 0], [0, 5, 8, 4], [1, 2, 1, 1], begin_mask=1, end_mask=1),
    "part": lambda x: tf.slice(x, [0, 1, 2, 0], [-1, 3, -1, 2]),
    "taken": lambda x: tf.gather(x, [2, 0], axis=2),
    "padded": lambda x: tf.pad(x, [[0, 0], [1, 2], [0, 1], [0, 0]]),
    "mirrored": lambda x: tf.pad(x, [[0, 0], [1, 1], [2, 0], [0, 0]], mode="REFLECT"),
    "tiled": lambda x: tf.tile(x, [1, 1, 2, 1]),
    "transposed": lambda x: tf.transpose(x, [0, 2, 1, 3]),
    "axes": lambda x: tf.squeeze(tf.expand_dims(x, 1), axis=1),
    "sizes": lambda x: tf.reshape(x, [tf.shape(x)[0], -1, x.shape[-1]]),
    "flat": lambda x: tf.reshape(x, [-1, 48, 4]),
    "to depth": lambda x: tf.nn.space_to_depth(x, 2),
    "to space": lambda x: tf.nn.depth_to_space(x, 2),
    "bilinear": lambda x: tf.image.resize(x, (12, 16)),
    "nearest": lambda x: tf.image.resize(x, (3, 4), method="nearest"),
    "pooled": lambda x: tf.nn.max_pool2d(x, 2, 2, "SAME") + tf.nn.avg_pool2d(x, 2, 2, "VALID"),
    "convolved": lambda x: tf.nn.conv2d(x, KERNEL, 2, "SAME") + tf.constant([0.5, -0.5]),
    "biased": lambda x: tf.nn.bias_add(x, [0.5, -0.5, 1.0, 0.0]),
    "dilated": lambda x: tf.nn.conv2d(x, KERNEL, 1, "VALID", dilations=2),
    "depthwise": lambda x: tf.nn.depthwise_conv2d(x, DEEP, [1, 1, 1, 1], "SAME"),
    "product": lambda x: tf.linalg.matmul(x, tf.constant(KERNEL[0, 0])),
    "attention": lambda x: tf.matmul(tf.nn.softmax(tf.matmul(x, x, transpose_b=True) * 0.5), x),
    "einsum": lambda x: tf.einsum("bijc,bkjc->bikc", x, x),
    "choice": lambda x: tf.where(x > 0.25, x, tf.zeros_like(x)),
    "differences": lambda x: tf.math.squared_difference(x, 0.5) / (1.0 + tf.exp(-x)),
}


class Written(L.Layer):
    """Calls a function of TensorFlow."""

    def __init__(self, function: Callable[[Any], Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.function = function

    def call(self, x: Any) -> Any:
        return self.function(x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_tensorflow(name: str) -> None:
    graph = traced(build(Written(FUNCTIONS[name]), SHAPE))
    assert "float" not in ops(graph)


def test_weights_train_as_those_of_the_users_layer() -> None:
    class Mixed(L.Layer):
        def build(self, shape: Any) -> None:
            self.inner = L.Dense(5)
            self.inner.build(shape)
            self.gain = self.add_weight(shape=(5,), initializer="ones", name="gain")

        def call(self, x: Any) -> Any:
            return tf.nn.relu(tf.add(self.inner(x), 0.5)) * self.gain + self.gain * tf.sigmoid(self.inner(x))

    model = build(Mixed(), (4,))
    qmodel = kquant.prepare_qat(model, RNG.normal(size=(8, 4)).astype(np.float32), "w8a8", progress=False)
    assert "float" not in {s.reason for s in qmodel.quantization.skipped} and not qmodel.quantization.skipped
    assert sum(int(np.prod(v.shape)) for v in qmodel.trainable_variables) >= model.count_params()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + tf.random.normal(tf.shape(x)),
        lambda x: x + keras.random.normal(keras.ops.shape(x)),
        lambda x: x + keras.random.normal((4,)),
        lambda x: x * np.random.default_rng().normal(),
        lambda x: tf.math.cumprod(x, 1),
        lambda x: tf.cond(tf.reduce_sum(x) > 0, lambda: x, lambda: -x),
    ],
)
def test_what_has_no_translation_stays_float(function: Any) -> None:
    model = build(Written(function), SHAPE)
    assert ops(trace_model(model)) == ["float"]


def test_nothing_is_left_behind() -> None:
    before = list(dispatch._GLOBAL_DISPATCHERS)
    traced(build(Written(FUNCTIONS["joined"]), SHAPE))
    assert before == list(dispatch._GLOBAL_DISPATCHERS)
    with pytest.raises(ValueError, match="KerasTensor"):
        tf.nn.relu(keras.Input((3,)))
