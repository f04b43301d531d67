"""Tensors that 8 bits destroy get 16 by themselves, where that costs little; said, and off by a setting."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
from keras import layers

import kquant
from kquant.keras.damage import sqnr

DATA = np.random.default_rng(5).normal(size=(24, 8, 8, 3)).astype(np.float32)


def beside_larger_values() -> keras.Model:
    """Scores that are in one tensor with boxes in pixels inside the model, and are all that it returns."""
    keras.utils.set_random_seed(5)
    image = keras.Input((8, 8, 3))
    x = layers.Reshape((36, 8))(layers.Conv2D(8, 3, activation="relu")(image))
    boxes = 640.0 * layers.Dense(4, activation="sigmoid", name="boxes")(x)
    joined = layers.Concatenate(name="joined")([boxes, layers.Dense(3, activation="sigmoid", name="scores")(x)])
    return keras.Model(image, layers.Dense(2, name="head")(joined[..., 4:]))


def with_outliers() -> keras.Model:
    """One channel of the only layer with weights that is thousands of times as large as the others."""
    keras.utils.set_random_seed(5)
    image = keras.Input((8, 8, 3))
    layer = layers.Conv2D(4, 3, name="wide")
    model = keras.Model(image, layers.Conv2D(2, 3, name="head")(layer(image)[..., 1:]))
    layer.kernel.assign(np.asarray(layer.kernel) * np.array([5000.0, 1, 1, 1]))
    return model


@pytest.mark.slow
def test_a_joined_tensor_gets_16_bits_and_the_file_holds_it() -> None:
    model = beside_larger_values()
    with pytest.warns(kquant.QuantizationWarning, match=r"have 16 now: .*'joined' .* dB in 8 bits"):
        qmodel = kquant.quantize_model(model, DATA, progress=False)
    assert not qmodel.quantization.damage and "widen" in qmodel.report and "0 % of the multiplications" in qmodel.report
    content = kquant.export_tflite(qmodel).content
    assert kquant.verify_tflite(qmodel, content, DATA).ok
    assert sqnr(model.predict(DATA, verbose=0), kquant.TFLiteModel(content).predict(DATA)[0]) > 25
    assert qmodel.quantization.taken["widen"]


def test_a_setting_leaves_8_bits_and_reports_the_damage() -> None:
    with pytest.warns(kquant.QuantizationWarning, match="Quantization destroys"):
        qmodel = kquant.quantize_model(beside_larger_values(), DATA, {"preset": "w8a8", "widen": False}, progress=False)
    assert qmodel.quantization.damage and "widen" not in qmodel.quantization.taken


def test_a_layer_with_most_of_the_weights_is_not_slowed_down() -> None:
    with pytest.warns(kquant.QuantizationWarning, match="Quantization destroys"):
        qmodel = kquant.quantize_model(with_outliers(), DATA, progress=False)
    assert "widen" not in qmodel.quantization.taken and any(d.widen for d in qmodel.quantization.damage)


def test_few_bits_that_were_asked_for_stay() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kquant.QuantizationWarning)
        qmodel = kquant.quantize_model(beside_larger_values(), DATA, "w4a4", progress=False)
    assert "widen" not in qmodel.quantization.taken
