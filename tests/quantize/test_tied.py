"""Weights that several operations have are decided once: equal integers, stored once, biases of their own."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kquant
from kquant.graph.transforms import prepare_graph
from kquant.quantize.tied import inputs_of, tied_weights
from kquant.targets.litert.flatbuffer import summary


def recurrent(kind: Any = layers.LSTM, steps: int = 4) -> tuple[keras.Model, np.ndarray]:
    keras.utils.set_random_seed(0)
    x = keras.Input((steps, 4))
    data = np.random.default_rng(0).normal(size=(64, steps, 4)).astype(np.float32)
    return keras.Model(x, layers.Dense(3)(kind(16)(x))), data


def shared() -> tuple[keras.Model, np.ndarray]:
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 3))
    conv = layers.Conv2D(3, 3, padding="same", activation="relu", name="conv")
    return keras.Model(x, conv(conv(x))), np.random.default_rng(0).normal(size=(32, 8, 8, 3)).astype(np.float32)


def test_steps_and_calls_of_one_weight_are_found() -> None:
    for (model, _), calls in ((recurrent(), 3), (shared(), 2)):
        graph = prepare_graph(model)
        tied = tied_weights(graph, [n.name for n in graph if "kernel" in n.weights])
        counts = sorted(list(tied.values()).count(first) for first in set(tied.values()))
        assert counts[-1] == calls and min(counts) > 1
        for name, first in tied.items():
            np.testing.assert_array_equal(graph[name].weights["kernel"], graph[first].weights["kernel"])


def test_inputs_of_all_calls_are_given_in_turn() -> None:
    model, data = shared()
    graph = prepare_graph(model)
    tied = tied_weights(graph, [n.name for n in graph if "kernel" in n.weights])
    found = [np.asarray(x) for x, x_hat in inputs_of(graph, list(tied), [(data[:8],), (data[8:],)])()]
    np.testing.assert_array_equal(found[0], data[:8])
    np.testing.assert_array_equal(found[2], data[8:])
    first = model.get_layer("conv")(data[:8])
    np.testing.assert_allclose(found[1], first, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(shared, id="shared"),
        pytest.param(recurrent, id="lstm", marks=pytest.mark.slow),
        pytest.param(lambda: recurrent(layers.GRU), id="gru", marks=pytest.mark.slow),
    ],
)
def test_adaround_decides_once_and_the_file_stores_once(make: Any) -> None:
    model, data = make()
    qmodel = kquant.quantize_model(model, data, "w4a8", progress=False)
    graph = prepare_graph(model)
    tied = tied_weights(graph, [n.name for n in graph if "kernel" in n.weights])
    for name, first in tied.items():
        found, kept = (qmodel.quantized_layers[n].integers.numpy() for n in (name, first))
        np.testing.assert_array_equal(found, kept)
    content = kquant.export_tflite(qmodel).content
    assert kquant.verify_tflite(qmodel, content, data[:8]).ok
    nearest = kquant.quantize_model(model, data, {"preset": "w4a8", "adaround": False}, progress=False)
    plain = kquant.export_tflite(nearest).content
    assert len(content) <= 1.05 * len(plain)  # rounding to nearest stores every kernel once
    expected = model.predict(data, verbose=0)
    error, plain_error = (
        float(np.mean(np.square(kquant.TFLiteModel(c).predict(data)[0] - expected))) for c in (content, plain)
    )
    assert error < plain_error, summary(content)
