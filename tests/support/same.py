"""Equality of quantized graphs."""

import numpy as np

from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import Grid


def assert_same_grid(a: Grid | None, b: Grid | None):
    assert (a is None) == (b is None)
    if a is not None and b is not None:
        np.testing.assert_array_equal(a.scale, b.scale)
        np.testing.assert_array_equal(a.zero_point, b.zero_point)
        assert (a.qmin, a.qmax, a.axis) == (b.qmin, b.qmax, b.axis)


def assert_same(a: QuantizedGraph, b: QuantizedGraph):
    for field in ("inputs", "outputs", "input_names", "output_names", "name"):
        assert getattr(a.graph, field) == getattr(b.graph, field)
    assert set(a.graph.nodes) == set(b.graph.nodes)
    for node in a.graph:
        other = b.graph[node.name]
        for field in ("op", "inputs", "shape", "dtype"):
            assert getattr(node, field) == getattr(other, field), node.name
        assert dict(node.attrs) == dict(other.attrs)
        if node.op != "float":
            assert set(node.weights) == set(other.weights)
        for key, value in node.weights.items():
            np.testing.assert_array_equal(other.weights[key], value)
        assert_same_grid(a.activations.get(node.name), b.activations.get(node.name))
        assert_same_grid(a.weights.get(node.name), b.weights.get(node.name))
