"""Activation functions compute what Keras computes, however they are written."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from kquant.graph.transforms import prepare_graph
from tests.support.tracing import build, ops, traced

L = keras.layers
A = keras.activations

NEWER = ("tanh_shrink", "soft_shrink", "hard_shrink", "sparse_plus", "sparse_sigmoid")
PRIMITIVES = {
    "linear": [],
    "relu": ["clip"],
    "relu6": ["clip"],
    "leaky_relu": ["leaky_relu"],
    "sigmoid": ["logistic"],
    "tanh": ["tanh"],
    "hard_tanh": ["clip"],
    "hard_sigmoid": ["affine", "clip", "affine"],
    "hard_silu": ["hard_swish"],
    "silu": ["logistic", "mul"],
    "gelu": ["gelu"],
    "elu": ["elu"],
    "softmax": ["softmax"],
    **{
        name: ["function"]
        for name in ("selu", "softplus", "exponential", "mish", "softsign", "celu", "squareplus", "log_sigmoid")
    },
    **{name: ["function"] for name in NEWER if hasattr(A, name)},
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_activation_as_argument_layer_and_operation(name: str) -> None:
    assert ops(traced(build(L.Dense(4, activation=name), (5, 6)))) == ["dense", *PRIMITIVES[name]]
    assert ops(traced(build(L.Activation(name), (5, 6)))) == PRIMITIVES[name]
    if name not in ("linear", "hard_silu", "mish"):  # keras.activations has these for eager tensors only
        assert ops(traced(build(A.get(name), (5, 6)))) == PRIMITIVES[name]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (L.ReLU(), ["clip"]),
        (L.ReLU(max_value=6.0), ["clip"]),
        (L.ReLU(negative_slope=0.1), ["leaky_relu"]),
        (L.ReLU(max_value=2.0, negative_slope=0.1), ["leaky_relu", "clip"]),
        (L.ReLU(threshold=0.5), ["function"]),
        (L.ReLU(2.0, negative_slope=0.2, threshold=0.5), ["function"]),
        (L.LeakyReLU(0.3), ["leaky_relu"]),
        (L.ELU(), ["elu"]),
        (L.ELU(0.5), ["function"]),
        (L.Softmax(), ["softmax"]),
        (L.Softmax(axis=1), ["transpose", "softmax", "transpose"]),
        (L.PReLU(), ["prelu"]),
        (L.PReLU(shared_axes=[1, 2]), ["prelu"]),
    ],
)
def test_activation_layers(layer: Any, expected: list[str]) -> None:
    assert ops(traced(build(layer, (4, 5, 3)))) == expected


def test_operations_with_settings() -> None:
    k = keras.ops
    for function, expected in [
        (lambda x: k.gelu(x, approximate=True), ["gelu"]),
        (lambda x: k.gelu(x, approximate=False), ["gelu"]),
        (lambda x: k.leaky_relu(x, 0.3), ["leaky_relu"]),
        (lambda x: k.clip(x, -1.0, 0.5), ["clip"]),
        (lambda x: k.softmax(x, axis=1), ["transpose", "softmax", "transpose"]),
        (lambda x: A.relu(x, max_value=3.0), ["clip"]),
        (k.hard_silu, ["hard_swish"]),
        (lambda x: k.elu(x, 0.5), ["function"]),
    ]:
        assert ops(traced(build(function, (5, 6)))) == expected


def test_names_of_an_activation_argument_extend_the_layer() -> None:
    graph = traced(build(L.Dense(4, activation="silu", name="fc"), (6,)))
    assert list(graph.nodes)[1:] == ["fc", "fc/logistic", "fc/mul"]
    assert {n.origin for n in graph if n.op != "input"} == {"fc"}


def test_custom_activation_function_is_traced() -> None:
    def double_relu(x: Any) -> Any:
        return 2.0 * keras.ops.relu(x)

    assert ops(traced(build(L.Dense(4, activation=double_relu), (6,)))) == ["dense", "clip", "affine"]
    assert ops(traced(build(L.Activation(double_relu), (6,)))) == ["clip", "affine"]


RAW = {
    "softplus": tf.math.softplus,
    "composed": lambda x: x * tf.tanh(tf.math.log1p(tf.exp(x))) - tf.square(x) * 0.1,
    "leaky": lambda x: tf.nn.leaky_relu(x, 0.3) + tf.nn.relu6(x) + tf.nn.selu(x),
    "gelu": lambda x: 0.5 * x * (1.0 + tf.math.erf(x / np.sqrt(2.0))),
    "clipped": lambda x: tf.clip_by_value(x, -0.5, 0.75) ** 3.0,
    "choice": lambda x: tf.where(x > 0.25, x / 2.0, -1.0),
}


@pytest.mark.parametrize("name", RAW)
def test_a_function_written_in_tensorflow_is_one_of_one_tensor(name: str) -> None:
    class Curved(L.Layer):
        def call(self, x: Any) -> Any:
            return RAW[name](x)

    assert ops(prepare_graph(build(L.Dense(4, activation=RAW[name]), (6,)))) == ["dense", "function"]
    assert "float" not in ops(traced(build(Curved(), (5, 6))))


def test_swish_of_tensorflow_is_that_of_keras() -> None:
    assert ops(prepare_graph(build(L.Dense(4, activation=tf.nn.swish), (6,)))) == ["dense", "logistic", "mul"]
