"""Recurrent layers from Keras to the file: integers from end to end, each kernel stored once, and parity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L

import kquant

SAMPLES, STEPS, C, U = 24, 2, 4, 5
RNG = np.random.default_rng(0)
X = RNG.normal(size=(SAMPLES, STEPS, C)).astype(np.float32)
IDS = RNG.integers(1, 9, (SAMPLES, STEPS)).astype(np.int32) * (np.arange(STEPS) < RNG.integers(1, 3, (SAMPLES, 1)))

LAYERS: dict[str, Callable[[Any], Any]] = {
    "lstm": lambda x: L.LSTM(U, return_sequences=True)(x),
    "gru": lambda x: L.GRU(U)(x),
    "simple": lambda x: L.SimpleRNN(U, return_sequences=True)(x),
}


def db(want: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10(np.square(want).sum() / np.square(want - found).sum()))


def check(model: keras.Model, data: Any, config: str = "w8a8") -> bytes:
    for w in model.weights:
        w.assign(w + RNG.normal(size=w.shape) * 0.2)
    qmodel = kquant.quantize_model(model, data, config, progress=False)
    content = kquant.export_tflite(qmodel, allow_float=False).content
    parity = kquant.verify_tflite(qmodel, content, data)
    assert parity.ok and parity.reference_max_lsb == 0 and parity.op_by_op_max_lsb <= 1, str(parity)
    found = kquant.TFLiteModel(content).predict(data)
    for want, got in zip(keras.tree.flatten(model.predict(data, verbose=0)), found, strict=True):
        assert db(want, got) > 25
    return bytes(content)


@pytest.mark.parametrize("name", LAYERS)
def test_runs_in_integers(name: str) -> None:
    inputs = keras.Input((STEPS, C))
    check(keras.Model(inputs, LAYERS[name](L.Dense(C)(inputs))), X)


@pytest.mark.slow
def test_hidden_steps() -> None:
    ids = keras.Input((STEPS,), dtype="int32")
    y = L.Bidirectional(L.LSTM(U, return_sequences=True))(L.Embedding(9, C, mask_zero=True)(ids))
    check(keras.Model(ids, y), IDS)


def test_pooling_of_what_is_seen() -> None:
    ids = keras.Input((STEPS,), dtype="int32")
    check(keras.Model(ids, L.Dense(3)(L.GlobalAveragePooling1D()(L.Embedding(9, C, mask_zero=True)(ids)))), IDS)


def test_a_table_forth_and_back() -> None:
    ids = keras.Input((STEPS,), dtype="int32")
    table = L.ReversibleEmbedding(9, C, logit_soft_cap=2.0)
    check(keras.Model(ids, table(L.Dense(C)(table(ids)), reverse=True)), IDS)


@pytest.mark.slow
def test_a_state_goes_in_and_out_on_one_grid() -> None:
    inputs = [keras.Input((1, C)), keras.Input((U,)), keras.Input((U,))]
    y, *states = L.LSTM(U, return_sequences=True, return_state=True)(inputs[0], initial_state=inputs[1:])
    data = [X[:, :1], *np.tanh(RNG.normal(size=(2, SAMPLES, U))).astype(np.float32)]
    runner = kquant.TFLiteModel(check(keras.Model(inputs, [y, *states]), data))
    into, out = (
        {str(d["dtype"]): d["quantization"] for d in details if len(d["shape"]) == 2}
        for details in (runner.inputs, runner.outputs)
    )
    assert into == out
    assert len(into) == 2
