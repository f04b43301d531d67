"""Custom layers that compute with the size of the batch: tokens and positions that are the same in all samples."""

from typing import Any

import keras
import numpy as np
from keras import layers as L
from keras import ops

import kquant

DATA = np.random.default_rng(0).normal(size=(32, 6, 4)).astype("float32")


class Tokens(L.Layer):
    """A class token in front of the entries, and a position added to each, broadcast to the batch."""

    def build(self, shape: Any) -> None:
        self.token = self.add_weight(shape=(1, 1, shape[-1]), initializer="random_normal")
        self.positions = self.add_weight(shape=(1, shape[1] + 1, shape[-1]), initializer="random_normal")

    def call(self, x: Any) -> Any:
        batch = ops.shape(x)[0]
        x = ops.concatenate([ops.broadcast_to(self.token, (batch, 1, x.shape[-1])), x], 1)
        return x + ops.broadcast_to(self.positions, (batch, *x.shape[1:]))


class Halves(L.Layer):
    """A reshape that loses a size while the batch is open."""

    def call(self, x: Any) -> Any:
        batch, _, width = ops.shape(x)
        return ops.reshape(ops.reshape(x, (batch, -1, 2, width)), (batch, -1, 2 * width))

    def compute_output_shape(self, shape: Any) -> Any:
        return (shape[0], shape[1] // 2, 2 * shape[2])


def test_tokens_and_lost_sizes_run_in_integers() -> None:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 4))
    x = Tokens()(Halves()(L.Dense(4)(inputs)))
    model = keras.Model(inputs, L.Dense(3)(x))
    qmodel = kquant.quantize_model(model, DATA, progress=False)
    report = kquant.export_tflite(qmodel, allow_float=False)
    expected = model.predict(DATA, verbose=0)
    found = kquant.TFLiteModel(report.content).predict(DATA)[0]
    np.testing.assert_array_equal(found, qmodel.predict(DATA, verbose=0))
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    shuffled = DATA[::-1].copy()  # whatever the batch is
    np.testing.assert_array_equal(kquant.TFLiteModel(report.content).predict(shuffled, batch_size=5)[0], found[::-1])
