"""Needless data movement disappears, and the function stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from kquant.graph.ir import Graph
from kquant.graph.tracing.trace import trace_model
from kquant.graph.transforms.simplify import absorb_padding, simplify
from tests.support.tracing import assert_equal, build, ops

L = keras.layers
k = keras.ops
IMAGE = (6, 8, 4)


def simplified(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Graph:
    model = build(function, *shapes)
    graph = simplify(trace_model(model))
    assert_equal(graph, model)
    return graph


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: k.reshape(k.reshape(x, (-1, 4, 48)), (-1, 12, 16)), ["reshape"]),
        (lambda x: k.reshape(k.reshape(x, (-1, 4, 48)), (-1, *IMAGE)), []),
        (lambda x: k.transpose(k.transpose(x, (0, 3, 1, 2)), (0, 2, 3, 1)), []),
        (lambda x: k.transpose(k.transpose(x, (0, 3, 1, 2)), (0, 3, 1, 2)), ["transpose"]),
        (lambda x: L.ReLU()(k.clip(x, -1.0, 1.0)), ["clip"]),
        (lambda x: k.clip(k.relu(x), -5.0, -1.0), ["clip"]),
        (lambda x: k.relu(k.minimum(x, 1.0)), ["clip"]),
        (lambda x: k.tanh(k.reshape(x, (-1, 4, 48))), ["tanh", "reshape"]),
        (lambda x: k.reshape(x, (-1, 48, 4)) * np.arange(4.0), ["affine", "reshape"]),
        (lambda x: k.reshape(x, (-1, 4, 48)) * np.arange(48.0), ["reshape", "affine"]),
        (lambda x: L.Cropping2D(0)(x), []),
        (lambda x: L.AveragePooling2D((6, 8))(x), ["mean"]),
        (lambda x: L.Flatten()(L.AveragePooling2D((6, 8), strides=1)(x)), ["mean", "reshape"]),
        (lambda x: L.AveragePooling2D((6, 8), padding="same")(x), ["avg_pool2d"]),
        (lambda x: L.AveragePooling2D((6, 4))(x), ["avg_pool2d"]),
        (lambda x: L.MaxPooling2D((6, 8))(x), ["max_pool2d"]),
    ],
)
def test_rules(function: Callable[[Any], Any], expected: list[str]) -> None:
    assert ops(simplified(function, IMAGE)) == expected


def test_value_that_others_read_is_kept() -> None:
    def function(x: Any) -> Any:
        y = k.reshape(x, (-1, 48, 4))
        return y, k.relu(y), k.reshape(y, (-1, 192))

    assert sorted(ops(simplified(function, IMAGE))) == ["clip", "reshape", "reshape"]


def test_one_dimensional_convolutions_meet() -> None:
    def function(x: Any) -> Any:
        for _ in range(3):
            x = L.Conv1D(4, 3, padding="same", activation="relu")(x)
        return x

    assert ops(simplified(function, (9, 4))) == ["reshape", *["conv2d", "clip"] * 3, "reshape"]


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
@pytest.mark.parametrize("strides", [1, 2, 3])
@pytest.mark.parametrize("kernel", [2, 3, 5])
@pytest.mark.parametrize("paddings", [((0, 1), (0, 1)), ((1, 1), (1, 1)), ((2, 2), (2, 2)), ((1, 0), (1, 0))])
def test_padding_is_absorbed_exactly_where_same_padding_equals_it(
    size: tuple[int, int], strides: int, kernel: int, paddings: Any
) -> None:
    layer = L.Conv2D(2, kernel, strides=strides)
    model = build(lambda x: layer(L.ZeroPadding2D(paddings)(x)), (*size, 2))
    graph = absorb_padding(trace_model(model))
    assert_equal(graph, model)
    same = build(L.Conv2D(2, kernel, strides=strides, padding="same"), (*size, 2))
    same.set_weights(model.get_weights())
    x = np.random.default_rng(0).normal(size=(1, *size, 2)).astype("float32")
    a, b = np.asarray(model(x)), np.asarray(same(x))
    equal = a.shape == b.shape and bool(np.allclose(a, b, atol=1e-5))
    assert (ops(graph) == ["conv2d"]) == equal


def test_other_padding_is_kept() -> None:
    for function in (
        lambda x: L.Conv2D(2, 3)(k.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1.0)),
        lambda x: L.Conv2D(2, 3)(k.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")),
        lambda x: L.Conv2D(2, 3)(k.pad(x, ((0, 0), (1, 1), (1, 1), (0, 1)))),
    ):
        assert ops(absorb_padding(trace_model(build(function, IMAGE)))) == ["pad", "conv2d"]
