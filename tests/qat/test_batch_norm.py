"""Batch normalization in training: where it starts, what it computes, what is deployed."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import kquant
from kquant.config.specs import Training
from kquant.errors import ConfigError, ModelError
from kquant.keras.model import extract
from kquant.qat.batch_norm import BatchNormLayer, reestimate_batch_norm
from kquant.qat.prepare import prepare_qat

KINDS = ("keep", "double_forward", "batch_statistics")
FIRST_FAST = (KINDS[0], *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[1:]))


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 8, 8, 3)).astype(np.float32)


def float_model() -> keras.Model:
    """A convolution, a depthwise one and a dense layer, each with a batch normalization that has seen data."""
    keras.utils.set_random_seed(2)
    x = inputs = keras.Input((8, 8, 3))
    for layer in (
        keras.layers.Conv2D(6, 3, padding="same", use_bias=False),
        keras.layers.DepthwiseConv2D(3, padding="same"),
        keras.layers.Conv2D(8, 1),
    ):
        x = keras.layers.BatchNormalization(momentum=0.5)(layer(x))
        x = keras.layers.ReLU()(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Dense(4)(x))
    rng = np.random.default_rng(1)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.gamma.assign(rng.uniform(0.5, 1.5, layer.gamma.shape))
            layer.beta.assign(rng.normal(size=layer.beta.shape) * 0.3)
    for k in range(20):
        model(images(32, k), training=True)
    return model


def prepared(kind: str, config: str = "w8a8", data: np.ndarray | None = None) -> kquant.QuantizedModel:
    training = Training(batch_norm=kind, gradient="ste")
    return prepare_qat(float_model(), images(64) if data is None else data, config, training=training, progress=False)


def normalized(model: kquant.QuantizedModel) -> list[BatchNormLayer]:
    return [layer for layer in model.layers if isinstance(layer, BatchNormLayer)]


@pytest.mark.parametrize("kind", FIRST_FAST)
def test_training_starts_from_the_folded_network(kind):
    folded, model = (prepared(k) for k in ("fold", kind))
    assert len(normalized(model)) == 3
    step = float(folded.layers[-1].output_quantizer.scale)
    x = images(64, 99)
    difference = np.abs(model.predict(x, verbose=0) - folded.predict(x, verbose=0)) / step
    assert difference.max() < 2.5 and (difference < 0.5).mean() > 0.9  # a rounding of weights here and there


@pytest.mark.parametrize("kind", FIRST_FAST)
def test_in_training_the_statistics_are_those_of_the_batch(kind):
    """As Keras' own layers compute it in training, up to 8-bit quantization."""
    reference, x = float_model(), images(64, 5) * 0.9 + 0.3  # another distribution than the running statistics'
    model = prepared(kind, data=np.concatenate([images(64), x]))
    expected, inference = reference(x, training=True).numpy(), reference(x, training=False).numpy()
    y = model(x, training=True).numpy()
    assert np.square(y - expected).mean() < 0.1 * np.square(inference - expected).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_running_statistics_follow_the_batch(kind):
    """With the momentum of the user's layer."""
    model = prepared(kind)
    first = normalized(model)[0]
    before, variance, x = first.moving_mean.numpy(), first.moving_variance.numpy(), images(16, 7)
    model(x, training=True)
    kernel = first.trained_weights()["kernel"]
    weight = first.fake_quantized(kernel) if kind == "keep" else kernel
    u = tf.nn.conv2d(model.layers[1]([x])[0], weight, 1, "SAME").numpy()
    np.testing.assert_allclose(first.moving_mean.numpy(), 0.5 * before + 0.5 * u.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(first.moving_variance.numpy(), 0.5 * variance + 0.5 * u.var((0, 1, 2)), rtol=1e-4)
    model(x, training=False)
    np.testing.assert_allclose(first.moving_mean.numpy(), 0.5 * before + 0.5 * u.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", FIRST_FAST)
def test_what_is_trained_is_deployed(kind, tmp_path):
    """With negative and small gammas, as training may leave them: the file computes what the model says."""
    model = prepared(kind, "w4a8")
    rng = np.random.default_rng(3)
    for layer in normalized(model):
        layer.gamma.assign(layer.gamma.numpy() * rng.choice([-1.0, 0.4, 1.2], layer.gamma.shape))
    graph = extract(model)
    assert all((np.asarray(q.scale) > 0).all() for q in graph.weights.values() if q is not None)
    path = str(tmp_path / "model.tflite")
    kquant.export_tflite(model, path)
    assert kquant.verify_tflite(model, path, images(16)).ok


def test_kept_batch_norm_changes_scales_and_not_integers():
    model = prepared("keep")
    layer = normalized(model)[1]
    integers = layer._quantized_weight()[0].numpy()
    _, before, _ = layer.deployed()
    layer.gamma.assign(layer.gamma * 3.0)
    _, after, _ = layer.deployed()
    np.testing.assert_array_equal(layer._quantized_weight()[0].numpy(), integers)
    np.testing.assert_allclose(after.scale, 3.0 * before.scale, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_gamma_beta_and_the_kernel(kind):
    model = prepared(kind)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(model(images(8), training=True) - 1.0))
    layer = normalized(model)[1]
    variables = [layer.gamma.value, *(v.value for v in layer.variables_by_name.values())]
    assert all(np.abs(g.numpy()).max() > 0 for g in tape.gradient(loss, variables))


@pytest.mark.slow
def test_saved_models_keep_their_statistics(tmp_path):
    model = prepared("double_forward")
    model(images(16) + 1.0, training=True)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(images(8), verbose=0), model.predict(images(8), verbose=0))
    np.testing.assert_array_equal(normalized(loaded)[0].moving_mean, normalized(model)[0].moving_mean)


def test_reestimation_averages_over_the_data_and_changes_nothing_else():
    model = prepared("batch_statistics")
    first, batches = normalized(model)[0], [(images(16, k) * 2.0, None) for k in range(3)]
    trained = [v.numpy() for v in model.trainable_variables]
    reestimate_batch_norm(model, batches, progress=False)
    kernel = first.trained_weights()["kernel"]
    means = [tf.nn.conv2d(model.layers[1]([x])[0], kernel, 1, "SAME").numpy().mean((0, 1, 2)) for x, _ in batches]
    np.testing.assert_allclose(first.moving_mean.numpy(), np.mean(means, 0), rtol=1e-4, atol=1e-6)
    assert float(first.momentum) == pytest.approx(0.5)
    for before, after in zip(trained, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(before, after.numpy())


def test_what_cannot_be_trained_with_batch_norm_is_refused():
    with pytest.raises(ConfigError, match="per-channel config"):
        prepared("keep", "w8a8-per_tensor")
    plain = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.Flatten()])
    with pytest.raises(ModelError, match="BatchNormalization"):
        prepare_qat(plain, images(8), training=Training(batch_norm="keep"), progress=False)
    with pytest.raises(ModelError, match="folded before training"):
        reestimate_batch_norm(prepared("fold"), [], progress=False)


@pytest.mark.parametrize("kind", FIRST_FAST)
def test_a_batch_with_nan_leaves_no_trace(kind):
    model = prepared(kind)
    model.compile("sgd", "mse")
    before = [v.numpy() for v in model.variables if "moving" in v.path]
    with pytest.raises(tf.errors.InvalidArgumentError, match="NaN or infinite"):
        model.fit(np.full((4, 8, 8, 3), np.nan, np.float32), np.zeros((4, 4), np.float32), verbose=0)
    for old, new in zip(before, [v.numpy() for v in model.variables if "moving" in v.path], strict=True):
        np.testing.assert_array_equal(old, new)
