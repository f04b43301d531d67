"""A prepared model trains what the user's does: frozen layers, penalties, constraints, noise, losses by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kquant
from kquant.config.specs import Training
from kquant.keras.model import QuantizedModel
from kquant.qat.prepare import prepare_qat
from tests.support import zoo
from tests.support.train_only import StochasticDepth

AS_THEY_ARE = {"gradient": "ste", "relative_weights": False}  # grids and units that stay: the user's steps
WIDE = {"preset": "w16a16", "target": "wide"}
R = keras.regularizers


@pytest.fixture(autouse=True)
def wide_target() -> None:
    """A target with 16-bit weights, which no hardware has."""
    kquant.register_target(replace(kquant.get_target("litert"), name="wide", weight_bits=(2, 16)))


def data(*shape: int, samples: int = 128) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(samples, *shape)).astype(np.float32)


def prepare(model: keras.Model, x: np.ndarray, config: Any = WIDE, **settings: Any) -> QuantizedModel:
    return prepare_qat(model, x, config, training=Training(**(AS_THEY_ARE | settings)), progress=False)


def penalty(model: keras.Model, x: np.ndarray) -> float:
    model(x, training=False)
    return float(sum(model.losses))


# --- all of it in one model -------------------------------------------------------------------------------------------


def everything() -> keras.Model:
    keras.utils.set_random_seed(0)
    x = image = keras.Input((8, 8, 3), name="image")
    x = layers.RandomFlip("horizontal", seed=1)(x)
    x = layers.Conv2D(6, 3, activation="relu", trainable=False, name="frozen")(x)
    bounded = keras.constraints.MaxNorm(0.9, axis=[0, 1, 2])
    x = layers.Conv2D(8, 3, kernel_regularizer=R.L2(1e-2), kernel_constraint=bounded, name="bounded")(x)
    x = layers.ReLU()(layers.SpatialDropout2D(0.2, seed=2)(x))
    hidden = layers.Dense(10, activation="relu", bias_regularizer=R.L1(1e-2), activity_regularizer=R.L1(1e-2), name="h")
    x = layers.Dropout(0.3, seed=3)(hidden(layers.Flatten()(x)))
    label = layers.Dense(3, activation="softmax", name="label_head")(x)
    return keras.Model(image, {"label": label, "box": layers.Dense(4, name="box_head")(x)})


def compiled(model: keras.Model) -> keras.Model:
    losses = {"box": "mse", "label": "sparse_categorical_crossentropy"}
    weights = {"box": 0.5, "label": 1.0}
    model.compile(keras.optimizers.Adam(1e-3), losses, loss_weights=weights, metrics={"label": "accuracy"})
    return model


@pytest.mark.slow
def test_with_16_bits_everything_trains_as_in_float(tmp_path: Any) -> None:
    x, rng = data(8, 8, 3), np.random.default_rng(2)
    y = {"box": rng.normal(size=(len(x), 4)).astype(np.float32), "label": rng.integers(0, 3, len(x))}
    model, prepared = everything(), prepare(everything(), x)
    assert {v.path for v in prepared.trainable_variables} == {v.path for v in model.trainable_variables}
    assert penalty(prepared, x) == pytest.approx(penalty(model, x), rel=1e-3)

    fits: dict[str, Any] = {"epochs": 3, "batch_size": 32, "shuffle": False, "verbose": 0}
    model, prepared = everything(), prepare(everything(), x)  # their generators at the start again
    expected, found = (compiled(m).fit(x, y, **fits).history for m in (model, prepared))
    assert found.keys() == expected.keys() and expected["loss"][-1] < 0.95 * expected["loss"][0]
    for name in ("loss", "box_loss", "label_loss"):
        np.testing.assert_allclose(found[name], expected[name], rtol=0.01)
    assert penalty(prepared, x) == pytest.approx(penalty(model, x), rel=0.01)
    kernel = prepared.quantized_layers["bounded"].trained_weights()["kernel"]
    assert np.sqrt(np.square(kernel).sum((0, 1, 2))).max() < 0.9 + 1e-5

    prepared.save(tmp_path / "q.keras")
    loaded = compiled(keras.saving.load_model(tmp_path / "q.keras"))
    assert loaded.evaluate(x, y, verbose=0) == pytest.approx(prepared.evaluate(x, y, verbose=0), rel=1e-5)
    assert [v.path for v in loaded.trainable_variables] == [v.path for v in prepared.trainable_variables]
    loaded.fit(x, y, **fits)
    kernel = loaded.quantized_layers["bounded"].trained_weights()["kernel"]
    assert np.sqrt(np.square(kernel).sum((0, 1, 2))).max() < 0.9 + 1e-5


@pytest.mark.slow
def test_its_file_computes_what_it_predicts() -> None:
    x = data(8, 8, 3)
    prepared = prepare(everything(), x, "w8a8")
    content = kquant.export_tflite(prepared, allow_float=False).content
    assert kquant.verify_tflite(prepared, content, x).ok
    for name, value in kquant.TFLiteModel(content).predict(x).items():
        np.testing.assert_array_equal(value, prepared.predict(x, verbose=0)[name])


# --- what is frozen ---------------------------------------------------------------------------------------------------


def test_nothing_of_a_frozen_backbone_learns_its_grids_included() -> None:
    keras.utils.set_random_seed(0)
    inner = keras.Input((8, 8, 3))
    x = layers.BatchNormalization()(layers.Conv2D(4, 3, use_bias=False)(inner))
    base = keras.Model(inner, layers.GlobalAveragePooling2D()(layers.ReLU()(x)), name="backbone")
    base.trainable = False
    image = keras.Input((8, 8, 3))
    model = keras.Model(image, layers.Dense(3, name="head")(layers.Flatten()(base(image, training=False))))
    zoo.randomize(model)
    prepared = prepare(model, data(8, 8, 3), "w8a8", gradient="lsq")
    names = {v.path for v in prepared.trainable_variables}
    assert {"head/kernel", "head/bias"} <= names and not any("backbone" in name for name in names)
    owners = {layer.node.name for layer in prepared.quantized_layers.values() if layer.trainable_variables}
    assert owners == {"head"}


def test_single_variables_and_numbers_do_not_train() -> None:
    x = keras.Input((6,))
    head = layers.Dense(3, use_bias=False, name="without_bias")
    half = layers.Dense(4, name="half")
    y = head(keras.ops.maximum(half(x) * 0.5 + 0.25, keras.ops.convert_to_tensor([0.0, 0.1, 0.2, 0.3])))
    model = keras.Model(x, y)
    half.kernel.trainable = False
    prepared = prepare(model, data(6))
    assert {v.path for v in prepared.trainable_variables} == {"half/bias", "without_bias/kernel"}


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_normalization_stays_at_its_running_statistics(frozen: bool) -> None:
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((6, 6, 2))
    norm = layers.BatchNormalization(momentum=0.7)
    x = layers.ReLU()(norm(layers.Conv2D(4, 3, name="conv")(x)))
    other = layers.BatchNormalization()(layers.Conv2D(4, 3, name="other")(x))
    model = keras.Model(inputs, layers.GlobalAveragePooling2D()(other))
    zoo.randomize(model)
    norm.trainable = not frozen
    prepared = prepare(model, data(6, 6, 2), batch_norm="keep")
    names = {v.path for v in prepared.trainable_variables}
    assert ("conv/gamma" in names) is not frozen and "other/gamma" in names and "conv/kernel" in names
    if not frozen:
        assert float(prepared.quantized_layers["conv"].momentum) == pytest.approx(0.7)


# --- penalties and constraints are those of the user's weights --------------------------------------------------------


def normalized() -> keras.Model:
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, use_bias=False, kernel_regularizer=R.L2(0.1), name="conv")(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    separable = {"depthwise_regularizer": R.L1(0.1), "pointwise_regularizer": R.L2(0.2)}
    x = layers.ReLU(6.0)(layers.BatchNormalization()(layers.SeparableConv2D(5, 3, **separable)(x)))
    x = layers.DepthwiseConv2D(3, depthwise_regularizer=R.L2(0.3), bias_regularizer=R.L2(0.1))(x)
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))


def sequences() -> keras.Model:
    x = inputs = keras.Input((8, 6))
    shared = layers.Dense(6, kernel_regularizer=R.L2(0.1))
    x = shared(shared(layers.Conv1D(6, 3, padding="same", kernel_regularizer=R.L1L2(0.1, 0.2))(x)))
    x = layers.PReLU(shared_axes=[1], alpha_regularizer=R.L2(0.5), alpha_initializer="ones")(x)
    x = layers.EinsumDense("abc,dce->abde", (8, 2, 3), bias_axes="de", kernel_regularizer=R.L2(0.2))(x)
    head = layers.Dense(2, activation="softmax", activity_regularizer=R.L2(0.1))
    return keras.Model(inputs, head(layers.Flatten()(x)))


MODELS: dict[str, tuple[Callable[[], keras.Model], tuple[int, ...]]] = {
    "normalized": (normalized, (8, 8, 3)),
    "sequences": (sequences, (8, 6)),
}


@pytest.mark.parametrize("name, batch_norm", [("normalized", "fold"), ("normalized", "keep"), ("sequences", "fold")])
@pytest.mark.parametrize("relative", [False, True])
def test_penalties_are_those_of_the_users_weights(name: str, batch_norm: str, relative: bool) -> None:
    build, shape = MODELS[name]
    keras.utils.set_random_seed(0)
    model, x = build(), data(*shape)
    zoo.randomize(model)
    prepared = prepare(model, x, batch_norm=batch_norm, relative_weights=relative)
    assert len(prepared.losses) == len(model.losses)
    assert penalty(prepared, x) == pytest.approx(penalty(model, x), rel=1e-3)


def test_a_constraint_holds_for_the_weight_in_front_of_its_normalization() -> None:
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((8, 8, 3))
    unit = keras.constraints.UnitNorm(axis=[0, 1, 2])
    x = layers.BatchNormalization()(layers.Conv2D(4, 3, use_bias=False, kernel_constraint=unit, name="conv")(x))
    model = keras.Model(inputs, layers.GlobalAveragePooling2D()(x))
    zoo.randomize(model)
    prepared = prepare(model, data(8, 8, 3), relative_weights=True)
    prepared.compile("adam", "mse")
    prepared.fit(data(8, 8, 3), np.zeros((128, 4)), epochs=1, verbose=0)
    layer = prepared.quantized_layers["conv"]
    factor = layer.user_views["kernel"].arrays["factor"].numpy()
    kernel = layer.trained_weights()["kernel"].numpy() / factor
    np.testing.assert_allclose(np.square(kernel).sum((0, 1, 2)), 1.0, rtol=1e-4)
    assert np.ptp(factor) > 0.1


def test_a_regularizer_of_what_training_does_not_have_is_named() -> None:
    x = keras.Input((6,))
    norm = layers.BatchNormalization(gamma_regularizer="l2", name="penalized_norm")
    model = keras.Model(x, norm(layers.Dense(4)(x)))
    with pytest.warns(UserWarning, match="penalized_norm"):
        prepare(model, data(6))


# --- what acts in training only ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        layers.Dropout(0.5),
        layers.SpatialDropout2D(0.5),
        layers.AlphaDropout(0.5),
        layers.GaussianDropout(0.5),
        layers.GaussianNoise(0.5),
        layers.RandomFlip(),
        layers.RandomRotation(0.5),
        layers.RandomBrightness(0.5, value_range=(0.0, 1.0)),
        StochasticDepth(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_it_acts_in_training_and_nowhere_else(layer: Any) -> None:
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(3, 3, padding="same", activation="relu")(layer(x))
    model = keras.Model(inputs, layers.GlobalAveragePooling2D()(layers.ReLU()(layer(layers.Conv2D(3, 3)(x)))))
    images = np.abs(data(8, 8, 3, samples=32))
    prepared = prepare(model, images, "w8a8")
    first, second = (np.asarray(prepared(images, training=True)) for _ in range(2))
    assert np.abs(first - second).max() > 1e-4 * np.abs(first).max()  # where it is off, they are equal
    quiet = [np.asarray(prepared(images, training=False)) for _ in range(2)]
    np.testing.assert_array_equal(*quiet)
    assert not any(node.op == "train_only" for node in kquant.keras.model.extract(prepared).graph)


# --- pruned weights ---------------------------------------------------------------------------------------------------


def pruned() -> keras.Model:
    keras.utils.set_random_seed(0)
    x = keras.Input((8,))
    model = keras.Model(x, layers.Dense(4, name="b")(layers.Dense(16, activation="relu", name="a")(x)))
    for layer in model.layers[1:]:
        kernel = layer.kernel.numpy()
        layer.kernel.assign(np.where(np.abs(kernel) < np.median(np.abs(kernel)), 0, kernel))
    return model


def regrown(model: QuantizedModel) -> float:
    """The share of the pruned weights that are not zero where it is deployed."""
    found = []
    for layer in pruned().layers[1:]:
        real = model.quantized_layers[layer.name]._quantized_weight()[1].numpy()
        found.append(real[layer.kernel.numpy() == 0] != 0)
    return float(np.mean(np.concatenate(found)))


@pytest.mark.parametrize(
    "solver", ["descent", *(pytest.param(s, marks=pytest.mark.slow) for s in ("gram", "stochastic"))]
)
@pytest.mark.parametrize("keep", [False, True])
def test_pruned_weights_stay_zero_where_they_are_to(solver: str, keep: bool) -> None:
    x = data(8)
    config = {"preset": "w4a8", "keep_zeros": keep, "adaround": {"solver": solver, "iterations": 100}}
    quantized = kquant.quantize_model(pruned(), x, config, progress=False)
    prepared = prepare(pruned(), x, config, relative_weights=True)
    prepared.compile(keras.optimizers.Adam(0.01), "mse")
    prepared.fit(x, x[:, :4], epochs=2, verbose=0)
    if keep:
        assert regrown(quantized) == regrown(prepared) == 0
    else:
        assert regrown(prepared) > 0.2


def test_a_grid_without_a_zero_is_refused_for_pruned_weights() -> None:
    """Binary weights have none; the first layer keeps 8 bits."""
    with pytest.raises(kquant.errors.ConfigError, match="'b'.*zeros that are to stay"):
        kquant.quantize_model(pruned(), data(8), {"preset": "w1a8-binary", "keep_zeros": True}, progress=False)
