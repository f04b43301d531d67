"""What a user can do wrong: each a clear error, or a documented and reported behaviour."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

import kquant


def small(units: int = 3) -> keras.Model:
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((6, 6, 2), name="image")
    x = layers.Conv2D(4, 3, activation="relu", name="conv")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(units, name="fc")(x))


def images(samples: int = 8) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(samples, 6, 6, 2)).astype(np.float32)


def quantize(model, data=None, config="w8a8"):
    return kquant.quantize_model(model, images() if data is None else data, config, progress=False)


def poisoned(value: float) -> keras.Model:
    model = small()
    kernel = model.get_layer("conv").kernel
    array = kernel.numpy()
    array[0, 0, 0, 0] = value
    kernel.assign(array)
    return model


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_layer(value):
    with pytest.raises(kquant.ModelError, match="conv"):
        quantize(poisoned(value))


def test_an_all_zero_channel_and_an_all_zero_layer_stay_exact():
    model = small()
    kernel, bias = model.get_layer("conv").get_weights()
    kernel[..., 1], bias[1] = 0, 0.7
    model.get_layer("conv").set_weights([kernel, bias])
    model.get_layer("fc").set_weights([np.zeros((4, 3), np.float32), np.float32([1, -2, 3])])
    qmodel = quantize(model)
    np.testing.assert_allclose(np.asarray(qmodel(images())), np.asarray(model(images())), atol=0.02)
    assert kquant.verify_tflite(qmodel, kquant.export_tflite(qmodel).content, images()).ok


def test_a_constant_activation_quantizes():
    model = small()
    model.get_layer("conv").set_weights([np.zeros((3, 3, 2, 4), np.float32), np.float32([0.5] * 4)])
    qmodel = quantize(model)
    np.testing.assert_allclose(np.asarray(qmodel(images())), np.asarray(model(images())), atol=0.02)
    assert kquant.verify_tflite(qmodel, kquant.export_tflite(qmodel).content, images()).ok


def test_activations_that_are_always_zero_quantize():
    model = small()
    model.get_layer("conv").set_weights([np.zeros((3, 3, 2, 4), np.float32), np.float32([-0.5] * 4)])
    qmodel = quantize(model)
    assert kquant.verify_tflite(qmodel, kquant.export_tflite(qmodel).content, images()).ok


# --- the same at presets that take post-training steps: equalization and bias correction, AdaRound -----------------

STEPS = pytest.mark.parametrize("config", ["w8a8-per_tensor", "w4a8"])
NEAR = {"w8a8-per_tensor": 0.03, "w4a8": 0.3}


def assert_near_and_exported(model: keras.Model, data: np.ndarray, config: str) -> None:
    """On its calibration data the model is near the float one, as far as its bits permit, and its file has parity."""
    qmodel = quantize(model, data, config)
    want, got = np.asarray(model(data)), np.asarray(qmodel(data))
    np.testing.assert_allclose(got, want, atol=NEAR[config] * max(np.ptp(want), 1))
    assert kquant.verify_tflite(qmodel, kquant.export_tflite(qmodel).content, images()).ok


@STEPS
@pytest.mark.parametrize("value", [0.5, 0.0, -2.0])
def test_steps_survive_inputs_that_are_all_alike(config, value):
    qmodel = quantize(small(), np.full((16, 6, 6, 2), value, np.float32), config)
    same = np.full((1, 6, 6, 2), value, np.float32)
    np.testing.assert_allclose(np.asarray(qmodel(same)), np.asarray(small()(same)), atol=0.05)


@STEPS
def test_steps_survive_a_constant_activation(config):
    model = small()
    model.get_layer("conv").set_weights([np.zeros((3, 3, 2, 4), np.float32), np.float32([0.5] * 4)])
    assert_near_and_exported(model, images(), config)


@STEPS
@pytest.mark.parametrize("layer", ["conv", "fc"])
def test_steps_survive_a_weight_tensor_of_zeros(config, layer):
    model = small()
    kernel, bias = model.get_layer(layer).get_weights()
    model.get_layer(layer).set_weights([np.zeros_like(kernel), bias + 0.3])
    assert_near_and_exported(model, images(), config)


@STEPS
def test_steps_survive_dead_channels(config):
    model = small()
    kernel, bias = model.get_layer("conv").get_weights()
    kernel[..., :3], bias[:3] = 0, [0.7, 0.0, -1.0]
    model.get_layer("conv").set_weights([kernel, bias])
    assert_near_and_exported(model, images(32), config)


@STEPS
@pytest.mark.parametrize("samples", [1, 2])
def test_steps_survive_fewer_samples_than_inputs(config, samples):
    """One row of 64 numbers for a dense layer: the second moments are singular."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((6, 6, 2), name="image")
    x = layers.Flatten()(layers.Conv2D(4, 3, activation="relu")(x))
    x = layers.Dense(6, activation="relu")(x)
    assert_near_and_exported(keras.Model(inputs, layers.Dense(3)(x)), images(samples), config)


@STEPS
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_steps_refuse_data_that_is_not_finite(config, value):
    data = images(64)
    data[60, 0, 0, 0] = value
    with pytest.raises(kquant.CalibrationError, match="image.*NaN or infinite"):
        quantize(small(), data, config)


@STEPS
def test_steps_name_the_tensor_that_overflows(config):
    model = small()
    model.get_layer("conv").kernel.assign(np.full((3, 3, 2, 4), 1e30))
    with pytest.raises(kquant.KQuantError, match="conv|pool|fc"):
        quantize(model, np.full((4, 6, 6, 2), 1e30, np.float32), config)


