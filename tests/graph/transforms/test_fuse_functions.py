"""Elementwise operations become one function of one tensor, where the target needs a table for it anyway."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from kquant.graph.ops import evaluate
from kquant.graph.transforms import prepare_graph
from tests.support.nodes import CLOSE, normal

k, L = keras.ops, keras.layers
SHAPE = (4, 5, 3)


def prepared(function: Callable[[Any], Any]) -> list[str]:
    """The operations behind a convolution, with the function unchanged."""
    x = inputs = keras.Input(SHAPE)
    x = L.Conv2D(3, 1, bias_initializer="ones")(x)
    model = keras.Model(inputs, function(x))
    graph, feeds = prepare_graph(model), normal(2, *SHAPE)
    for found, expected in zip(evaluate(graph, [feeds]), keras.tree.flatten(model(feeds)), strict=True):
        np.testing.assert_allclose(found, expected, **CLOSE)
    return [n.op for n in graph][2:]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * k.tanh(k.log(1.0 + k.exp(x))),
        lambda x: k.log(k.abs(x) + 1.0),
        lambda x: 1.0 / (k.abs(x) + 1.0),
        lambda x: x / (k.abs(x) + 1.0),
        lambda x: k.where(x > 0, x, 0.2 * x),
        lambda x: k.maximum(k.exp(-k.square(x)), 0.1),
        lambda x: x * k.cast(k.logical_and(x > -1.0, x <= 1.0), "float32"),
        lambda x: 0.5 * x * (1.0 + k.erf(x / np.sqrt(2.0))),
        lambda x: k.sin(L.LeakyReLU()(x)) + k.sigmoid(x),
        lambda x: k.exp(k.reshape(k.exp(x) * 0.1, (-1, 4, 15))),
    ],
)
def test_a_chain_becomes_one_function(function: Callable[[Any], Any]) -> None:
    assert [op for op in prepared(function) if op != "reshape"] == ["function"]


def test_what_has_kernels_stays() -> None:
    assert prepared(lambda x: x * k.sigmoid(x)) == ["logistic", "mul"]
    assert prepared(lambda x: k.tanh(x) - x) == ["tanh", "sub"]


def test_a_function_of_two_tensors_stays_two() -> None:
    def two(x: Any) -> Any:
        return k.exp(x) * L.Conv2D(3, 1)(x)

    assert prepared(two) == ["function", "conv2d", "mul"]


def test_what_others_read_is_computed_once() -> None:
    def shared(x: Any) -> Any:
        y = k.exp(x)
        return [k.log(y + 1.0), L.Conv2D(3, 1)(y)]

    assert sorted(prepared(shared)) == ["conv2d", "function", "function"]
    assert prepared(lambda x: [(y := k.exp(x)), y + 1.0]) == ["function", "affine"]


def test_the_activation_of_a_convolution_is_not_taken_from_it() -> None:
    assert prepared(lambda x: k.exp(k.relu(x))) == ["function"]
    x = inputs = keras.Input(SHAPE)
    graph = prepare_graph(keras.Model(inputs, k.exp(k.relu(L.Conv2D(3, 1, name="c")(x)))))
    assert graph["c"].attrs["clip"] == (0.0, None)


def test_factors_that_differ_between_channels_stay_in_front() -> None:
    factors = np.asarray([1.0, 2.0, 3.0], np.float32)
    assert prepared(lambda x: k.exp(k.tanh(x) * factors)) == ["tanh", "affine", "function"]
