"""Activation functions compute what Keras computes, however they are written."""

from __future__ import annotations

from typing import Any

import keras
import pytest

from tests.support.tracing import build, ops, traced

L = keras.layers
A = keras.activations

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
    **{name: ["function"] for name in ("tanh_shrink", "soft_shrink", "hard_shrink", "sparse_plus", "sparse_sigmoid")},
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


def test_custom_activation_function_of_raw_tensorflow_stays_float() -> None:
    import tensorflow as tf

    assert ops(traced(build(L.Dense(4, activation=tf.math.softplus), (6,)))) == ["dense", "float"]
