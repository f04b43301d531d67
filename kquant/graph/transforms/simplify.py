"""Removing operations that only move data without need, and choosing the simpler of two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from kquant.graph.ir import Graph, Node
from kquant.graph.ops import linear_of, op_of, pads_zeros, weight_of


def simplify(graph: Graph) -> Graph:
    """The same function without needless reshapes, transposes, slices, pads and double clips.

    * operations that change nothing are dropped;
    * consecutive reshapes, transposes and clips become one;
    * a reshape in front of an elementwise operation is moved behind it, so that a one-dimensional
      convolution (a convolution between two reshapes) meets its batch normalization and activation,
      and the reshapes between two such convolutions cancel;
    * an average pooling of whole images becomes a mean.
    """
    changed = True
    while changed:
        changed = False
        for node in list(graph):
            if node.name not in graph.nodes:
                continue
            for rule in RULES:
                rewritten = rule(graph, graph[node.name])
                if rewritten is not None:
                    graph, changed = rewritten, True
                    break
    return graph


def _drop(graph: Graph, node: Node) -> Graph | None:
    """Remove an operation that returns its input."""
    if len(node.inputs) != 1 or not op_of(node).unchanged(node, graph[node.inputs[0]].shape):
        return None
    return graph.rebuild([n for n in graph if n.name != node.name], {node.name: node.inputs[0]})


def _merge(graph: Graph, node: Node) -> Graph | None:
    """Let a reshape, transpose or clip read through the one before it."""
    record = op_of(node)
    if record.merge is None or len(node.inputs) != 1:
        return None
    first = graph[node.inputs[0]]
    if first.op != node.op or (record.elementwise and graph.sole_consumer(first.name) is None):
        return None  # both are computed anyway, and a merged function is no simpler than its own
    if len(first.inputs) > 1 and first.dtype != node.dtype:
        return None  # a number of several truth values: targets choose it by one
    merged = record.merge(first, node)
    return graph.rebuild([merged if n.name == node.name else n for n in graph])


def _sink_reshape(graph: Graph, node: Node) -> Graph | None:
    """f(reshape(x)) = reshape(f(x)) for elementwise f, and for an affine if the reshape keeps the last axis."""
    if not (op_of(node).elementwise or node.op == "affine") or len(node.inputs) != 1:
        return None
    moved = graph[node.inputs[0]]
    if moved.op != "reshape" or graph.sole_consumer(moved.name) is None:
        return None
    source = graph[moved.inputs[0]]
    if node.op in ("affine", "train_only") and source.shape[-1] != moved.shape[-1]:
        return None
    first = node.with_(inputs=(source.name,), shape=source.shape, batch=source.batch)
    then = moved.with_(inputs=(first.name,), dtype=node.dtype, stats={})
    nodes: list[Node] = []
    for n in graph:
        if n.name == node.name:
            nodes += [first, then]
        elif n.name != moved.name:
            nodes.append(n.with_(inputs=tuple(moved.name if i == node.name else i for i in n.inputs)))
    outputs = tuple(moved.name if o == node.name else o for o in graph.outputs)
    return replace(graph, nodes={n.name: n for n in nodes}, outputs=outputs)


def _replace(graph: Graph, node: Node) -> Graph | None:
    """Take the simpler of two operations that compute the same."""
    simpler = op_of(node).simpler(node, graph[node.inputs[0]].shape) if len(node.inputs) == 1 else None
    return None if simpler is None else graph.rebuild([simpler if n.name == node.name else n for n in graph])


RULES: tuple[Callable[[Graph, Node], Graph | None], ...] = (_drop, _merge, _sink_reshape, _replace)


def absorb_padding(graph: Graph) -> Graph:
    """Turn zero padding in front of a "valid" convolution into "same" padding where that is the same thing."""
    for node in list(graph):
        linear = op_of(node).linear
        if linear is None or not linear.window or linear.transposed or node.attrs["padding"] != "valid":
            continue
        pad = graph[graph[node.name].inputs[0]]
        if pads_zeros(pad) and _equals_same(node, pad, graph[pad.inputs[0]]):
            same = graph[node.name].with_attrs(padding="same").with_(inputs=pad.inputs)
            graph = graph.rebuild([same if n.name == node.name else n for n in graph])
    return graph


def _equals_same(node: Node, pad: Node, source: Node) -> bool:
    """Whether "same" padding of `source` makes the convolution read what it reads from `pad`.

    "same" has ceil(size / stride) outputs, and its taps have to meet the elements that they meet now. How many zeros
    stand behind does not matter where the number of outputs is equal.
    """
    paddings, same, kernel = pad.attrs["paddings"], node.with_attrs(padding="same"), node.weights[weight_of(node).name]
    if any(paddings[0]) or any(paddings[3]):
        return False
    lines = zip(
        linear_of(node).lines(node, pad.shape, kernel), linear_of(node).lines(same, source.shape, kernel), strict=True
    )
    for axis, (now, then) in enumerate(lines, 1):
        size, stride, moved = source.shape[axis] or 0, node.attrs["strides"][axis - 1], now - paddings[axis][0]
        found = np.where((moved >= 0) & (moved < size), moved, -1)
        if node.shape[axis] != -(-size // stride) or not np.array_equal(found, then):
            return False
    return True
