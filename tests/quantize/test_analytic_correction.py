"""Analytic bias correction restores means that rounding moved."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from kquant.config.specs import WEIGHTS
from kquant.graph.ir import Graph
from kquant.graph.moments import Moments
from kquant.graph.ops import evaluate, op_of, weight_of, weight_view
from kquant.graph.transforms import prepare_graph
from kquant.grids.grid import Grid, fake_quantize, grid_from_range
from kquant.grids.ranges import weight_range
from kquant.quantize.analytic_correction import correct_biases_analytically
from kquant.quantize.moments import linear_mean
from tests.support.tracing import build

L = keras.layers


def grids(graph: Graph, bits: int = 3, per_channel: bool = False) -> dict[str, Grid]:
    """Min-max grids of all linear operations."""
    spec, found = WEIGHTS.override({"bits": bits, "per_channel": per_channel}), {}
    for node in graph:
        if op_of(node).linear:
            axis = weight_of(node).channels if per_channel else None
            low, high = weight_range("min_max", weight_view(node), spec, axis)
            found[node.name] = grid_from_range(low, high, spec, axis)
    return found


def output_mean(graph: Graph, x: np.ndarray) -> np.ndarray:
    y = np.asarray(evaluate(graph, [x])[0], np.float64)
    return y.reshape(-1, y.shape[-1]).mean(0)


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "dense": (lambda: L.Dense(6), (10,)),
    "conv": (lambda: L.Conv2D(6, 3, padding="same"), (6, 6, 4)),
    "strided": (lambda: L.Conv2D(6, 3, strides=2, padding="same"), (6, 6, 4)),
    "grouped": (lambda: L.Conv2D(6, 3, groups=2), (6, 6, 4)),
    "depthwise": (lambda: L.DepthwiseConv2D(3, padding="same", depth_multiplier=2), (6, 6, 4)),
    "transpose": (lambda: L.Conv2DTranspose(6, 3, strides=2, padding="same"), (6, 6, 4)),
}


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_one_layer_keeps_its_mean(name, per_channel):
    """Inputs whose mean is the given one at every place: the corrected mean is exact, borders included."""
    layer, shape = LAYERS[name]
    graph = prepare_graph(build(lambda x: layer()(x), shape))
    rng = np.random.default_rng(0)
    mean = rng.normal(1, 1, shape[-1])
    half = rng.normal(0, 1, (20, *shape))
    x = (mean + np.concatenate([half, -half])).astype(np.float32)
    weights = grids(graph, per_channel=per_channel)
    moments = Moments.normal(mean, np.ones_like(mean))
    result, report = correct_biases_analytically(graph, weights, {graph.inputs[0]: moments})
    assert set(report.corrected) == set(weights) and not report.skipped
    np.testing.assert_allclose(output_mean(result, x), output_mean(graph, x), atol=1e-4)
    node = result[next(iter(weights))]
    view = weight_view(node)
    np.testing.assert_array_equal(fake_quantize(view, weights[node.name]), view)  # on its grid
    uncorrected = graph[node.name].with_weights(kernel=node.weights["kernel"])
    moved = output_mean(graph.rebuild([uncorrected if n.name == node.name else n for n in graph]), x)
    assert np.abs(moved - output_mean(graph, x)).max() > 0.05


def network(x: Any) -> Any:
    for filters in (16, 16):
        x = L.ReLU(6.0)(L.BatchNormalization(epsilon=1e-6)(L.Conv2D(filters, 3, padding="same", use_bias=False)(x)))
    return L.Dense(8)(L.GlobalAveragePooling2D()(x))


def normalized(seed: int = 0) -> tuple[Graph, np.ndarray]:
    """A network whose batch normalizations hold the statistics of the data, as training leaves them."""
    x = np.random.default_rng(seed).normal(size=(200, 8, 8, 3)).astype(np.float32)
    model, y = build(network, (8, 8, 3), seed=seed), x
    for layer in model.layers[1:]:
        if isinstance(layer, L.BatchNormalization):
            layer.moving_mean.assign(np.asarray(y).mean((0, 1, 2)))
            layer.moving_variance.assign(np.asarray(y).var((0, 1, 2)))
        y = layer(y)
    return prepare_graph(model), x


def test_the_error_of_the_means_shrinks_through_a_network():
    graph, x = normalized()
    moments = Moments.normal(np.zeros(3), np.ones(3))
    weights = grids(graph, bits=4)
    result, _ = correct_biases_analytically(graph, weights, {graph.inputs[0]: moments})
    plain = graph.rebuild(
        n.with_weights(kernel=result[n.name].weights["kernel"]) if n.name in weights else n for n in graph
    )
    expected = output_mean(graph, x)
    before, after = (np.abs(output_mean(g, x) - expected).mean() for g in (plain, result))
    assert after < 0.35 * before


def test_the_shift_is_the_formula_and_the_graph_is_untouched():
    graph, _ = normalized()
    before = {n.name: {k: w.copy() for k, w in n.weights.items()} for n in graph}
    weights = grids(graph)
    mean = np.asarray([0.1, 0.2, 0.3])
    result, report = correct_biases_analytically(graph, weights, {graph.inputs[0]: Moments.normal(mean, np.ones(3))})
    node = next(n for n in graph if n.op == "conv2d")
    error = result[node.name].weights["kernel"].astype(float) - node.weights["kernel"]
    shift = -linear_mean(node, error, mean, graph[node.inputs[0]].shape)
    np.testing.assert_allclose(report.corrected[node.name], shift)
    np.testing.assert_allclose(result[node.name].weights["bias"], node.weights["bias"] + shift, rtol=1e-5)
    for n in graph:
        for k, w in n.weights.items():
            np.testing.assert_array_equal(w, before[n.name][k])


def test_without_moments_a_layer_is_quantized_and_reported():
    graph = prepare_graph(build(lambda x: L.Dense(3)(L.Dense(4, activation="relu")(x)), (5,)))
    weights = grids(graph)
    result, report = correct_biases_analytically(graph, weights)
    assert not report.corrected and set(report.skipped) == set(weights)
    assert all(graph.inputs[0] in why for why in report.skipped.values())
    for name, grid in weights.items():
        np.testing.assert_array_equal(result[name].weights["bias"], graph[name].weights["bias"])
        np.testing.assert_array_equal(
            result[name].weights["kernel"], fake_quantize(graph[name].weights["kernel"], grid)
        )


def test_only_the_layers_named_change():
    graph, _ = normalized()
    weights = grids(graph)
    name = next(iter(weights))
    result, report = correct_biases_analytically(graph, {name: weights[name]})
    assert set(report.corrected) == {name}  # the input is a colour image, whose moments are estimated
    assert all(result[n.name] is n for n in graph if n.name != name)
