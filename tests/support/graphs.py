"""Hand-made quantized graphs for tests of the writer, and the values that their files should compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kquant.graph.ir import Graph, Node
from kquant.graph.ops import OPS, compute, evaluate, weight_of, weight_view
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import Grid, dequantize, fake_quantize, quantize
from tests.support.litert_files import Resolver, run

KERNELS = {
    "default": Resolver.AUTO,
    "builtin": Resolver.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    "reference": Resolver.BUILTIN_REF,
}
_FIXED = {"softmax": (1 / 256, -128), "logistic": (1 / 256, -128), "tanh": (1 / 128, 0)}
_TIED = frozenset({"reshape", "transpose", "slice", "pad", "max_pool2d", "avg_pool2d", "resize", "reduce_max"})
_TIED |= {"reduce_min", "gather", "top_k"}
_TO_OUTPUT = frozenset({"concat", "maximum", "minimum"})


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def grid(low: float, high: float, bits: int = 8, container: int = 8) -> Grid:
    """An asymmetric grid of `bits` bits; symmetric where the container is int16."""
    if container == 16:
        half = 2 ** (bits - 1) - 1
        return Grid(np.float32(max(-low, high) / half), np.int32(0), -half, half)
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = np.float32((max(high, 0.0) - min(low, 0.0)) / (qmax - qmin))
    return Grid(scale, np.int32(np.clip(np.rint(qmin - min(low, 0.0) / scale), qmin, qmax)), qmin, qmax)


def weight_grid(node: Node, bits: int = 8, per_channel: bool = True) -> Grid | None:
    """A symmetric grid that covers a node's weights."""
    if OPS[node.op].weight is None or node.op == "embedding":
        return None
    view, axis = weight_view(node), weight_of(node).channels
    axis = axis if per_channel else None
    half = 2 ** (bits - 1) - 1
    largest = np.abs(view).max() if axis is None else np.abs(view).max(tuple(k for k in range(view.ndim) if k != axis))
    scale = np.asarray(largest / half, np.float32)
    return Grid(scale, np.zeros(scale.shape, np.int32), -half, half, axis)


def chain(shape: Sequence[int], *nodes: Node, consts: Sequence[Node] = (), dtype: str = "float32") -> Graph:
    """A graph of the input "x" (and "y", if it is read); a node without inputs reads the one before it."""
    table = {c.name: c for c in consts}
    inputs = ("x", "y") if any("y" in n.inputs for n in nodes) else ("x",)
    for name in inputs:
        table[name] = Node(name=name, op="input", shape=(None, *shape), dtype=dtype)
    last = "x"
    for node in nodes:
        table[node.name] = node if node.inputs else node.with_(inputs=(last,))
        last = node.name
    names = tuple(f"user_{name}" for name in inputs)
    return Graph(nodes=table, inputs=inputs, outputs=(last,), input_names=names, output_names=("scores",))


def quantized(
    graph: Graph,
    feeds: Sequence[np.ndarray],
    *,
    bits: int = 8,
    container: int = 8,
    weight_bits: int = 8,
    per_channel: bool = True,
    floats: frozenset[str] = frozenset(),
    grids: Mapping[str, Grid | None] | None = None,
) -> QuantizedGraph:
    """Grids from the float values that `feeds` produce, as the kernels need them."""
    names = list(graph.nodes)
    values = dict(zip(names, evaluate(graph, feeds, names), strict=True))
    activations: dict[str, Grid | None] = {}
    for node in graph:
        if node.dtype != "float32" or node.name in floats or node.op == "float":
            activations[node.name] = None
        elif grids is not None and node.name in grids:
            activations[node.name] = grids[node.name]
        elif node.op in _FIXED:
            scale, zero = _FIXED[node.op] if container == 8 else (1 / 32768, 0)
            limit = 2 ** (container - 1)
            activations[node.name] = Grid(np.float32(scale), np.int32(zero), -limit, limit - 1)
        elif node.op in _TIED:
            activations[node.name] = activations[node.inputs[0]]
        else:
            y = np.asarray(values[node.name])
            activations[node.name] = grid(float(y.min()), float(y.max()), bits, container)
    for node in graph:
        if node.op in _TO_OUTPUT:
            for name in node.inputs:
                activations[name] = activations[node.name]
    weights = {n.name: weight_grid(n, weight_bits, per_channel) for n in graph}
    return QuantizedGraph(graph, activations, weights)


