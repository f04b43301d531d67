"""Layers that Keras cannot copy: in the quantized model, in the file, and where they stop."""

import os
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L

import kquant
from kquant.errors import ModelError

DATA = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
LOCK = open(os.devnull)  # noqa: SIM115 - nothing that a configuration could hold


class Unwritable(L.Layer):
    """An argument that no configuration holds, a layer inside, a weight, and no registration."""

    def __init__(self, function: Any, **kwargs: Any):
        super().__init__(**kwargs)
        self.function, self.inner = function, L.Dense(3)

    def build(self, shape: Any) -> None:
        self.inner.build(shape)
        self.factor = self.add_weight(shape=(3,), initializer="random_normal")
        self.built = True

    def call(self, x: Any) -> Any:
        return tf.math.cumsum(self.inner(x), 1, reverse=True) * self.factor + self.function(x)[..., :3]


class Forgetful(L.Layer):
    """Its configuration leaves a setting out."""

    def __init__(self, factor: float = 1.0, **kwargs: Any):
        super().__init__(**kwargs)
        self.factor = factor

    def call(self, x: Any) -> Any:
        return tf.math.cumsum(x, 1, reverse=True) * self.factor

    def get_config(self) -> dict[str, Any]:
        return L.Layer.get_config(self)


def unwritable() -> L.Layer:
    return Unwritable(lambda t: t if LOCK.closed else t * 2, name="odd")


def forgetful() -> L.Layer:
    return Forgetful(3.0, name="odd")


def chain(layer: L.Layer) -> keras.Model:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    return keras.Model(inputs, L.Dense(2)(layer(L.Dense(4)(inputs))))


def calls(model: keras.Model) -> list[tuple[int, int]]:
    return [(len(layer._inbound_nodes), len(layer._outbound_nodes)) for layer in model._flatten_layers()]


@pytest.mark.parametrize("make", [unwritable, forgetful])
def test_the_file_computes_what_the_model_does_and_the_users_layer_shows_no_trace(make: Any) -> None:
    model = chain(make())
    before, expected = calls(model), model.predict(DATA, verbose=0)
    qmodel = kquant.quantize_model(model, DATA, progress=False)
    report = kquant.export_tflite(qmodel)
    parity = kquant.verify_tflite(qmodel, report.content, DATA)
    assert parity.ok, parity
    assert [name for name, _ in report.float_ops] == ["odd"]
    found = kquant.TFLiteModel(report.content).predict(DATA)[0]
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()
    assert calls(model) == before


def test_the_quantized_model_keeps_the_weights_of_its_time() -> None:
    model = chain(unwritable())
    qmodel = kquant.quantize_model(model, DATA, progress=False)
    before = qmodel.predict(DATA, verbose=0)
    model.get_layer("odd").factor.assign([9.0, 9.0, 9.0])
    np.testing.assert_array_equal(qmodel.predict(DATA, verbose=0), before)


@pytest.mark.parametrize("make", [unwritable, forgetful])
def test_saving_and_training_name_the_layer(make: Any, tmp_path: Any) -> None:
    model = chain(make())
    qmodel = kquant.quantize_model(model, DATA, progress=False)
    with pytest.raises(ModelError, match=r"'odd' \(\w+ful|'odd' \(Unwritable.*get_config"):
        qmodel.save(tmp_path / "model.keras")
    with pytest.raises(ModelError, match=r"'odd'.*get_config"):
        kquant.prepare_qat(model, DATA, progress=False)
    with pytest.raises(ModelError, match=r"'odd'.*get_config"):
        kquant.prepare_qat(qmodel, progress=False)
