"""Normalizations written out in plain operations, recognized: a mean, squares, a reciprocal root, a product.

    d * rsqrt(mean(d^2) * a + b),   d = x - mean(x) or x,   the means over the same axes, which stay

with the mean of squares in any of the forms mean(d * d), sum(d * d), mean(x * x) - mean(x)^2. On their own the squares
destroy eight bits, and sixteen: the variances of a tensor spread a hundredfold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from kquant.graph.ir import Graph, Node
from kquant.graph.ops import clip_of
from kquant.graph.ops.functions import run

_POINTS = np.logspace(-6, 6, 13).astype(np.float32)


@dataclass(frozen=True)
class _Squares:
    """factor * mean(d^2) + offset, d = `of` less its mean if `center`."""

    of: str
    axes: tuple[int, ...]
    center: bool
    factor: float = 1.0
    offset: float = 0.0
    floor: float = 0.0


def recognize_normalization(graph: Graph) -> Graph:
    """The same function with a "normalize" for each normalization that is written out."""
    graph = _factors_last(graph)
    for root in [n for n in graph if _is_root(graph, n)]:
        squares = _squares(graph, graph[graph[root.name].inputs[0]])
        if squares is None or squares.factor <= 0 or squares.offset < 0:
            continue
        for product in graph.consumers(root.name):
            if product.op == "mul" and (other := _other(product, root.name)) and _is_deviation(graph, other, squares):
                graph = _replaced(graph, product.name, squares)
    return graph


def _factors_last(graph: Graph) -> Graph:
    """d * (root * gamma) as (d * root) * gamma, for a constant gamma."""
    for root in [n for n in graph if _is_root(graph, n)]:
        for scaled in [n for n in graph.consumers(root.name) if n.op == "mul" and "clip" not in n.attrs]:
            gamma, product = _other(scaled, root.name), graph.sole_consumer(scaled.name)
            if not gamma or graph[gamma].op != "const" or product is None or product.op != "mul":
                continue
            d = _other(product, scaled.name)
            if d and graph[d].shape == product.shape:
                inner = scaled.with_(inputs=(d, root.name), shape=product.shape)
                outer = product.with_(inputs=(scaled.name, gamma))
                rest = [n for n in graph if n.name not in (inner.name, outer.name)]
                at = next(k for k, n in enumerate(graph) if n.name == product.name) - 1
                graph = graph.rebuild([*rest[:at], inner, outer, *rest[at:]])
    return graph


def _is_root(graph: Graph, node: Node) -> bool:
    """Whether it is 1 / sqrt(x), however it is written."""
    if node.op == "rsqrt":
        return True
    if node.op != "function" or len(node.inputs) != 1 or {node.dtype, graph[node.inputs[0]].dtype} != {"float32"}:
        return False
    return bool(np.allclose(run(node.attrs["steps"], [tf.constant(_POINTS)]), _POINTS**-0.5, rtol=1e-5))


def _squares(graph: Graph, node: Node) -> _Squares | None:
    """What is under the root, or None."""
    if node.op == "clip" or (node.op in ("affine", "add") and "clip" in node.attrs):
        lo, hi = clip_of(node)
        inner = _squares(graph, graph[node.inputs[0]] if node.op == "clip" else node.with_(attrs={}))
        if inner is None or hi is not None or inner.floor or (lo and inner.offset):
            return None
        return _Squares(inner.of, inner.axes, inner.center, inner.factor, inner.offset, float(lo or 0.0))
    if node.op == "affine":
        inner = _squares(graph, graph[node.inputs[0]])
        scale, offset = (np.unique(node.weights[k]) for k in ("scale", "offset"))
        if inner is None or inner.floor or len(scale) != 1 or len(offset) != 1:
            return None
        s, o = float(scale[0]), float(offset[0])
        return _Squares(inner.of, inner.axes, inner.center, inner.factor * s, inner.offset * s + o)
    if node.op == "mean":
        return _mean_of_squares(graph, node)
    if node.op == "sub":  # mean(x^2) - mean(x)^2
        first, second = (graph[i] for i in node.inputs)
        plain = _mean_of_squares(graph, first) if first.op == "mean" else None
        mean = graph[second.inputs[0]] if second.op == "mul" and len(set(second.inputs)) == 1 else None
        if plain is None or plain.center or mean is None or not _is_mean(graph, mean.name, plain.of, plain.axes):
            return None
        return _Squares(plain.of, plain.axes, True)
    return None


def _mean_of_squares(graph: Graph, node: Node) -> _Squares | None:
    square, axes = graph[node.inputs[0]], tuple(node.attrs["axes"])
    if not node.attrs["keepdims"] or square.op != "mul" or len(set(square.inputs)) != 1 or "clip" in square.attrs:
        return None
    d = graph[square.inputs[0]]
    if d.op == "sub" and "clip" not in d.attrs and _is_mean(graph, d.inputs[1], d.inputs[0], axes):
        return _Squares(d.inputs[0], axes, True)
    return _Squares(d.name, axes, False)


def _is_mean(graph: Graph, name: str, of: str, axes: tuple[int, ...]) -> bool:
    node = graph[name]
    same = node.op == "mean" and node.inputs == (of,) and tuple(node.attrs["axes"]) == axes
    return same and bool(node.attrs["keepdims"])


def _is_deviation(graph: Graph, name: str, squares: _Squares) -> bool:
    if not squares.center:
        return name == squares.of
    node = graph[name]
    same = node.op == "sub" and node.inputs[0] == squares.of and "clip" not in node.attrs
    return same and _is_mean(graph, node.inputs[1], squares.of, squares.axes)


def _other(product: Node, name: str) -> str:
    """The other factor of a product; "" for none."""
    others = [i for i in product.inputs if i != name]
    return others[0] if len(others) == 1 else ""


def _replaced(graph: Graph, name: str, s: _Squares) -> Graph:
    """The graph with a "normalize" in place of the product `name`, axes moved to the end and back."""
    product, x = graph[name], graph[s.of]
    rank = len(x.shape)
    order = (*(a for a in range(rank) if a not in s.axes), *s.axes)
    moved = tuple(x.shape[a] for a in order)
    count = int(np.prod([x.shape[a] or 1 for a in s.axes]))
    flat = (*moved[: rank - len(s.axes)], count)
    own = {"origin": product.origin, "origin_type": product.origin_type, "batch": x.batch}
    nodes: list[Node] = []

    def emit(suffix: str, op: str, shape: tuple[int | None, ...], **fields: object) -> None:
        source = nodes[-1].name if nodes else x.name
        made = graph.unique_name(f"{name}/{suffix}")
        nodes.append(Node(name=made, op=op, inputs=(source,), shape=shape, **own, **fields))  # type: ignore[arg-type]

    # factor * mean + offset = (factor / count) * (sum + offset * count / factor)
    epsilon = (s.floor or s.offset) * count / s.factor
    size = np.full(count, np.sqrt(count / s.factor), np.float32)
    weights = {"scale": np.ones(count, np.float32), "gamma": size, "beta": np.zeros(count, np.float32)}
    if order != tuple(range(rank)):
        emit("axes_last", "transpose", moved, attrs={"perm": order})
    if flat != moved:
        emit("flat", "reshape", flat)
    attrs = {"center": s.center, "epsilon": epsilon, "limit": bool(s.floor)}
    emit("normalize", "normalize", flat, weights=weights, attrs=attrs)
    if flat != moved:
        emit("split", "reshape", moved)
    if order != tuple(range(rank)):
        emit("axes_back", "transpose", x.shape, attrs={"perm": tuple(int(i) for i in np.argsort(order))})
    last = nodes[-1].with_(name=name)
    if clip_of(product) != (None, None):
        return graph  # an activation is fused: later than this is meant for
    table = [n for n in graph if n.name != name]
    at = next(k for k, n in enumerate(graph) if n.name == name)
    return graph.rebuild([*table[:at], *nodes[:-1], last, *table[at:]])
