"""Scales per channel change no function, and are taken where one grid costs bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from keras import layers as L
from keras import ops as K

from kquant.graph.ops import evaluate
from kquant.graph.transforms.channel_scales import candidates, scale_channels, scales_of
from kquant.graph.transforms.expand_normalization import expand_normalization
from kquant.graph.transforms.prepare import prepare_graph
from tests.support.tracing import build

T, C = 4, 6
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, T, C)).astype(np.float32)


def block(x: Any) -> Any:
    """A pre- and a post-normalized residual block, and a position."""
    x = L.Dense(C)(x) + np.arange(T * C, dtype=np.float32).reshape(T, C)
    y = L.LayerNormalization()(x)
    x = x + L.Dense(C)(L.Dense(8, activation="relu")(y))
    x = L.RMSNormalization()(x)
    x = L.LayerNormalization()(x + L.Dense(C)(x))
    return L.Dense(3)(x)


@pytest.mark.parametrize("seed", range(4))
def test_the_function_stays(seed: int) -> None:
    graph = prepare_graph(build(block, (T, C), seed=seed))
    names = candidates(graph)
    assert sum(graph[n].op == "add" for n in names) == 3 and sum(graph[n].op == "normalize" for n in names) == 3
    rng = np.random.default_rng(seed)
    scales = {n: np.exp(rng.normal(size=C)) for n in names if rng.random() < 0.8}
    scaled = scale_channels(graph, scales)
    want = np.asarray(evaluate(graph, [X])[0])
    for g in (scaled, expand_normalization(scaled)):
        np.testing.assert_allclose(evaluate(g, [X])[0], want, rtol=1e-3, atol=1e-4)


def test_tensors_are_divided_by_their_scales() -> None:
    graph = prepare_graph(build(block, (T, C)))
    names = [n for n in candidates(graph) if graph[n].op in ("add", "normalize")]
    scales = {n: np.exp(RNG.normal(size=C)) for n in names}
    before, after = evaluate(graph, [X], names), evaluate(scale_channels(graph, scales), [X], names)
    for name, x, y in zip(names, before, after, strict=True):
        np.testing.assert_allclose(y, x / scales[name], rtol=1e-3, atol=1e-4)


def test_what_others_read_is_no_candidate() -> None:
    def function(x: Any) -> Any:
        y = L.LayerNormalization()(x)
        return K.softmax(y) + L.Dense(C)(y)

    assert not candidates(prepare_graph(build(function, (T, C))))


def test_scales_are_taken_where_they_pay() -> None:
    assert scales_of(np.asarray([1.0, 0.9, 0.7])) is None and scales_of(np.zeros(3)) is None
    found = scales_of(np.asarray([8.0, 1.0, 0.5, 0.0]))
    assert found is not None
    np.testing.assert_allclose(found, [1, 1 / 8, 1 / 16, 1e-3])
    half = scales_of(np.asarray([8.0, 1.0, 0.5, 0.0]), 0.5)
    assert half is not None
    np.testing.assert_allclose(half, np.sqrt(found))
