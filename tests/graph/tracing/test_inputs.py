"""Inputs are typed by what reads them, in whatever order it does."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L
from keras import ops as K

import kquant
from kquant.errors import ModelError
from kquant.graph.ops import evaluate
from kquant.graph.tracing.trace import trace_model

IDS = np.asarray([[3, 0, 9], [0, 5, 5]])


@pytest.mark.parametrize("compared_first", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_ids_that_are_compared_too_are_ids(dtype: str, compared_first: bool) -> None:
    ids = keras.Input((3,), dtype=dtype)
    embedding = L.Embedding(10, 4)
    if compared_first:
        seen = K.cast(K.not_equal(ids, 0), "float32")
        x = embedding(ids)
    else:
        x = embedding(ids)
        seen = K.cast(K.not_equal(ids, 0), "float32")
    model = keras.Model(ids, x * seen[:, :, None])
    graph = trace_model(model)
    assert graph[graph.inputs[0]].dtype == "int32" and "float" not in {n.op for n in graph}
    data = IDS.astype(dtype)
    np.testing.assert_allclose(evaluate(graph, [data.astype("int32")])[0], model(data), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "moved",
    [lambda x: x[:, 1:], lambda x: K.reshape(x, (-1, 1, 3)), lambda x: K.flip(x, 1), lambda x: K.tile(x, (1, 2))],
    ids=["slice", "reshape", "flip", "tile"],
)
def test_ids_that_are_moved_first_are_ids(moved: Any) -> None:
    """The file moves them as integers."""
    ids = keras.Input((3,), dtype="int32", name="ids")
    model = keras.Model(ids, L.Embedding(10, 4)(moved(ids)))
    qmodel = kquant.quantize_model(model, IDS.astype("int32"), "w8a8", progress=False)
    found = kquant.TFLiteModel(kquant.export_tflite(qmodel, allow_float=False).content).predict(IDS.astype("int32"))[0]
    np.testing.assert_allclose(found, model(IDS), rtol=0, atol=0.001)


def test_integers_that_are_moved_and_cast_are_numbers() -> None:
    """A mask, as transformers take it: weights of what is hidden."""
    mask, x = keras.Input((3,), dtype="int32", name="mask"), keras.Input((3, 3))
    hidden = (1.0 - K.cast(mask[:, None, :], "float32")) * -1e9
    model = keras.Model([mask, x], L.Softmax()(x + hidden) + K.cast(K.reshape(mask, (-1, 3, 1)), "float32"))
    graph = trace_model(model)
    assert graph[graph.inputs[0]].dtype == "float32" and "float" not in {n.op for n in graph}
    data = [np.asarray([[1, 0, 1], [1, 1, 0]]), np.random.default_rng(0).normal(size=(2, 3, 3)).astype("float32")]
    np.testing.assert_allclose(evaluate(graph, [data[0].astype("float32"), data[1]])[0], model(data), atol=1e-6)
    qmodel = kquant.quantize_model(model, data, "w8a8", progress=False)
    found = kquant.TFLiteModel(kquant.export_tflite(qmodel, allow_float=False).content).predict(data)[0]
    np.testing.assert_allclose(found, model(data), atol=0.02)


def test_ids_that_are_numbers_too_are_read_as_numbers_in_float() -> None:
    ids = keras.Input((3,), dtype="float32")
    model = keras.Model(ids, L.Embedding(10, 4)(ids) * L.Dense(3)(ids)[:, :, None])
    graph = trace_model(model)
    assert [n.origin_type for n in graph if n.op == "float"] == ["Dense"]
    data = IDS.astype("float32")
    np.testing.assert_allclose(evaluate(graph, [IDS.astype("int32")])[0], model(data), rtol=0, atol=1e-5)


def test_numbers_that_an_inner_model_takes_for_ids_are_refused_by_name() -> None:
    """No input tensor of a file is both."""
    ids, inner = keras.Input((3,), name="tokens"), keras.Input((3,))
    table = keras.Model(inner, L.Embedding(10, 4)(inner))
    model = keras.Model(ids, table(ids) * L.Dense(3)(ids)[:, :, None])
    with pytest.raises(ModelError, match="tokens.*ids and as numbers.*two inputs"):
        trace_model(model)


def test_rows_at_places_that_are_an_input() -> None:
    """As the head of a masked language model has them."""
    places, x = keras.Input((2,), dtype="int32", name="places"), keras.Input((5, 4))
    model = keras.Model([places, x], L.Dense(3)(K.take_along_axis(x, places[:, :, None], axis=1)))
    graph = trace_model(model)
    assert "take_along" in {n.op for n in graph} and "float" not in {n.op for n in graph}
    data = [np.asarray([[3, 0], [4, 4]], "int32"), np.random.default_rng(0).normal(size=(2, 5, 4)).astype("float32")]
    np.testing.assert_allclose(evaluate(graph, data)[0], model(data), atol=1e-6)
    qmodel = kquant.quantize_model(model, data, "w8a8", progress=False)
    content = kquant.export_tflite(qmodel, allow_float=False).content
    assert kquant.verify_tflite(qmodel, content, data).ok
    np.testing.assert_allclose(kquant.TFLiteModel(content).predict(data)[0], model(data), atol=0.05)


def test_masks_of_truth_values() -> None:
    mask, x = keras.Input((5,), dtype="bool", name="mask"), keras.Input((5, 8))
    y = L.MultiHeadAttention(2, 4)(x, x, attention_mask=mask[:, None, :])
    model = keras.Model([mask, x], L.Dense(3)(y + K.cast(mask[:, :, None], "float32")))
    rng = np.random.default_rng(0)
    data = [rng.random((24, 5)) > 0.3, rng.normal(size=(24, 5, 8)).astype("float32")]
    data[0][:, 0] = True
    qmodel = kquant.quantize_model(model, data, "w8a8", progress=False)
    content = kquant.export_tflite(qmodel, allow_float=False).content
    assert kquant.verify_tflite(qmodel, content, data).ok
    np.testing.assert_allclose(kquant.TFLiteModel(content).predict(data)[0], model(data), atol=0.1)


def test_masks_of_integers_are_joined_as_truth_values() -> None:
    first, second = (keras.Input((3,), dtype="int32", name=name) for name in ("first", "second"))
    both = K.logical_and(first, K.logical_not(second))
    model = keras.Model([first, second], K.cast(both, "float32"))
    graph = trace_model(model)
    assert "float" not in {n.op for n in graph}
    data = [np.asarray([[1, 0, 1], [1, 1, 0]], "int32"), np.asarray([[0, 0, 1], [1, 0, 0]], "int32")]
    np.testing.assert_array_equal(evaluate(graph, data)[0], model(data))


def test_a_layer_that_declares_another_type_than_it_returns_is_named() -> None:
    class Seen(L.Layer):
        def call(self, x: Any) -> Any:
            return tf.math.cumsum(x, 1, reverse=True) > 0.0

        def compute_output_spec(self, x: Any) -> Any:
            return keras.KerasTensor(x.shape, "float32")

    x = keras.Input((4,))
    model = keras.Model(x, L.Dense(2)(x * K.cast(Seen(name="seen")(x), "float32")))
    with pytest.raises(ModelError, match="'seen'.*declares float32 and returns bool"):
        kquant.quantize_model(model, np.ones((4, 4), "float32"), progress=False)
