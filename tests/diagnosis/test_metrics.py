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
from kquant.diagnosis.metrics import MOST_DB, Metric, class_indices, kl_divergence, make_metric, sqnr_db
from kquant.diagnosis.samples import Samples, predict, read_samples
from kquant.diagnosis.switches import Switches
from kquant.errors import CalibrationError, ConfigError, ModelError
from kquant.graph.transforms import prepare_graph
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def several() -> tuple[keras.Model, Samples, np.ndarray]:
    """A model with classes and a number, their samples with labels for both, and its inputs."""
    keras.utils.set_random_seed(2)
    inputs = keras.Input((6,), name="x")
    heads = {"kind": keras.layers.Dense(3, name="kind")(inputs), "size": keras.layers.Dense(1, name="size")(inputs)}
    x = RNG.normal(size=(40, 6)).astype(np.float32)
    labels = {"kind": RNG.integers(0, 3, 40), "size": RNG.normal(size=(40, 1)).astype(np.float32)}
    batches = tuple((x[k : k + 16],) for k in range(0, 40, 16))
    return keras.Model(inputs, heads), Samples(batches, labels, ("x",), ("kind", "size")), x


def test_each_output_has_a_metric_and_labels_of_its_own() -> None:
    model, samples, x = several()
    metric = make_metric({"kind": "accuracy", "size": "mean_squared_error"}, samples, model)
    outputs = model.predict(x, verbose=0)
    right = 100 * np.mean(outputs["kind"].argmax(-1) == samples.labels["kind"])
    error = np.mean((outputs["size"] - samples.labels["size"]) ** 2)
    assert metric(model) == pytest.approx((right - error) / 2, rel=1e-5)
    parts = metric.by_output(predict(model, samples))
    assert list(parts) == ["kind: top-1 accuracy (%)", "size: -mean_squared_error"]
    assert list(parts.values()) == pytest.approx([right, -error], rel=1e-5)
    assert pickle.loads(pickle.dumps(metric))(model) == metric(model)


def test_labels_by_output_are_read_from_batches_and_arrays() -> None:
    model, samples, x = several()
    graph = prepare_graph(model)
    batches = [(x[k : k + 7], {n: y[k : k + 7] for n, y in samples.labels.items()}) for k in range(0, 40, 7)]
    for data in ((x, samples.labels), batches):
        found = read_samples(data, graph)
        assert found.outputs == ("kind", "size") and len(found) == 40
        for name, labels in samples.labels.items():
            np.testing.assert_array_equal(found.labels[name], labels)
    few = found.first(9)
    assert len(few) == 9 and [len(y) for y in few.labels.values()] == [9, 9]


def test_without_a_metric_every_labelled_output_has_its_usual_one() -> None:
    model, samples, _ = several()
    only = Samples(samples.batches, {"kind": samples.labels["kind"]}, samples.names, samples.outputs)
    assert make_metric(None, only, model).name == "mean of kind: top-1 accuracy (%)"
    assert make_metric({"kind": None, "size": None}, only, model).name.endswith("size: SQNR (dB)")


@pytest.mark.parametrize(
    "metric, message",
    [
        ({"sort": "accuracy"}, "'kind', 'size'"),
        ({}, "no output"),
        ({"size": lambda model: 0.0}, "function of a model"),
        ("accuracy", "dict of metrics"),
    ],
)
def test_metrics_of_outputs_are_checked(metric: Any, message: str) -> None:
    model, samples, _ = several()
    with pytest.raises(ConfigError, match=message):
        make_metric(metric, samples, model)


def test_an_output_metric_sees_all_labels_and_outputs() -> None:
    model, samples, x = several()
    seen = []

    def look(labels: Any, outputs: Any) -> float:
        seen.append((labels, [y.shape for y in outputs]))
        return 3.5

    metric = make_metric(kquant.OutputMetric("look", look), samples, model)
    assert metric(model) == 3.5 and metric.name == "look"
    assert seen[0][0] is samples.labels and seen[0][1] == [(40, 3), (40, 1)]


def test_an_output_metric_refuses_any_output_that_is_not_finite() -> None:
    model, samples, x = several()
    metric = make_metric(kquant.OutputMetric("one", lambda labels, outputs: 1.0), samples, model)
    outputs = [np.zeros((40, 3)), np.full((40, 1), np.nan)]
    with pytest.raises(ModelError, match="Output 1 of the model"):
        metric.of_outputs(outputs)


def test_integers_are_decisions() -> None:
    inputs = keras.Input((8, 6, 3), name="x")
    model = keras.Model(inputs, keras.ops.argmax(inputs, -1))
    x = RNG.normal(size=(5, 8, 6, 3)).astype(np.float32)
    other = np.where(RNG.uniform(size=x.shape[:-1]) < 0.1, 0, x.argmax(-1)).astype(np.int32)
    samples = Samples(((x,),), other, ("x",), ("mask",))
    assert predict(model, samples)[0].dtype.kind == "i"
    metric = make_metric(None, samples, model)
    assert metric.name == "top-1 accuracy (%)"
    assert metric(model) == pytest.approx(100 * np.mean(x.argmax(-1) == other))
    unlabelled = make_metric(None, Samples(samples.batches, None, ("x",), ("mask",)), model)
    assert unlabelled.name == "agreement with float (%)" and unlabelled(model) == 100
    assert unlabelled.of_outputs([other]) == pytest.approx(100 * np.mean(x.argmax(-1) == other))
    with pytest.raises(ConfigError, match="agreement"):
        make_metric("kl", samples, model)
    with pytest.raises(CalibrationError, match="of integers"):
        make_metric("accuracy", Samples(samples.batches, other[..., 0], ("x",), ("mask",)), model)


def test_the_sqnr_of_decisions_is_how_few_differ() -> None:
    mask = RNG.integers(0, 4, (10, 100))
    samples = Samples((), None, ("x",), ("mask",))
    metric = Metric(name="m", samples=samples, reference=(mask,), kind="agreement")
    other = mask.copy()
    other[0, 0] += 1
    assert metric.sqnr([other]) == pytest.approx(30) and metric.sqnr([mask]) == MOST_DB
    numbers = RNG.normal(size=(10, 5))
    both = Metric(name="m", samples=samples, reference=(mask, numbers), kind="agreement")
    assert both.sqnr([mask, numbers * 1.1]) == pytest.approx(20)
    assert both.sqnr([other, numbers * 1.001]) == pytest.approx(30)


def test_chosen_samples_keep_their_labels_and_names() -> None:
    _, samples, x = several()
    mask = RNG.uniform(size=40) < 0.3
    found = samples.chosen(mask)
    np.testing.assert_array_equal(np.concatenate([b[0] for b in found.batches]), x[mask])
    assert found.outputs == samples.outputs and len(found) == mask.sum()
    for name, labels in samples.labels.items():
        np.testing.assert_array_equal(found.labels[name], labels[mask])
    assert len(found.flat_labels) == 2 and Samples((), None, ()).flat_labels == []
