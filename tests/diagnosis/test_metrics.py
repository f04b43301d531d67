"""Metrics on every kind of model and of data, against closed forms and Keras itself."""

from __future__ import annotations

import pickle
from functools import cache
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import kquant
from kquant.diagnosis.metrics import (
    MOST_DB,
    Metric,
    Samples,
    class_indices,
    kl_divergence,
    make_metric,
    predict,
    read_samples,
    sqnr_db,
)
from kquant.diagnosis.switches import Switches
from kquant.errors import CalibrationError, ConfigError, ModelError
from models import digits_cnn
from tests.support.toy import toy_data, toy_graph

RNG = np.random.default_rng(0)


@cache
def digits() -> tuple[keras.Model, kquant.QuantizedModel, Switches, kquant.TFLiteModel]:
    model = keras.saving.load_model(digits_cnn.PATH)
    config = {"preset": "w3a3", "adaround": False, "correct_bias": False}
    qmodel = kquant.quantize_model(model, digits_cnn.load_split().calibration, config, progress=False)
    return model, qmodel, Switches.of(qmodel), kquant.TFLiteModel(kquant.export_tflite(qmodel).content)


def samples(limit: int = 200, labels: bool = True) -> Samples:
    data = digits_cnn.load_split()
    source: Any = (data.x_test, data.y_test) if labels else data.x_test
    return read_samples(source, digits()[2].qgraph.graph, limit=limit, batch_size=64)


def accuracy(outputs: np.ndarray, count: int = 200) -> float:
    return 100 * float(np.mean(outputs.argmax(-1) == digits_cnn.load_split().y_test[:count]))


@pytest.mark.slow
def test_accuracy_of_every_kind_of_model() -> None:
    model, qmodel, switches, lite = digits()
    metric = make_metric(None, samples(), model)
    x = digits_cnn.load_split().x_test[:200]
    assert metric.name == "top-1 accuracy (%)"
    assert metric(model) == accuracy(model.predict(x, verbose=0)) > 95
    assert metric(qmodel) == accuracy(qmodel.predict(x, verbose=0))
    assert metric(lite) == accuracy(lite.predict(x)[0]) < metric(model)
    switches.switch(())
    assert metric(switches.model) == metric(model)
    switches.switch(switches.names)
    assert metric(switches.model) == accuracy(switches.model.predict(x, verbose=0)) < metric(model)


@pytest.mark.slow
def test_agreement_without_labels() -> None:
    model, qmodel, _, _ = digits()
    unlabelled = samples(labels=False)
    metric = make_metric(None, unlabelled, model)
    x = digits_cnn.load_split().x_test[:200]
    expected = np.mean(model.predict(x, verbose=0).argmax(-1) == qmodel.predict(x, verbose=0).argmax(-1))
    assert metric(model) == 100 and metric(qmodel) == pytest.approx(100 * expected, abs=0.51)  # ties agree
    assert metric(qmodel) < 100
    kl, sqnr = (make_metric(name, unlabelled, model) for name in ("kl", "sqnr"))
    assert kl(qmodel) < kl(model) == 0 and sqnr(qmodel) < 40 < sqnr(model) == MOST_DB


@pytest.mark.parametrize(
    "metric, name",
    [
        (keras.metrics.SparseTopKCategoricalAccuracy(2), "sparse_top_k_categorical_accuracy"),
        (keras.metrics.SparseCategoricalCrossentropy(from_logits=True), "-sparse_categorical_crossentropy"),
        ("sparse_categorical_accuracy", "sparse_categorical_accuracy"),
    ],
)
def test_keras_metrics_are_what_keras_evaluates(metric: Any, name: str) -> None:
    model, qmodel, _, _ = digits()
    found = make_metric(metric, samples(), model)
    assert found.name == name
    for m in (qmodel, model, qmodel):  # each time from a fresh state
        measured = keras.metrics.get(metric)
        measured.reset_state()
        measured.update_state(found.samples.labels, predict(m, found.samples)[0])
        assert found(m) == pytest.approx((-1 if name[0] == "-" else 1) * float(measured.result()), rel=1e-6)


def test_a_users_function_gets_the_model() -> None:
    model, _, _, _ = digits()
    metric = make_metric(lambda m: np.float32(m.count_params()), samples(), model)
    assert metric(model) == model.count_params() and metric.kind == "function"


