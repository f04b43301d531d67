"""A model that trains what the target computes: where it starts, that nothing else changes, what is refused."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import kquant
from kquant.config.specs import Training
from kquant.errors import CalibrationError, ConfigError, ModelError
from kquant.keras.model import QuantizedModel, extract
from kquant.qat.prepare import prepare_qat
from tests.support import zoo
from tests.support.same import assert_same

OTHERS = ("w8a8-per_tensor", "w8a16")


def small(softmax: bool = False) -> keras.Model:
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(6, 3, use_bias=False, name="conv")(x)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm")(x))
    x = layers.GlobalAveragePooling2D(name="pool")(layers.Conv2D(8, 3, activation="relu", name="conv_2")(x))
    model = keras.Model(inputs, layers.Dense(4, activation="softmax" if softmax else None, name="head")(x))
    zoo.randomize(model)
    return model


def data(samples: int = 48) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(samples, 8, 8, 3)).astype(np.float32)


def prepare(model: keras.Model, calibration: Any = None, config: Any = None, **settings: Any) -> QuantizedModel:
    return prepare_qat(model, calibration, config, training=Training(**settings), progress=False)


# --- where training starts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["w8a8", "w4a4", *(pytest.param(c, marks=pytest.mark.slow) for c in OTHERS)])
def test_training_starts_at_the_quantized_model(config):
    """From float, or from what `quantize_model` makes without correcting biases: the same grids, weights and values."""
    model, x = small(), data()
    quantized = kquant.quantize_model(model, x, {"preset": config, "correct_bias": False}, progress=False)
    expected = quantized(x)
    for prepared in (prepare(model, x, config), prepare(quantized)):
        assert_same(extract(prepared), extract(quantized))
        np.testing.assert_array_equal(prepared(x), expected)
        assert prepared.quantization.config == quantized.quantization.config
        assert prepared.quantization.training.gradient == "lsq"
        assert "conv" in prepared.report


def test_without_data_the_ranges_are_those_of_batch_normalization():
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((8, 8, 3), name="image")
    for k in range(2):
        x = layers.Conv2D(6, 3, name=f"conv_{k}")(x)
        x = layers.ReLU()(layers.BatchNormalization(name=f"norm_{k}")(x))
    model = keras.Model(inputs, layers.BatchNormalization()(layers.Conv2D(2, 4)(x)))
    zoo.randomize(model)
    config = {"preset": "w8a8", "inputs": {"range": [-3, 3]}}
    prepared = prepare(model, None, config)
    uncorrected = kquant.quantize_model(model, None, {**config, "correct_bias": False}, progress=False)
    assert_same(extract(prepared), extract(uncorrected))
    assert np.isfinite(prepared(data(), training=True)).all()


def test_the_arguments_stay_as_they_are():
    model, x = small(), data()
    quantized = kquant.quantize_model(model, x, progress=False)
    before = [[w.copy() for w in m.get_weights()] for m in (model, quantized)]
    record = quantized.record
    for prepared in (prepare(quantized), prepare(model, x)):
        assert not {id(v) for m in (model, quantized) for v in m.variables} & {id(v) for v in prepared.variables}
        for v in prepared.variables:
            v.assign(v + 1)
    for m, values in zip((model, quantized), before, strict=True):
        for a, b in zip(m.get_weights(), values, strict=True):
            np.testing.assert_array_equal(a, b)
    assert quantized.record == record and record.quantization.training is None


def test_everything_that_trains_gets_a_gradient():
    """Of values twice as large as those of the calibration, so that some are beyond every grid."""
    prepared = prepare(small(softmax=True), data(), gradient="lsq+")
    with tf.GradientTape() as tape:
        y = prepared(2 * data(), training=True)
        loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(np.arange(48) % 4, y))
    gradients = tape.gradient(loss, [v.value for v in prepared.trainable_variables])
    names = {v.path.split("/")[-1] for v in prepared.trainable_variables}
    assert names == {"kernel", "bias", "log_scale", "shift"}
    for v, g in zip(prepared.trainable_variables, gradients, strict=True):
        assert g is not None and np.isfinite(g).all() and np.abs(g).max() > 0, v.path


# --- the forward pass of training is the one of inference -------------------------------------------------------------

KINDS = ["mixed_precision", "shared_layer", "unet"]
SLOW_KINDS = sorted(set(zoo.MODELS) - set(KINDS))


def assert_trains_what_it_computes(name: str, config: str) -> None:
    """Nearly all values equal, the rest a rounding apart: what is left of a rounding upstream, in LSBs of the output.

    A final softmax is not rounded in training, and a network that ends in float is compared relative to its range.
    """
    model = zoo.build(name)
    x = zoo.inputs(model)
    prepared = prepare(model, x, config)
    qgraph = extract(prepared)
    outputs = [np.asarray(y) for y in keras.tree.flatten(prepared(_listed(x), training=True))]
    expected = [np.asarray(y) for y in keras.tree.flatten(prepared(_listed(x), training=False))]
    for node, y, z in zip(qgraph.graph.outputs, outputs, expected, strict=True):
        q = qgraph.activations.get(node)
        lsb = float(np.ptp(z)) / 255 if q is None else float(q.scale)
        assert y.shape == z.shape
        off = np.abs(y - z) / lsb
        assert np.max(off) <= 4.0, f"{name} {node}: {np.max(off)} LSB"
        assert np.mean(off) <= 0.5, f"{name} {node}: {np.mean(off)} LSB on average"


def _listed(x: Any) -> Any:
    return list(x.values()) if isinstance(x, dict) else x


@pytest.mark.parametrize("name", KINDS)
def test_training_computes_what_inference_does(name):
    assert_trains_what_it_computes(name, "w8a8")


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_KINDS[::4])
def test_training_computes_what_inference_does_for_more_of_the_zoo(name):
    assert_trains_what_it_computes(name, "w8a8")


def test_training_rounds_every_tensor_as_inference_does_where_nothing_accumulates():
    """A single layer has no rounding upstream: at most one LSB apart, and hardly anywhere."""
    inputs = keras.Input((8, 8, 3), name="image")
    model = keras.Model(inputs, layers.Conv2D(5, 3, activation="relu6")(inputs))
    for config in ("w8a8", "w4a4", "w8a8-per_tensor"):
        prepared = prepare(model, data(), config)
        (q,) = (extract(prepared).activations[n] for n in extract(prepared).graph.outputs)
        off = np.abs(np.asarray(prepared(data(), training=True)) - np.asarray(prepared(data()))) / q.scale
        assert off.max() < 1.01 and np.mean(off > 0.01) < 5e-3


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_prepared_model_is_prepared_already(tmp_path):
    prepared = prepare(small(), data())
    with pytest.raises(ModelError, match=f"'{prepared.name}' is prepared.*fit"):
        prepare(prepared)
    prepared.save(tmp_path / "m.keras")
    with pytest.raises(ModelError, match="is prepared"):
        prepare(keras.saving.load_model(tmp_path / "m.keras"))


def test_a_quantized_model_has_a_config_and_needs_no_data():
    quantized = kquant.quantize_model(small(), data(), progress=False)
    for arguments in ((None, "w4a8"), (data(), None)):
        with pytest.raises(ConfigError, match="quantized already"):
            prepare(quantized, *arguments)


@pytest.mark.parametrize("config", ["a8", {"preset": "w8a8", "target": "simulation"}])
def test_what_no_hardware_computes_is_not_trained(config):
    with pytest.raises(ConfigError, match="simulation.*cannot be deployed"):
        prepare(small(), data(), config)
    with pytest.raises(ConfigError, match="simulation.*cannot be deployed"):
        prepare(kquant.quantize_model(small(), data(), config, progress=False))


@pytest.mark.parametrize(
    "config",
    [
        {"preset": "w8a8", "weights": {"symmetric": False}},
        {"preset": "w8a8", "weights": {"bits": 12}},
        {"preset": "w8a8", "target": "litert_per_tensor"},
        {"preset": "w8a8", "activations": {"per_channel": True}},
    ],
)
def test_what_the_target_cannot_run_is_refused(config):
    with pytest.raises(ConfigError, match="litert"):
        prepare(small(), data(), config)


@pytest.mark.parametrize(
    "settings",
    [{"gradient": "lqs"}, {"rate": 0}, {"rate": float("nan")}, {"batch_norm": "no"}, {"relative_weights": 1}],
)
def test_unknown_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Training(**settings)


def test_calibration_data_that_is_not_finite_is_refused():
    x = data()
    x[3, 2, 1, 0] = np.nan
    with pytest.raises(CalibrationError, match=r"'image' holds NaN"):
        prepare(small(), x)


@pytest.mark.parametrize(("layer", "config"), [("conv_2", "w8a8"), ("head", "w4a4")])
def test_weights_that_are_all_zero_have_no_range_to_learn_from(layer, config):
    model = small()
    kernel, bias = model.get_layer(layer).get_weights()
    model.get_layer(layer).set_weights([np.zeros_like(kernel), bias + 0.3])
    with pytest.raises(ModelError, match=f"(?s){layer}.*all zero"):
        prepare(model, data(), config)
    with pytest.raises(ModelError, match=f"(?s){layer}.*all zero"):
        prepare(kquant.quantize_model(model, data(), config, progress=False))


@pytest.mark.parametrize("config", ["w8a8", "w4a4", "w8a16"])
def test_activations_that_are_all_zero_have_no_range_to_learn_from(config):
    model = small()
    kernel, bias = model.get_layer("conv_2").get_weights()
    model.get_layer("conv_2").set_weights([kernel * 1e-3, bias * 0 - 1.0])  # a relu that never opens
    with pytest.raises(ModelError, match="(?s)'conv_2'.*all zero.*range"):
        prepare(model, data(), config)
    given = {"preset": config, "rules": [{"name": "^(conv_2|pool)$", "activations": {"range": [-1, 1]}}]}
    assert isinstance(prepare(model, data(), given), QuantizedModel)


def test_images_of_0_to_255_have_a_scale_of_1_by_right():
    inputs = keras.Input((4, 4, 1), name="image")
    model = keras.Model(inputs, layers.Conv2D(2, 3, name="conv")(inputs))
    x = np.linspace(0, 255, 64 * 16).reshape(64, 4, 4, 1).astype(np.float32)
    prepared = prepare(model, x)
    assert extract(prepared).activations[extract(prepared).graph.inputs[0]].scale == 1.0


# --- NaN in training --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_batch_with_nan_is_reported_and_changes_no_weight():
    prepared, x = prepare(small(), data(), gradient="lsq+"), data()
    arrays = {"x": x, "y": np.zeros((48, 4), np.float32), "sample_weight": np.ones(48, np.float32)}
    prepared.compile("adam", "mse")
    assert np.isfinite(prepared.fit(**arrays, batch_size=48, verbose=0).history["loss"][0])
    counter = prepared.optimizer.iterations
    state = [v for v in (*prepared.variables, *prepared.optimizer.variables) if v is not counter]
    before = [v.numpy().copy() for v in state]
    assert len(before) > 2 * len(prepared.trainable_variables)  # Adam's moments are among them
    for name, array in arrays.items():
        spoiled = array.copy()
        spoiled.reshape(48, -1)[20, 0] = np.nan
        with pytest.raises(Exception, match="NaN or infinite.*changed no weight.*Look for NaN"):
            prepared.fit(**{**arrays, name: spoiled}, batch_size=48, verbose=0)
        for variable, value in zip(state, before, strict=True):
            np.testing.assert_array_equal(variable, value, err_msg=f"{variable.path} after NaN in {name}")
    assert np.isfinite(prepared.fit(**arrays, batch_size=48, verbose=0).history["loss"][0])
    assert any(not np.array_equal(v, a) for v, a in zip(state, before, strict=True))