@STEPS
@pytest.mark.parametrize("data", [np.zeros((0, 6, 6, 2), np.float32), [], iter(())])
def test_steps_refuse_empty_data(config, data):
    with pytest.raises(kquant.CalibrationError, match="(?i)empty|no "):
        quantize(small(), data, config)


@STEPS
def test_data_free_without_batch_normalization_names_the_tensors_and_the_remedy(config):
    with pytest.raises(kquant.CalibrationError) as error:
        kquant.quantize_model(small(), config=config, progress=False)
    for word in ("'image'", "'conv'", "'fc'", "calibration_data", "inputs=", "w8"):
        assert word in str(error.value)


def test_no_data_says_what_needs_it():
    with pytest.raises(kquant.CalibrationError, match="calibration_data"):
        kquant.quantize_model(small())


@pytest.mark.parametrize("data", [np.zeros((0, 6, 6, 2), np.float32), [], iter(())])
def test_empty_data_is_refused(data):
    with pytest.raises(kquant.CalibrationError, match="(?i)empty|no "):
        quantize(small(), data)


def test_one_sample_is_enough_to_run():
    assert np.isfinite(quantize(small(), images(1)).predict(images(), verbose=0)).all()


@pytest.mark.parametrize(
    "data",
    [
        np.zeros((4, 6, 6, 3), np.float32),
        np.zeros((6, 6, 2), np.float32),
        np.zeros((4, 72), np.float32),
        np.array([["a"] * 2] * 3),
        np.zeros((4, 6, 6, 2), np.complex64),
        {"picture": np.zeros((4, 6, 6, 2), np.float32)},
        [np.zeros((4, 6, 6, 2), np.float32), np.zeros((4, 6, 6, 2, 1), np.float32)],
    ],
)
def test_data_of_the_wrong_shape_or_type_names_the_input(data):
    with pytest.raises(kquant.CalibrationError, match="image|input"):
        quantize(small(), data)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_data_that_is_not_finite_is_refused(value):
    data = images()
    data[3, 0, 0, 0] = value
    with pytest.raises(kquant.CalibrationError, match="(?i)nan|inf|finite"):
        quantize(small(), data)


class Opaque(layers.Layer):
    """A layer that only runs on real tensors."""

    def call(self, x):
        import tensorflow as tf

        return tf.convert_to_tensor(np.asarray(tf.get_static_value(x))) if False else tf.raw_ops.Softmax(logits=x)


def test_an_unknown_layer_stays_float_and_is_reported():
    x = inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(4, 3)(x)
    x = Opaque(name="mystery")(x)
    model = keras.Model(inputs, layers.Conv2D(2, 1)(x))
    qmodel = quantize(model)
    assert "mystery" in qmodel.report
    report = kquant.export_tflite(qmodel)
    assert any("mystery" in name for name, _ in report.float_ops)
    with pytest.raises(kquant.ExportError, match="mystery"):
        kquant.export_tflite(qmodel, allow_float=False)


def test_an_unserializable_lambda_is_named():
    x = inputs = keras.Input((6, 6, 2))
    lock = open(os.devnull)  # noqa: SIM115 - a closure that cannot be serialized
    x = layers.Lambda(lambda t: t if lock.closed else Opaque()(t), name="closure")(x)
    model = keras.Model(inputs, layers.Conv2D(2, 1)(x))
    try:
        qmodel = quantize(model)
    except kquant.ModelError as error:
        assert "closure" in str(error)
    else:  # traced into operations: then it must be reported as float, and compute the same
        assert np.isfinite(np.asarray(qmodel(images()))).all()
        assert qmodel.quantization.skipped


def test_a_truncated_or_foreign_file_is_refused(tmp_path):
    qmodel = quantize(small())
    content = kquant.export_tflite(qmodel).content
    for broken in (content[:100], content[: len(content) // 2], b"", b"not a model at all", b"\0" * 64):
        with pytest.raises(kquant.ExportError):
            kquant.verify_tflite(qmodel, broken, images())
    with pytest.raises(kquant.ExportError, match="no file"):
        kquant.verify_tflite(qmodel, tmp_path / "missing.tflite", images())


def test_verify_notices_a_file_of_another_model():
    qmodel = quantize(small())
    other = quantize(small(), images() * 3)
    report = kquant.verify_tflite(qmodel, kquant.export_tflite(other).content, images())
    assert report.structure and not report.ok


def test_verify_notices_a_wrong_weight():
    qmodel = quantize(small())
    content = kquant.export_tflite(qmodel).content
    integers = qmodel.get_layer("fc").integers
    integers.assign(integers.numpy()[:, ::-1])
    assert not kquant.verify_tflite(qmodel, content, images()).ok


def test_exporting_a_float_model_says_what_to_do():
    with pytest.raises(kquant.ModelError, match="quantize_model"):
        kquant.export_tflite(small())


def test_quantizing_a_quantized_model_says_what_to_do():
    with pytest.raises(kquant.ModelError, match="already quantized"):
        quantize(quantize(small()))


def test_an_unbuilt_model_says_what_to_do():
    with pytest.raises(kquant.ModelError, match="(?i)build|call"):
        quantize(keras.Sequential([layers.Dense(3)]))


@pytest.mark.parametrize(
    "config",
    ["w9a9a9", "w1a8", {"preset": "w8a8", "wieghts": {}}, {"preset": "w8a8", "target": "nope"}, "missing.yaml"],
)
def test_a_wrong_config_is_refused(config):
    with pytest.raises(kquant.ConfigError):
        quantize(small(), config=config)


def test_another_backend_is_refused():
    code = "import kquant"
    env = {**os.environ, "KERAS_BACKEND": "numpy"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "BackendError" in done.stderr and "KERAS_BACKEND=tensorflow" in done.stderr
