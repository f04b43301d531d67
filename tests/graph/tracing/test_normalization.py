"""Normalizations compute what Keras computes, in one operation and written out."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops as K

from kquant.graph.ops import evaluate
from kquant.graph.transforms.expand_normalization import expand_normalization
from tests.support.tracing import assert_equal, build, feeds, ops, traced

L = keras.layers
IMAGE, LINE = (6, 8, 4), (7, 3)
LAYERS = [
    (L.LayerNormalization(), LINE),
    (L.LayerNormalization(epsilon=0.5, center=False), (12,)),
    (L.LayerNormalization(axis=[1, 2], scale=False), LINE),
    (L.LayerNormalization(axis=1), IMAGE),
    (L.LayerNormalization(axis=(1, -1)), IMAGE),
    (L.RMSNormalization(), LINE),
    (L.RMSNormalization(axis=[-2, -1]), LINE),
    (L.GroupNormalization(2), IMAGE),
    (L.GroupNormalization(-1, epsilon=0.1, scale=False), LINE),
    (L.GroupNormalization(3, axis=1), (6, 5)),
    (L.UnitNormalization(), LINE),
    (L.UnitNormalization(axis=1), IMAGE),
    (L.UnitNormalization(axis=(1, 2)), IMAGE),
    (lambda x: K.normalize(x, axis=1), LINE),
    (lambda x: K.normalize(x, axis=-1, epsilon=5.0), LINE),
    (lambda x: K.layer_normalization(x, np.arange(3.0) - 1, np.ones(3), axis=-1), LINE),
    (lambda x: K.rms_normalization(x, np.arange(3.0) + 1, axis=1), LINE),
]


@pytest.mark.parametrize("layer, shape", LAYERS)
def test_equals_keras(layer: Any, shape: tuple[int, ...]) -> None:
    model = build(layer, shape)
    graph = traced(model)
    assert ops(graph).count("normalize") == 1 and "float" not in ops(graph)
    assert_equal(graph, model)
    expanded = expand_normalization(graph)
    assert not {"normalize", "float"} & set(ops(expanded))
    assert_equal(expanded, model, 2e-5)
    assert expanded.outputs == graph.outputs


@pytest.mark.parametrize("layer, shape", LAYERS)
def test_two_stages_compute_the_same(layer: Any, shape: tuple[int, ...]) -> None:
    model = build(layer, shape)
    graph = traced(model)
    node = next(n for n in graph if n.op == "normalize")
    expanded = expand_normalization(graph, {node.name: (0.1, 1000.0)})
    assert ops(expanded).count("rsqrt") == 2
    assert_equal(expanded, model, 2e-5)


def test_an_input_divided_per_channel_is_normalized_as_before() -> None:
    graph = traced(build(L.LayerNormalization(epsilon=0.1), LINE))
    node = next(n for n in graph if n.op == "normalize")
    x = np.random.default_rng(0).normal(size=(4, *LINE)).astype(np.float32)
    scale = np.asarray([0.25, 3.0, 8.0], np.float32)
    divided = graph.rebuild([n.with_weights(scale=scale) if n is node else n for n in graph])
    want = np.asarray(evaluate(graph, [x])[0])
    for g in (divided, expand_normalization(divided), expand_normalization(divided, {node.name: (1e-3, 50.0)})):
        np.testing.assert_allclose(np.asarray(evaluate(g, [x / scale])[0]), want, atol=2e-5)


def test_zeros_are_normalized_to_beta() -> None:
    model = build(L.LayerNormalization(epsilon=1e-12), LINE)
    graph = expand_normalization(traced(model))
    x = feeds(graph, model)[0] * 0
    np.testing.assert_allclose(evaluate(graph, [x])[0], np.broadcast_to(model.layers[1].beta, x.shape))


def test_what_is_no_normalization_stays_float() -> None:
    for layer in (lambda x: K.normalize(x, axis=0), lambda x: K.normalize(x, order=3)):
        assert "normalize" not in ops(traced(build(layer, LINE)))
