"""Recurrent layers written out compute what Keras computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops as K

from kquant.graph.ops import evaluate
from kquant.graph.tracing.trace import trace_model

STEPS, C, U = 4, 3, 5
RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, STEPS, C)).astype(np.float32)
SEEN = RNG.random((12, STEPS)) < 0.6


class Leaky(L.Layer):
    """A cell of a user's, without get_initial_state: the state forgets half, and the output is its tanh."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.units = self.state_size = units

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], self.units), name="kernel")

    def call(self, x: Any, states: Any) -> Any:
        state = 0.5 * states[0] + K.matmul(x, self.kernel)
        return K.tanh(state), [state]


PLAIN: dict[str, Callable[[Any], Any]] = {
    "lstm": lambda x: L.LSTM(U, return_sequences=True, return_state=True)(x),
    "lstm, backwards": lambda x: L.LSTM(U, return_sequences=True, go_backwards=True)(x),
    "lstm, other activations": lambda x: L.LSTM(
        U, "softsign", recurrent_activation="hard_sigmoid", use_bias=False, implementation=1
    )(x),
    "gru": lambda x: L.GRU(U, return_sequences=True, return_state=True)(x),
    "gru, reset before": lambda x: L.GRU(U, reset_after=False)(x),
    "gru, no bias": lambda x: L.GRU(U, use_bias=False)(x),
    "simple": lambda x: L.SimpleRNN(U, "relu", return_sequences=True)(x),
    "cells on each other": lambda x: L.RNN([L.LSTMCell(U), L.GRUCell(2)], return_sequences=True, return_state=True)(x),
    "a cell of the user's": lambda x: L.RNN(Leaky(U), return_sequences=True, return_state=True)(x),
    "a cell alone": lambda x: L.GRUCell(U)(x[:, 0], [K.tanh(L.Dense(U)(x[:, 1]))])[0],
    "both, states": lambda x: L.Bidirectional(L.LSTM(U, return_state=True))(x),
    "frames": lambda x: L.TimeDistributed(L.GRU(2))(K.reshape(x, (-1, 2, STEPS // 2, C))),
    **{
        f"both, {mode}": lambda x, mode=mode: L.Bidirectional(L.GRU(U, return_sequences=True), merge_mode=mode)(x)
        for mode in ("concat", "sum", "ave", "mul", None)
    },
}
MASKED: dict[str, Callable[[Any, Any], Any]] = {
    "lstm": lambda x, m: L.LSTM(U, return_sequences=True, return_state=True)(x, mask=m),
    "zeros": lambda x, m: L.GRU(U, return_sequences=True, zero_output_for_mask=True)(x, mask=m),
    "zeros, backwards": lambda x, m: L.SimpleRNN(
        U, return_sequences=True, zero_output_for_mask=True, go_backwards=True
    )(x, mask=m),
    "states given": lambda x, m: L.GRU(U, return_sequences=True)(x, mask=m, initial_state=K.tanh(L.Dense(U)(x[:, 0]))),
    "both": lambda x, m: L.Bidirectional(L.LSTM(U, return_sequences=True))(x, mask=m),
    "output is no state": lambda x, m: L.RNN(Leaky(U), return_sequences=True)(x, mask=m),
}


def agrees(model: keras.Model, data: list[np.ndarray]) -> None:
    for w in model.weights:
        w.assign(w + RNG.normal(size=w.shape) * 0.2)
    graph = trace_model(model)
    assert not [n.name for n in graph if n.op == "float"]
    wanted = keras.tree.flatten(model(data if len(data) > 1 else data[0]))
    for want, found in zip(wanted, evaluate(graph, data), strict=True):
        np.testing.assert_allclose(found, want, atol=2e-6)


@pytest.mark.parametrize("name", PLAIN)
def test_computes_what_keras_does(name: str) -> None:
    inputs = keras.Input((STEPS, C))
    agrees(keras.Model(inputs, PLAIN[name](inputs)), [X])


@pytest.mark.parametrize("name", MASKED)
def test_hidden_steps_change_nothing(name: str) -> None:
    inputs = [keras.Input((STEPS, C)), keras.Input((STEPS,))]
    agrees(keras.Model(inputs, MASKED[name](inputs[0], inputs[1] > 0.5)), [X, SEEN.astype(np.float32)])


def test_all_steps_have_one_kernel() -> None:
    inputs = keras.Input((STEPS, C))
    graph = trace_model(keras.Model(inputs, L.LSTM(U)(inputs)))
    kernels = [n.weights["kernel"] for n in graph if n.op == "dense"]
    assert len({k.tobytes() for k in kernels}) == 4  # of gates and candidates, from inputs and states
    assert len(kernels) == 2 + 2 * (STEPS - 1)
