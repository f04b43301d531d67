"""Helpers: build a model from a function of tensors, randomize it, compare its graph with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from kquant.graph.ir import Graph
from kquant.graph.ops import evaluate
from kquant.graph.tracing.trace import trace_model

Shape = tuple[int, ...]


def build(function: Callable[..., Any], *shapes: Shape, dtype: str = "float32", seed: int = 0) -> keras.Model:
    """A functional model of a function of tensors, with random weights."""
    inputs = [keras.Input(s, dtype=dtype) for s in shapes]
    return randomize(keras.Model(inputs if len(inputs) > 1 else inputs[0], function(*inputs)), seed)


def randomize(model: keras.Model, seed: int = 0) -> keras.Model:
    """Give every weight random values, so that no bias, offset or statistic is at its default."""
    rng = np.random.default_rng(seed)
    for w in model.weights:
        if "float" not in str(w.dtype):
            continue
        if "variance" in w.name:
            w.assign(rng.uniform(0.5, 2.0, w.shape))
        elif "gamma" in w.name:
            w.assign(rng.uniform(0.5, 2.0, w.shape) * rng.choice([-1.0, 1.0], w.shape))
        else:
            w.assign(rng.normal(0.0, 0.5, w.shape))
    return model


def feeds(graph: Graph, model: keras.Model, seed: int = 1, batch: int = 3) -> list[np.ndarray]:
    """Random inputs in the types of the graph: numbers of both signs, or ids and pixels below 5."""
    rng = np.random.default_rng(seed)
    arrays = []
    for name, tensor in zip(graph.inputs, model.inputs, strict=True):
        shape, dtype = (batch, *tensor.shape[1:]), graph[name].dtype
        integers = dtype == "int32" or "int" in str(tensor.dtype)
        values = rng.integers(0, 5, shape) if integers else rng.normal(0.0, 2.0, shape)
        arrays.append(values.astype(dtype))
    return arrays


def assert_equal(graph: Graph, model: keras.Model, tolerance: float = 1e-5) -> None:
    """evaluate(graph) and the model agree on every output, relative to its largest element."""
    x = feeds(graph, model)
    packed = x[0] if isinstance(model, keras.Sequential) else keras.tree.pack_sequence_as(model.input, x)
    expected = [np.asarray(t) for t in keras.tree.flatten(model(packed, training=False))]
    computed = evaluate(graph, x)
    assert len(expected) == len(computed)
    for name, want, got in zip(graph.outputs, expected, computed, strict=True):
        assert got.shape == want.shape, name
        assert tuple(graph[name].shape[1:]) == want.shape[1:], name
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(np.abs(want).max(), 1e-3), err_msg=name)


def traced(model: keras.Model, tolerance: float = 1e-5) -> Graph:
    """The model's graph, having checked that it computes what the model computes."""
    graph = trace_model(model)
    assert_equal(graph, model, tolerance)
    return graph


def ops(graph: Graph) -> list[str]:
    """Operations in order, without inputs."""
    return [n.op for n in graph if n.op != "input"]
