"""Normalizations in plain operations become one operation that computes the same; what is none does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from keras import ops as K

from kquant.graph.transforms.prepare import prepare_graph
from tests.support.tracing import assert_equal, build, ops

LINE = (7, 6)
GAMMA = np.asarray([1.0, -2.0, 0.5, 3.0, 1.5, 0.1], np.float32)


def mean(x: Any, axis: Any = -1) -> Any:
    return K.mean(x, axis=axis, keepdims=True)


def layer(x: Any, axis: Any = -1) -> Any:
    d = x - mean(x, axis)
    return d * K.rsqrt(mean(d * d, axis) + 0.3)


def of_moments(x: Any) -> Any:
    center, variance = K.moments(x, axes=[-1], keepdims=True)
    return (x - center) * (K.rsqrt(variance + 0.3) * GAMMA) + 0.5


WRITTEN: dict[str, Callable[[Any], Any]] = {
    "layer": layer,
    "layer over places": lambda x: layer(x, 1),
    "layer over all": lambda x: layer(x, (1, 2)),
    "of moments, gamma on the root": of_moments,
    "of a variance": lambda x: (x - mean(x)) * K.rsqrt(K.var(x, axis=-1, keepdims=True) + 0.1),
    "divided": lambda x: (x - mean(x)) / K.sqrt(K.var(x, axis=-1, keepdims=True) + 0.1),
    "a power": lambda x: (x - mean(x)) * (K.var(x, axis=-1, keepdims=True) + 0.1) ** -0.5,
    "difference of squares": lambda x: (x - mean(x)) * K.rsqrt(mean(K.square(x)) - K.square(mean(x)) + 0.1),
    "root mean square": lambda x: x * K.rsqrt(mean(x * x) + 1e-6) * GAMMA,
    "scaled": lambda x: x * K.rsqrt(3.0 * mean(x * x) + 0.5),
    "unit length": lambda x: x * K.rsqrt(K.maximum(K.sum(x * x, axis=-1, keepdims=True), 0.01)),
    "unit length over places": lambda x: K.rsqrt(K.maximum(K.sum(x * x, axis=1, keepdims=True), 0.01)) * x,
}
OTHERS: dict[str, Callable[[Any], Any]] = {
    "another tensor": lambda x: (x + 1.0) * K.rsqrt(mean(x * x) + 0.1),
    "not centered": lambda x: x * K.rsqrt(K.var(x, axis=-1, keepdims=True) + 0.1),
    "other axes": lambda x: (x - mean(x, 1)) * K.rsqrt(mean(K.square(x - mean(x, -1))) + 0.1),
    "a root alone": lambda x: K.rsqrt(mean(x * x) + 0.1),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_is_recognized(name: str) -> None:
    model = build(WRITTEN[name], LINE)
    graph = prepare_graph(model)
    assert ops(graph).count("normalize") == 1 and not {"rsqrt", "function", "sub", "float"} & set(ops(graph))
    assert_equal(graph, model)


@pytest.mark.parametrize("name", OTHERS)
def test_is_no_normalization(name: str) -> None:
    model = build(OTHERS[name], LINE)
    graph = prepare_graph(model)
    assert "normalize" not in ops(graph)
    assert_equal(graph, model)
