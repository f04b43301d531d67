"""Absorption of high biases is exact where no pre-activation falls below c."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from kquant.graph.ir import Graph
from kquant.graph.ops import clip_of, evaluate
from kquant.graph.transforms import prepare_graph
from kquant.graph.transforms.absorb_bias import AbsorbReport, absorb_bias
from tests.support.tracing import build

L = keras.layers
IMAGE = (8, 8, 3)


def conv(*args: Any, **options: Any) -> Any:
    return lambda x: L.BatchNormalization()(L.Conv2D(*args, use_bias=False, **options)(x))


def two_layers(between: Any, last: Any, activation: Any = L.ReLU) -> Graph:
    """A batch-normalized layer with high and low offsets, an activation, something between, a linear layer."""
    model = build(lambda x: last(between(activation()(conv(6, 3)(x)))), IMAGE)
    norm = next(layer for layer in model.layers if isinstance(layer, L.BatchNormalization))
    norm.beta.assign([40.0, 25.0, 0.0, -3.0, 60.0, 90.0])
    return prepare_graph(model)


def inputs(samples: int = 8) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(samples, *IMAGE)).astype(np.float32)


def source_of(graph: Graph) -> str:
    return next(n.name for n in graph if n.stats)


def observed(graph: Graph, x: np.ndarray) -> dict[str, np.ndarray]:
    name = source_of(graph)
    return {name: np.asarray(evaluate(graph, [x], [name])[0]).reshape(-1, 6).min(0)}


def assert_same(graph: Graph, other: Graph, x: np.ndarray, tolerance: float = 1e-5) -> None:
    want, got = (np.asarray(evaluate(g, [x])[0]) for g in (graph, other))
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())


def absorbed(graph: Graph, x: np.ndarray) -> tuple[Graph, AbsorbReport]:
    """With the smallest values seen on x, for which the function must be the same on x."""
    result, report = absorb_bias(graph, lows=observed(graph, x))
    assert_same(graph, result, x)
    return result, report


def identity(x: Any) -> Any:
    return x


PLACES = {
    "dense": (lambda x: L.Flatten()(x), L.Dense(4)),
    "dense_places": (identity, L.Dense(4)),
    "conv1x1": (identity, L.Conv2D(4, 1, padding="same")),
    "strided1x1": (identity, L.Conv2D(4, 1, strides=2, padding="same")),
    "valid": (identity, L.Conv2D(4, 3)),
    "grouped": (identity, L.Conv2D(4, 2, groups=2)),
    "depthwise": (identity, L.DepthwiseConv2D(3, depth_multiplier=2)),
    "average": (lambda x: L.AveragePooling2D(2, padding="same")(x), L.Conv2D(4, 1)),
    "maximum": (lambda x: L.MaxPooling2D(3, 2, padding="same")(x), L.Conv2D(4, 1)),
    "global": (lambda x: L.GlobalAveragePooling2D()(x), L.Dense(4)),
    "resize": (lambda x: L.UpSampling2D(2, interpolation="bilinear")(x), L.Conv2D(4, 1)),
    "reflect": (lambda x: keras.ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect"), L.Conv2D(4, 3)),
    "slice": (lambda x: x[:, 1:, :, ::2], L.Conv2D(4, 2)),
}


@pytest.mark.parametrize("activation", [L.ReLU, lambda: L.ReLU(70.0)])
@pytest.mark.parametrize("name", PLACES)
def test_absorption_is_exact(name, activation):
    between, last = PLACES[name]
    last = type(last).from_config({**last.get_config(), "name": None})
    graph, x = two_layers(between, last, activation), inputs()
    result, report = absorbed(graph, x)
    c = report.absorbed[source_of(graph)]
    assert (c > 0).sum() >= 3 and c[3] == 0 and not report.skipped
    np.testing.assert_allclose(c, np.maximum(0, observed(graph, x)[source_of(graph)]))


BLOCKED = {
    "same": (identity, L.Conv2D(4, 3, padding="same"), "zeros beside"),
    "transpose": (identity, L.Conv2DTranspose(4, 3), "zeros beside"),
    "pad": (lambda x: L.ZeroPadding2D(2)(x), L.Conv2D(4, 3), "does not commute"),
    "leaky": (lambda x: L.LeakyReLU(0.1)(x), L.Conv2D(4, 1), "does not commute"),
}


@pytest.mark.parametrize("name", BLOCKED)
def test_what_sees_zeros_or_does_not_commute_is_left_alone(name):
    between, last, why = BLOCKED[name]
    last = type(last).from_config({**last.get_config(), "name": None})
    graph = two_layers(between, last)
    result, report = absorb_bias(graph)
    assert not report.absorbed and why in report.skipped[source_of(graph)]
    assert all(result[n.name] is n for n in graph)


def test_statistics_decide_without_data():
    graph = two_layers(identity, L.Conv2D(4, 1), lambda: L.ReLU(50.0))
    name = source_of(graph)
    node = graph[name]
    result, report = absorb_bias(graph, sigmas=2.0)
    mean, std = node.stats["mean"].astype(float), node.stats["std"].astype(float)
    c, most = report.absorbed[name], np.clip(mean - 2 * std, 0, 50)
    assert np.all(c >= 0) and np.all(c <= most + 1e-9) and c.max() > 1
    high = np.clip(mean + 6 * std, 0, 50)  # the range becomes as narrow as with the most, with the least
    assert (high - c).max() == pytest.approx((high - most).max())
    np.testing.assert_allclose(high[c > 0] - c[c > 0], (high - c).max())
    moved = result[name]
    np.testing.assert_allclose(moved.stats["mean"], mean - c, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moved.stats["std"], std)
    np.testing.assert_allclose(moved.weights["bias"], node.weights["bias"] - c, rtol=1e-5, atol=1e-5)
    lo, hi = clip_of(moved)
    assert lo == 0
    np.testing.assert_allclose(hi, 50 - c, rtol=1e-6)


def test_where_a_pre_activation_is_below_c_the_error_is_what_was_missed():
    graph, x = two_layers(identity, L.Conv2D(4, 1)), inputs()
    name = source_of(graph)
    low = observed(graph, x)[name] + np.asarray([0, 0.5, 0, 0, 0, 0])
    result, _ = absorb_bias(graph, lows={name: low})
    missed = np.maximum(low[1] - np.asarray(evaluate(graph, [x], [name])[0])[..., 1], 0)
    error = np.asarray(evaluate(result, [x])[0]) - np.asarray(evaluate(graph, [x])[0])
    expected = missed[..., None] * graph[graph.outputs[0]].weights["kernel"][0, 0, 1]
    assert missed.max() > 0.4
    np.testing.assert_allclose(error, expected, atol=1e-3)


def test_all_readers_must_allow_it():
    def both(x: Any) -> Any:
        return L.Conv2D(4, 1)(x) + L.Conv2D(4, 3, padding="same")(x)

    graph = two_layers(identity, both)
    assert "zeros beside" in absorb_bias(graph)[1].skipped[source_of(graph)]
    graph, x = two_layers(identity, lambda x: L.Conv2D(4, 1)(x) + L.Dense(4)(x)), inputs()
    absorbed(graph, x)


def test_layers_without_statistics_or_relu():
    graph = prepare_graph(build(lambda x: L.Dense(3)(L.Dense(4, activation="relu")(x)), (5,)))
    _, report = absorb_bias(graph)
    assert not report.absorbed and "no batch normalization" in next(iter(report.skipped.values()))
    graph = prepare_graph(build(lambda x: L.Conv2D(4, 1)(conv(6, 3)(x)), IMAGE))
    _, report = absorb_bias(graph)
    assert not report.absorbed and not report.skipped


def test_nothing_to_gain_changes_nothing():
    graph = two_layers(identity, L.Conv2D(4, 1), lambda: L.ReLU(6.0))
    result, report = absorb_bias(graph, sigmas=1e6)
    assert not report.absorbed[source_of(graph)].any()
    assert all(result[n.name] is n for n in graph)


def test_chains_are_absorbed_one_after_the_other():
    def chain(x: Any) -> Any:
        for _ in range(3):
            x = L.ReLU()(conv(5, 1)(x))
        return L.Conv2D(2, 1)(x)

    model = build(chain, IMAGE)
    for layer in model.layers:
        if isinstance(layer, L.BatchNormalization):
            layer.beta.assign(np.linspace(10, 60, 5))
    graph, x = prepare_graph(model), inputs()
    names = [n.name for n in graph if n.stats]
    lows = {k: np.asarray(v).reshape(-1, 5).min(0) for k, v in zip(names, evaluate(graph, [x], names), strict=True)}
    result, report = absorb_bias(graph, lows=lows)
    assert set(report.absorbed) == set(names)
    assert_same(graph, result, x)
    after = [np.asarray(v).reshape(-1, 5).min(0) for v in evaluate(result, [x], names)]
    for value, name in zip(after, names, strict=True):
        assert np.all(value <= 1e-3 * np.maximum(lows[name], 1))
