"""A layer with a weight that stays in float."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import layers


@keras.saving.register_keras_serializable("tests")
class Odd(layers.Layer):
    """Sums from each step to the last of x @ kernel: [batch, steps, channels]. No translation knows them."""

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], shape[-1]), name="kernel")

    def call(self, x: Any) -> Any:
        return tf.math.cumsum(keras.ops.matmul(x, self.kernel), 1, reverse=True)

    def compute_output_shape(self, shape: Any) -> Any:
        return shape
