"""Normalizations from Keras to the file: integers from end to end, accuracy, and parity."""

import keras
import numpy as np
import pytest
from keras import layers

import kquant

T, C = 8, 48
RNG = np.random.default_rng(0)


def spread(low: float, high: float, samples: int = 64) -> np.ndarray:
    """Rows whose variances spread evenly in logarithms."""
    variance = np.exp(RNG.uniform(np.log(low), np.log(high), (samples, T, 1)))
    return (RNG.normal(size=(samples, T, C)) * np.sqrt(variance)).astype(np.float32)


def model_of(layer) -> keras.Model:
    inputs = keras.Input((T, C), name="x")
    model = keras.Model(inputs, layer(inputs))
    for w in model.weights:
        w.assign(RNG.uniform(0.5, 1.5, w.shape))
    return model


def relative_error(want: np.ndarray, found: np.ndarray) -> float:
    return float(np.sqrt(np.square(want - found).mean() / np.square(want).mean()))


def checked(model, x, config):
    qmodel = kquant.quantize_model(model, x, config, progress=False)
    report = kquant.export_tflite(qmodel, allow_float=False)
    parity = kquant.verify_tflite(qmodel, report.content, x)
    assert parity.ok and parity.reference_max_lsb == 0 and parity.op_by_op_max_lsb <= 1, str(parity)
    return report, model.predict(x, verbose=0), kquant.TFLiteModel(report.content).predict(x)[0]


def test_int16_is_within_half_a_percent_on_variances_from_0_4_to_130():
    x = spread(0.4, 130.0)
    _, want, found = checked(model_of(layers.LayerNormalization(epsilon=1e-6)), x, "w8a16")
    assert relative_error(want, found) < 0.005


LAYERS = {
    "layer": layers.LayerNormalization(),
    "rms": layers.RMSNormalization(),
    "group": layers.GroupNormalization(4),
    "unit": layers.UnitNormalization(),
    "unit over places": layers.UnitNormalization(axis=1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_int8_is_what_eight_bits_allow(name):
    x = spread(0.5, 2.0)
    report, want, found = checked(model_of(LAYERS[name]), x, "w8a8")
    assert relative_error(want, found) < 0.03
    assert "RSQRT" in report.op_counts


def test_a_row_of_zeros_gives_beta():
    x = spread(0.5, 2.0)
    model = model_of(layers.LayerNormalization())
    report, _, _ = checked(model, x, "w8a8")
    found = kquant.TFLiteModel(report.content).predict(np.zeros((1, T, C), np.float32))[0]
    np.testing.assert_allclose(found, np.broadcast_to(model.layers[1].beta, found.shape), atol=0.05)


def test_a_generator_is_read_once():
    x = spread(0.5, 200.0)
    qmodel = kquant.quantize_model(model_of(layers.LayerNormalization()), (v for v in [x]), "w8a8", progress=False)
    (step,) = [s for s in qmodel.quantization.steps if s.name == "normalization"]
    assert "not known" in step.note


@pytest.mark.slow
def test_a_normalization_trains():
    inputs = keras.Input((T, C))
    y = layers.Dense(4)(layers.LayerNormalization()(layers.Dense(C)(inputs)))
    x = spread(0.5, 2.0)
    qat = kquant.prepare_qat(keras.Model(inputs, y), x, "w8a8", progress=False)
    qat.compile(keras.optimizers.Adam(0.01), "mse")
    losses = qat.fit(x, RNG.normal(size=(64, T, 4)), epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert kquant.verify_tflite(qat, kquant.export_tflite(qat).content, x).ok


@pytest.mark.slow
def test_a_normalization_of_what_is_normalized_already() -> None:
    """Its mean is zero but for rounding: the grid of that must be one that kernels can compute."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 8))
    x = layers.LayerNormalization()(layers.LayerNormalization()(layers.Dense(8)(inputs)))
    model = keras.Model(inputs, layers.Dense(3)(x))
    data = np.random.default_rng(0).normal(size=(32, 6, 8)).astype("float32")
    qmodel = kquant.quantize_model(model, data, progress=False)
    parity = kquant.verify_tflite(qmodel, kquant.export_tflite(qmodel).content, data)
    assert parity.ok, parity
    found, expected = qmodel.predict(data, verbose=0), model.predict(data, verbose=0)
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