def integers(qgraph: QuantizedGraph, feeds: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The feeds as a user of the integer file gives them."""
    stored = []
    for name, x in zip(qgraph.graph.inputs, feeds, strict=True):
        q = qgraph.activations[name]
        stored.append(x if q is None else quantize(x, q).astype(np.int8 if q.qmax <= 127 else np.int16))
    return stored


def expected(qgraph: QuantizedGraph, node: Node, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Integers of a node: its float function of the dequantized inputs and weights, on its grid."""
    inputs = []
    for name in node.inputs:
        q, source = qgraph.activations[name], qgraph.graph[name]
        if source.op == "const" and q is not None:
            inputs.append(fake_quantize(source.weights["value"], q))
        else:
            inputs.append(tensors[name] if q is None else dequantize(tensors[name], q))
    weights: dict[str, Any] = dict(node.weights)
    w = qgraph.weights.get(node.name)
    if w is not None:
        key = weight_of(node).name
        weights[key] = fake_quantize(weight_view(node), w).reshape(node.weights[key].shape)
    q = qgraph.activations[node.name]
    if node.op == "embedding":
        weights["table"] = fake_quantize(node.weights["table"], q)
    return quantize(np.asarray(compute(node, inputs, weights)), q)


def check_file(
    content: bytes, qgraph: QuantizedGraph, stored: Sequence[np.ndarray], kernels: str = "builtin", lsb: int = 1
) -> dict[str, np.ndarray]:
    """Run a file and compare every integer node with its float function, given the kernels' own inputs.

    The default kernels show their outputs only, so those are compared with the builtin kernels'.
    """
    tensors = run(content, stored, KERNELS[kernels])
    if kernels == "default":
        others = run(content, stored, KERNELS["builtin"])
        for name in qgraph.graph.outputs:
            np.testing.assert_allclose(tensors[name].astype(np.int64), others[name].astype(np.int64), atol=lsb)
        return tensors
    for node in qgraph.graph:
        q = qgraph.activations[node.name]
        if q is None or node.op in ("input", "const"):
            continue
        want = expected(qgraph, node, tensors)
        found = tensors[node.name].astype(np.int64)
        assert found.shape == want.shape, (node.name, found.shape, want.shape)
        # int16 kernels may saturate at -32768 where the grid ends at -32767
        assert found.min() >= q.qmin - (q.qmin == -32767) and found.max() <= q.qmax, node.name
        np.testing.assert_allclose(found, want, atol=lsb, err_msg=f"{node.name} ({kernels})")
    return tensors


def conv(name: str = "conv", *, cin: int = 3, cout: int = 4, size: int = 3, shape: Any = None, **attrs: Any) -> Node:
    """A convolution with random weights."""
    attrs = {"strides": (1, 1), "padding": "same", "dilation": (1, 1), "groups": 1, **attrs}
    g = rng(len(name) + cin)
    kernel = g.normal(size=(size, size, cin // attrs["groups"], cout)).astype(np.float32)
    bias = g.normal(size=cout).astype(np.float32)
    return Node(name=name, op="conv2d", shape=shape, attrs=attrs, weights={"kernel": kernel, "bias": bias})


def depthwise(name: str = "dw", *, c: int = 3, m: int = 1, size: int = 3, shape: Any = None, **attrs: Any) -> Node:
    """A depthwise convolution with random weights."""
    attrs = {"strides": (1, 1), "padding": "same", "dilation": (1, 1), **attrs}
    g = rng(c * 7 + m)
    kernel = g.normal(size=(size, size, c, m)).astype(np.float32)
    bias = g.normal(size=c * m).astype(np.float32)
    return Node(name=name, op="depthwise_conv2d", shape=shape, attrs=attrs, weights={"kernel": kernel, "bias": bias})


def dense(name: str = "dense", *, cin: int, cout: int, shape: Any = None, **attrs: Any) -> Node:
    """A dense layer with random weights."""
    g = rng(cin + cout)
    weights = {
        "kernel": g.normal(size=(cin, cout)).astype(np.float32),
        "bias": g.normal(size=cout).astype(np.float32),
    }
    return Node(name=name, op="dense", shape=shape or (None, cout), attrs=attrs, weights=weights)


def op(
    kind: str, shape: Sequence[int | None], name: str | None = None, inputs: Sequence[str] = (), **attrs: Any
) -> Node:
    """A node without weights."""
    return Node(name=name or kind, op=kind, shape=(None, *shape), inputs=tuple(inputs), attrs=attrs)
