"""Kinds of models that users have, from the float model to the file and back (see `zoo`)."""

from __future__ import annotations

import itertools
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kquant
from kquant.targets.litert.runtime import TFLiteModel
from tests.support import zoo

SLOW = {  # graphs of many nodes
    *("lstm", "gru", "bidirectional", "transformer", "vision_transformer", "normalizations"),
    *("activations", "operations", "separable_1d", "preactivation", "composite_layer", "text_average", "unet"),
}
FAST = ("w4a8", "w8a16", "w4a4")
CONFIGS: dict[str, Any] = {
    "w8a8": "w8a8",
    "w8a8-per_tensor": "w8a8-per_tensor",
    "w4a8": "w4a8",
    "w4a4": "w4a4",
    "w2a8": "w2a8",
    "w8a16": "w8a16",
    "w4a16": "w4a16",
    "power_of_two": {
        "preset": "w8a8",
        "weights": {"power_of_two": True},
        "activations": {"symmetric": True, "power_of_two": True},
    },
    "symmetric": {"preset": "w8a8", "activations": {"symmetric": True}},
    "mse": {"preset": "w8a8", "activations": {"method": "mse"}},
    "percentile": {"preset": "w8a8", "activations": {"method": "percentile", "percentile": 99.9}},
}
KINDS = [pytest.param(k, marks=[pytest.mark.slow] * (k in SLOW)) for k in zoo.MODELS]


def quantized(name: str, config: Any = "w8a8") -> tuple[keras.Model, keras.Model]:
    """(float model, quantized model)."""
    model = zoo.build(name)
    return model, kquant.quantize_model(model, zoo.inputs(model), config, progress=False)


def check(name: str, config: Any) -> kquant.ExportReport:
    """Parity of the file, and equality of the simulation with the default kernels; what was exported."""
    model, qmodel = quantized(name, config)
    exported = kquant.export_tflite(qmodel)
    report = kquant.verify_tflite(qmodel, exported.content, zoo.inputs(model, seed=2))
    assert report.ok, f"{name}\n{report}"
    assert all(e.equal == 1 or e.max_lsb <= 1 and e.equal > 0.99 for e in report.end_to_end), f"{name}\n{report}"
    return exported


def arrays(model: keras.Model, data: Any) -> list[np.ndarray]:
    """The data in the order of the model's inputs."""
    if isinstance(data, dict):
        return [data[t.name] for t in model.inputs]
    return data if isinstance(data, list) else [data]


@pytest.mark.parametrize("name", KINDS)
def test_the_file_of_every_kind_of_model_equals_its_simulation_and_has_no_float(name):
    assert check(name, "w8a8").float_ops == ()


@pytest.mark.slow
def test_what_stays_float_is_counted_and_reported():
    frames = keras.Input((4, 5, 3))
    x = layers.Flatten()(layers.ConvLSTM1D(2, 1, name="rain")(frames))
    data = np.random.default_rng(0).normal(size=(8, 4, 5, 3)).astype(np.float32)
    report = kquant.export_tflite(kquant.quantize_model(keras.Model(frames, layers.Dense(2)(x)), data, progress=False))
    assert [node for node, _ in report.float_ops][0] == "rain"
    assert all(node in str(report) and reason for node, reason in report.float_ops)


@pytest.mark.parametrize(
    "config", [pytest.param(c, marks=[pytest.mark.slow] * (c not in FAST)) for c in CONFIGS if c != "w8a8"]
)
def test_every_config_has_parity(config):
    check("preactivation", CONFIGS[config])


PAIRS = list(zip([k for k in zoo.MODELS if k not in SLOW], itertools.cycle(CONFIGS)))  # noqa: B905


@pytest.mark.slow
@pytest.mark.parametrize(("name", "config"), PAIRS)
def test_every_kind_has_parity_under_some_config(name, config):
    check(name, CONFIGS[config])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(zoo.APPLICATIONS))
def test_keras_applications(name):
    check(name, "w8a8")


