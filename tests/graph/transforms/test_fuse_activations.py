"""Clips fuse into the operation in front of them exactly where nobody needs the unclipped value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import pytest

from kquant.graph.ir import Graph
from kquant.graph.tracing.trace import trace_model
from kquant.graph.transforms.fuse_activations import fuse_activations
from tests.support.tracing import assert_equal, build, ops

L = keras.layers
IMAGE = (6, 6, 4)


def fused(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Graph:
    model = build(function, *shapes)
    graph = fuse_activations(trace_model(model))
    assert_equal(graph, model)
    return graph


@pytest.mark.parametrize(
    "layer",
    [
        lambda: L.Conv2D(3, 3, name="f"),
        lambda: L.DepthwiseConv2D(3, name="f"),
        lambda: L.Conv2DTranspose(3, 3, name="f"),
        lambda: L.Dense(3, name="f"),
        lambda: L.BatchNormalization(name="f"),
    ],
)
def test_into_linear_operations(layer: Callable[[], Any]) -> None:
    graph = fused(lambda x: L.ReLU(max_value=6.0)(layer()(x)), IMAGE)
    assert len(ops(graph)) == 1 and graph.outputs == ("f",)
    assert graph["f"].attrs["clip"] == (0.0, 6.0)


@pytest.mark.parametrize("layer", [L.Add, L.Subtract, L.Multiply])
def test_into_arithmetic(layer: Any) -> None:
    graph = fused(lambda x, y: L.ReLU()(layer()([x, y])), IMAGE, IMAGE)
    assert len(ops(graph)) == 1 and graph[graph.outputs[0]].attrs["clip"] == (0.0, None)


def test_readers_of_the_clip_read_the_producer() -> None:
    graph = fused(lambda x: L.Dense(2, name="b")(L.Dense(3, activation="relu", name="a")(x)), (4,))
    assert list(graph.nodes)[1:] == ["a", "b"] and graph["b"].inputs == ("a",)


def test_not_where_the_unclipped_value_is_needed() -> None:
    def shared(x: Any) -> Any:
        y = L.Dense(3)(x)
        return L.Add()([L.ReLU()(y), y])

    assert ops(fused(shared, (4,))) == ["dense", "clip", "add"]

    def returned(x: Any) -> Any:
        y = L.Dense(3)(x)
        return y, L.ReLU()(y)

    assert ops(fused(returned, (4,))) == ["dense", "clip"]


def test_not_into_other_operations_and_once_only() -> None:
    assert ops(fused(lambda x: L.ReLU()(L.MaxPooling2D()(x)), IMAGE)) == ["max_pool2d", "clip"]
    graph = fused(lambda x: keras.ops.clip(L.ReLU()(L.Dense(3)(x)), 0.5, 1.0), (4,))
    assert ops(graph) == ["dense", "clip"]
