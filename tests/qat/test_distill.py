"""The distiller: its loss against closed forms, what it trains, and that it is an ordinary Keras model."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import kquant
from kquant.qat.distill import Distiller, divergence, gives_probabilities
from kquant.qat.prepare import prepare_qat

X = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 3, 32)
LABELS = keras.losses.SparseCategoricalCrossentropy


def network(seed: int, softmax: bool = False, classes: int = 3) -> keras.Model:
    """Dense and ReLU in a hidden layer of 8."""
    keras.utils.set_random_seed(seed)
    x = inputs = keras.Input((6,), name="x")
    x = layers.Dense(8, activation="relu", name="hidden")(x)
    x = layers.Dense(classes, name="scores")(x)
    return keras.Model(inputs, layers.Softmax(name="softmax")(x) if softmax else x, name=f"network{seed}")


def quantized(model: keras.Model, config: str = "w4a8") -> kquant.QuantizedModel:
    return prepare_qat(model, X, config, progress=False)


def numpy_divergence(targets: np.ndarray, logits: np.ndarray, temperature: float) -> float:
    """T^2 KL, written out in float64."""

    def softmax(z: np.ndarray) -> np.ndarray:
        e = np.exp(np.asarray(z, np.float64) / temperature)
        return e / e.sum(-1, keepdims=True)

    p, q = softmax(targets), softmax(logits)
    return temperature**2 * float(np.mean(np.sum(p * (np.log(p) - np.log(q)), -1)))


def first_loss(distiller: Distiller, x: np.ndarray = X, y: np.ndarray | None = Y) -> dict[str, float]:
    """The logs of the first step, whose losses are those before it."""
    return {k: float(v) for k, v in distiller.train_on_batch(x, y, return_dict=True).items()}


# --- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_divergence_is_the_closed_form(temperature):
    z, t = np.random.default_rng(2).normal(size=(2, 5, 7, 4)).astype(np.float32) * 3
    found = float(divergence(t, z, temperature))
    np.testing.assert_allclose(found, numpy_divergence(t, z, temperature), rtol=1e-5)
    assert float(divergence(t, t + 5.0, temperature)) == pytest.approx(0, abs=1e-6)


def test_the_gradient_for_a_high_temperature_is_that_of_squared_logits():
    """Section 2.1 of Hinton et al.: T^2 dKL/dz -> (z - mean z - v + mean v) / classes."""
    z, v = (tf.constant(np.random.default_rng(k).normal(size=(1, 4)), tf.float32) for k in (3, 4))
    with tf.GradientTape() as tape:
        tape.watch(z)
        loss = divergence(v, z, 1000.0)
    expected = (z - tf.reduce_mean(z) - v + tf.reduce_mean(v)) / 4.0
    np.testing.assert_allclose(tape.gradient(loss, z), expected, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("softmax", [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_first_step_shows_the_weighted_sum(softmax, alpha):
    student, teacher = network(1, softmax[0]), network(2, softmax[1])
    distiller = Distiller(student, teacher, temperature=2.0, alpha=alpha)
    distiller.compile("sgd", LABELS(from_logits=not softmax[0]), jit_compile=False)
    z, t = (np.log(m(X)) if s else np.asarray(m(X)) for m, s in zip((student, teacher), softmax, strict=True))
    wanted = numpy_divergence(t, z, 2.0)
    label_loss = float(LABELS(from_logits=True)(Y, z))
    logs = first_loss(distiller)
    np.testing.assert_allclose(logs["distillation_loss"], wanted, rtol=1e-4)
    np.testing.assert_allclose(logs["loss"], (1 - alpha) * label_loss + alpha * wanted, rtol=1e-4)


def test_without_labels_the_teacher_is_all_there_is():
    student, teacher = network(1), network(2)
    wanted = numpy_divergence(np.asarray(teacher(X)), np.asarray(student(X)), 1.0)
    distiller = Distiller(student, teacher, alpha=0.25)
    distiller.compile("sgd", jit_compile=False)
    assert distiller.evaluate(X, verbose=0) == pytest.approx(wanted, rel=1e-4)
    assert first_loss(distiller, y=None)["loss"] == pytest.approx(0.25 * wanted, rel=1e-4)


def test_features_add_their_mean_squares():
    student, teacher = quantized(network(1)), network(2)
    hidden = np.maximum(np.asarray(teacher.get_layer("hidden")(X)), 0)
    view = keras.Model(student.input, student.get_layer("hidden").output[0])
    squares = float(np.mean((np.asarray(view(X, training=True)) - hidden) ** 2))
    distiller = Distiller(student, teacher, alpha=1.0, features={"hidden": "hidden"}, feature_weight=3.0)
    distiller.compile("sgd", LABELS(from_logits=True), jit_compile=False)
    logs = first_loss(distiller)
    assert logs["feature_loss"] == pytest.approx(squares, rel=1e-4)
    assert logs["loss"] == pytest.approx(logs["distillation_loss"] + 3 * squares, rel=1e-4)


def test_a_custom_loop_takes_the_steps_of_fit():
    students = [network(1), network(1)]
    distillers = [Distiller(s, network(2), alpha=0.7, features={"hidden": "hidden"}) for s in students]
    for distiller in distillers:
        distiller.compile(keras.optimizers.SGD(0.1), LABELS(from_logits=True), jit_compile=False)
    distillers[0].fit(X, Y, batch_size=32, epochs=3, verbose=0)
    for _ in range(3):
        with tf.GradientTape() as tape:
            scores = distillers[1](X, training=True)
            loss = distillers[1].compute_loss(X, Y, scores)
        weights = distillers[1].trainable_weights
        distillers[1].optimizer.apply(tape.gradient(loss, weights), weights)
    for a, b in zip(students[0].get_weights(), students[1].get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# --- what is trained, and what is not -------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_student_approaches_its_teacher_and_the_teacher_stays():
    teacher = network(2)
    teacher.compile("sgd", "mse", metrics=["mae"])  # its metrics do not mix with the distiller's
    before = teacher.get_weights()
    student = quantized(network(1))
    distiller = Distiller(student, teacher, temperature=2.0)
    distiller.compile(keras.optimizers.Adam(0.02), jit_compile=False)
    losses = distiller.fit(X, epochs=40, verbose=0).history
    assert set(losses) == {"loss", "distillation_loss"}
    assert losses["distillation_loss"][-1] < 0.2 * losses["distillation_loss"][0]
    for a, b in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert teacher.trainable and len(teacher.trainable_variables) == 4
    assert {id(v) for v in distiller.trainable_variables} == {id(v) for v in student.trainable_variables}
    teachers = {id(v) for v in teacher.variables}
    assert teachers <= {id(v) for v in distiller.non_trainable_variables}


@pytest.mark.slow
def test_evaluate_and_predict_are_the_students():
    student = quantized(network(1))
    distiller = Distiller(student, network(2))
    for model in (distiller, student):
        model.compile("sgd", LABELS(from_logits=True), metrics=["accuracy"], jit_compile=False)
    assert distiller.evaluate(X, Y, verbose=0, return_dict=True) == student.evaluate(X, Y, verbose=0, return_dict=True)
    np.testing.assert_array_equal(distiller.predict(X, verbose=0), student.predict(X, verbose=0))
    logs = distiller.fit(X, Y, validation_data=(X, Y), verbose=0).history
    assert set(logs) == {"loss", "accuracy", "distillation_loss", "val_loss", "val_accuracy"}


@pytest.mark.slow
def test_a_saved_distiller_goes_on_as_if_nothing_had_happened(tmp_path):
    distiller = Distiller(quantized(network(1)), network(2, softmax=True), alpha=0.6, features={"hidden": "hidden"})
    distiller.compile(keras.optimizers.Adam(0.01), LABELS(from_logits=True), jit_compile=False)
    distiller.fit(X, Y, batch_size=16, shuffle=False, verbose=0)
    distiller.save(tmp_path / "d.keras")
    loaded = keras.saving.load_model(tmp_path / "d.keras")
    for model in (distiller, loaded):
        model.fit(X, Y, batch_size=16, shuffle=False, verbose=0)
    assert isinstance(loaded.student, kquant.QuantizedModel) and loaded.alpha == 0.6
    for a, b in zip(distiller.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert kquant.export_tflite(loaded.student).content == kquant.export_tflite(distiller.student).content


def test_nan_in_a_batch_changes_nothing():
    student = quantized(network(1))
    distiller = Distiller(student, network(2))
    distiller.compile("adam", LABELS(from_logits=True), jit_compile=False)
    before = student.get_weights()
    with pytest.raises(tf.errors.InvalidArgumentError, match="NaN or infinite"):
        distiller.fit(np.full_like(X, np.nan), Y, verbose=0)
    for a, b in zip(before, student.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_jit_gives_the_same_losses():
    logs = []
    for jit in (False, True):
        distiller = Distiller(quantized(network(1)), network(2), features={"hidden": "hidden"})
        distiller.compile(keras.optimizers.SGD(0.01), LABELS(from_logits=True), jit_compile=jit)
        logs.append(first_loss(distiller))
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def scored(seed: int) -> keras.Model:
    """Scores, the class that they say, and a number beside them."""
    model = network(seed)
    scores = model.output
    side = layers.Dense(1, name="number")(model.get_layer("hidden").output)
    outputs = {"scores": scores, "best": keras.ops.argmax(scores, -1), "number": side}
    return keras.Model(model.input, outputs, name=f"scored{seed}")


def test_outputs_that_are_no_scores_learn_by_their_own_loss_or_not_at_all():
    teacher = scored(1)
    with pytest.raises(kquant.ModelError, match="'number'.*outputs"):
        Distiller(quantized(scored(2)), teacher)
    student = quantized(scored(2))
    distiller = Distiller(student, teacher, alpha=0.25, outputs=["scores"])
    distiller.compile(keras.optimizers.SGD(0.0), {"scores": LABELS(from_logits=True), "number": "mse"})
    labels = {"scores": Y, "number": np.ones((len(X), 1), np.float32)}
    found, targets = student(X, training=True), teacher.predict(X, verbose=0)
    own = float(LABELS(from_logits=True)(Y, found["scores"]) + keras.ops.mean((found["number"] - 1.0) ** 2))
    kl = numpy_divergence(targets["scores"], np.asarray(found["scores"]), 1.0)
    assert first_loss(distiller, X, labels)["loss"] == pytest.approx(0.75 * own + 0.25 * kl, rel=1e-4)


def test_integers_are_left_out(tmp_path):
    def two(seed: int) -> keras.Model:
        model = scored(seed)
        return keras.Model(model.input, {k: model.output[k] for k in ("scores", "best")}, name=f"two{seed}")

    distiller = Distiller(quantized(two(2)), two(1), alpha=1.0)
    distiller.compile(keras.optimizers.SGD(0.1))
    losses = distiller.fit(X, epochs=20, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    distiller.save(tmp_path / "distiller.keras")
    again = keras.models.load_model(tmp_path / "distiller.keras")
    np.testing.assert_array_equal(again.predict(X, verbose=0)["best"], distiller.predict(X, verbose=0)["best"])


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"temperature": 0.0}, kquant.ConfigError, "temperature of a Distiller must be a number above 0"),
        ({"alpha": 1.5}, kquant.ConfigError, "alpha of a Distiller must be a number at least 0 and at most 1"),
        ({"alpha": True}, kquant.ConfigError, "alpha"),
        ({"feature_weight": float("nan")}, kquant.ConfigError, "feature_weight"),
        ({"outputs": ["scoers"]}, kquant.ModelError, "no output 'scoers'.*'scores'"),
        ({"features": {"hiden": "hidden"}}, kquant.ModelError, "student 'network1' has no layer 'hiden'.*'hidden'"),
        ({"features": {"hidden": "x1"}}, kquant.ModelError, "teacher 'network2' has no layer 'x1'"),
        ({"features": {"hidden": "scores"}}, kquant.ModelError, r"shape \(None, 8\).*'scores'.*\(None, 3\)"),
    ],
)
def test_wrong_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        Distiller(network(1), network(2), **settings)


def test_models_that_do_not_match_are_refused():
    with pytest.raises(kquant.ModelError, match=r"\[\(3,\)\].*\[\(4,\)\]"):
        Distiller(network(1), network(2, classes=4))
    with pytest.raises(kquant.ModelError, match="two or more classes"):
        Distiller(network(1, classes=1), network(2, classes=1))


@pytest.mark.parametrize("softmax", [False, True])
def test_probabilities_are_told_from_logits(softmax):
    model = network(1, softmax)
    reshaped = keras.Model(model.input, layers.Reshape((1, 3))(model.output))
    assert [gives_probabilities(m) for m in (model, reshaped, quantized(model))] == [softmax] * 3