@pytest.mark.parametrize("name", ["dict_inputs_and_outputs", "shared_submodel", "output_read_inside"])
def test_a_saved_model_computes_and_exports_the_same(name, tmp_path):
    model, qmodel = quantized(name)
    qmodel.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    feed = arrays(model, zoo.inputs(model))
    feed = feed[0] if len(feed) == 1 else feed
    for a, b in zip(keras.tree.flatten(qmodel(feed)), keras.tree.flatten(loaded(feed)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert kquant.export_tflite(loaded).content == kquant.export_tflite(qmodel).content


@pytest.mark.parametrize(("mode", "tolerance"), [("float32", 1e-5), ("float16", 0.01), ("dynamic_range", 0.1)])
@pytest.mark.parametrize("name", ["text_cnn", "detector"])
def test_files_with_float_activations_compute_the_float_model(name, mode, tolerance):
    model, qmodel = quantized(name, {"correct_bias": False})  # weights as they are, and not as they round
    data = zoo.inputs(model, seed=2)
    found = TFLiteModel(kquant.export_tflite(qmodel, mode=mode).content).predict(arrays(model, data))
    for ours, expected in zip(found, keras.tree.flatten(model(data)), strict=True):
        np.testing.assert_allclose(ours, expected, atol=tolerance * np.max(np.abs(expected)))


@pytest.mark.parametrize("kind", ["int8", "uint8", "float32"])
def test_input_and_output_types_change_no_value(kind):
    model, qmodel = quantized("detector")
    data = arrays(model, zoo.inputs(model, seed=2))
    expected = TFLiteModel(kquant.export_tflite(qmodel).content).predict(data)
    content = kquant.export_tflite(qmodel, input_type=kind, output_type=kind).content
    for ours, wanted in zip(TFLiteModel(content).predict(data), expected, strict=True):
        np.testing.assert_allclose(ours, wanted, atol=1e-6)


@pytest.mark.parametrize(
    "rule",
    [
        {"name": "^block_1$", "float": True},
        {"layer_type": "Conv2D", "float": True},
        {"layer_type": "Dense", "activations": {"bits": 16}},
        {"name": "^block_1$", "activations": {"bits": 16}},
        {"position": "first", "weights": {"bits": 4}},
    ],
)
def test_rules_for_single_layers_have_parity(rule):
    x = inputs = keras.Input((8, 8, 3))
    for k in range(3):
        x = layers.Conv2D(4, 3, padding="same", activation="relu", name=f"block_{k}")(x)
    model = keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))
    data = zoo.inputs(model)
    qmodel = kquant.quantize_model(model, data, {"preset": "w8a8", "rules": [rule]}, progress=False)
    report = kquant.verify_tflite(qmodel, kquant.export_tflite(qmodel).content, data)
    assert report.ok and report.end_to_end[0].equal == 1, str(report)


def test_mean_and_average_do_not_depend_on_the_execution_mode():
    """TensorFlow's graph optimizer rewrites divisions by constants: the simulation must not care."""
    x = inputs = keras.Input((9, 9, 3))
    x = layers.AveragePooling2D(3, 1, padding="same")(layers.AveragePooling2D(2, 1)(x))
    model = keras.Model(inputs, layers.GlobalAveragePooling2D()(x))
    data = zoo.inputs(model)
    qmodel = kquant.quantize_model(model, data, progress=False)
    eager = np.asarray(qmodel(data))
    np.testing.assert_array_equal(qmodel.predict(data, verbose=0), eager)
    np.testing.assert_array_equal(TFLiteModel(kquant.export_tflite(qmodel).content).predict([data])[0], eager)


def test_a_registered_layer_runs_in_integers():
    import tensorflow as tf

    class Gate(layers.Layer):
        """Its call cannot be traced into operations that kquant knows."""

        def call(self, x):
            return tf.raw_ops.Relu(features=x) * 0.5

    @kquant.register_layer(Gate)
    def lower_gate(layer, x):
        return keras.ops.relu(x) * 0.5

    x = inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, zoo.classifier(Gate()(layers.Conv2D(4, 3)(x))))
    data = zoo.inputs(model)
    qmodel = kquant.quantize_model(model, data, progress=False)
    report = kquant.export_tflite(qmodel, allow_float=False)
    assert kquant.verify_tflite(qmodel, report.content, data).ok


def test_an_unknown_spatial_size_without_data_says_what_to_do():
    inputs = keras.Input((None, None, 3), name="image")
    model = keras.Model(inputs, layers.Conv2D(2, 3)(inputs))
    with pytest.raises(kquant.ModelError, match="image.*input_shape="):
        kquant.quantize_model(model, progress=False)


def test_a_layer_that_tflite_does_not_have_is_named_at_export():
    x = keras.Input((8, 8), name="waves")
    model = keras.Model(x, layers.Lambda(lambda t: keras.ops.irfft((t, t)), name="spectrum")(layers.Dense(8)(x)))
    qmodel = kquant.quantize_model(model, np.ones((4, 8, 8), np.float32), progress=False)
    with pytest.raises(kquant.ExportError, match="spectrum"):
        kquant.export_tflite(qmodel)