def test_metrics_can_be_pickled() -> None:
    model, qmodel, _, _ = digits()
    for metric in ("accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2)):
        found = make_metric(metric, samples(), model)
        assert pickle.loads(pickle.dumps(found))(qmodel) == found(qmodel)


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: (x, y),
        lambda x, y: (x, y, np.ones(len(x))),
        lambda x, y: ({"x": x}, y),
        lambda x, y: [(x[:10], y[:10]), (x[10:], y[10:])],
        lambda x, y: lambda: iter([(x[:10], y[:10]), (x[10:], y[10:])]),
        lambda x, y: iter([(x[:10], y[:10]), (x[10:], y[10:])]),
        lambda x, y: tf.data.Dataset.from_tensor_slices((x, y)).batch(8),
    ],
    ids=["arrays", "weighted", "dict", "batches", "function", "generator", "dataset"],
)
@pytest.mark.parametrize("limit", [None, 13])
def test_labels_stay_with_their_samples(form: Any, limit: int | None) -> None:
    x, y = toy_data(25), np.arange(25)
    found = read_samples(form(x, y), toy_graph(), limit=limit, batch_size=4)
    count = limit or 25
    assert len(found) == count
    np.testing.assert_array_equal(np.concatenate([b[0] for b in found]), x[:count])
    np.testing.assert_array_equal(found.labels, y[:count])  # type: ignore[arg-type]


@pytest.mark.parametrize("form", [lambda x: x, lambda x: [x], lambda x: [x[:5], x[5:]], lambda x: {"x": x}])
def test_data_without_labels(form: Any) -> None:
    found = read_samples(form(toy_data(9)), toy_graph())
    assert len(found) == 9 and found.labels is None


def test_wrong_data_is_refused() -> None:
    graph, x = toy_graph(), toy_data(9)
    with pytest.raises(CalibrationError, match="9 samples and 8 labels"):
        read_samples((x, np.zeros(8)), graph)
    with pytest.raises(CalibrationError, match="1 of 2 batches"):
        read_samples([(x[:5], np.zeros(5)), x[5:]], graph)
    with pytest.raises(CalibrationError, match="empty"):
        read_samples([], graph)


def test_metrics_that_cannot_be_are_refused() -> None:
    model, _, _, _ = digits()
    data = digits_cnn.load_split()

    def labelled(y: np.ndarray) -> Samples:
        return read_samples((data.x_test[:20], y), digits()[2].qgraph.graph)

    with pytest.raises(ConfigError, match=r"Unknown metric 'acuracy'"):
        make_metric("acuracy", samples(), model)
    with pytest.raises(ConfigError, match="found 3"):
        make_metric(3, samples(), model)
    for metric in ("accuracy", keras.metrics.SparseCategoricalAccuracy()):
        with pytest.raises(ConfigError, match="needs labels"):
            make_metric(metric, samples(labels=False), model)
    with pytest.raises(CalibrationError, match=r"classes 0..19 do not fit the output \(20, 10\)"):
        make_metric("accuracy", labelled(np.arange(20)), model)
    with pytest.raises(ConfigError, match="returned None: a metric is a function"):
        make_metric(lambda m: None, samples(), model)(model)
    with pytest.raises(ModelError, match="'broken' is nan"):
        make_metric(broken, samples(), model)(model)
    nan = Metric(name="a", samples=samples(), reference=(), kind="accuracy")
    with pytest.raises(ModelError, match="holds NaN"):
        nan.of_outputs([np.full((200, 10), np.nan)])
    with pytest.raises(ConfigError, match="does not take the labels"):
        make_metric(keras.metrics.CategoricalAccuracy(), labelled(np.zeros((20, 3, 3, 3))), model)(model)


def broken(model: Any) -> float:
    return float("nan")


def test_sqnr_in_closed_form() -> None:
    x = RNG.normal(size=1000)
    assert sqnr_db(x, x * 1.01) == pytest.approx(40.0)
    assert sqnr_db(x, x) == MOST_DB and sqnr_db(0 * x, x) == -MOST_DB
    assert sqnr_db(x, -x) == pytest.approx(20 * np.log10(0.5))
    step = 2.0**-8  # of a uniform variable: rounding noise is step^2 / 12
    u = RNG.uniform(-1, 1, 200_000)
    assert sqnr_db(u, np.rint(u / step) * step) == pytest.approx(10 * np.log10((1 / 3) / (step**2 / 12)), abs=0.05)


def test_kl_of_logits_and_of_probabilities() -> None:
    p, q = (keras.ops.softmax(RNG.normal(size=(7, 5)) * 2).numpy() for _ in range(2))
    expected = float(np.mean(np.sum(p * np.log(p / q), -1)))
    assert kl_divergence(p, q) == pytest.approx(expected)
    assert kl_divergence(np.log(p) - 3, np.log(q) + 1) == pytest.approx(expected)
    assert kl_divergence(p, p) == 0 < kl_divergence(p, q)
    assert np.isfinite(kl_divergence(p, np.eye(5)[RNG.integers(0, 5, 7)]))


def test_class_indices_of_all_layouts() -> None:
    output, y = np.zeros((4, 3)), np.array([0, 2, 1, 1])
    for labels in (y, y[:, None], np.eye(3)[y]):
        np.testing.assert_array_equal(class_indices(labels, output), y)
    image = RNG.integers(0, 3, (2, 5, 5))
    np.testing.assert_array_equal(class_indices(image, np.zeros((2, 5, 5, 3))), image)
    np.testing.assert_array_equal(class_indices(image[..., None], np.zeros((2, 5, 5, 3))), image)
