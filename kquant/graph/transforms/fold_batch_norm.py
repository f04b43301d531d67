"""Folding of batch normalization, and of every other per-channel affine, into linear operations.

White paper section 3.1 (eq. 14-15 of arXiv 2106.08295): with y = scale * (W x + b) + offset,

    W' = scale * W,    b' = scale * b + offset

An affine is folded backward into the linear operations that produce its input, or else forward into
all that read its output:

    W (scale * x + offset) + b = (W * scale) x + (b + W offset)

which needs every tap to see the offset, that is, no zero padding. Both directions pass through
operations that commute with the affine (`transforms.channels`), backward also through
concatenation, addition and subtraction. An affine is folded completely or not at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from kquant.graph.ir import Graph, Node, Shape
from kquant.graph.ops import LINEAR
from kquant.graph.transforms.channels import Scaling, behind, in_front

Changes = dict[str, Node]


def fold_batch_norm(graph: Graph) -> Graph:
    """The same function with as few "affine" nodes as folding can leave.

    Args:
        graph: any float graph.

    Returns:
        A graph in which every foldable affine is gone. A linear node that absorbed a batch
        normalization carries its output statistics in `stats`. What cannot be folded stays "affine".
    """
    left = [n.name for n in graph if n.op == "affine"]
    while True:  # a fold can free its neighbour: what was behind an affine is now behind a linear operation
        for name in left:
            graph = _fold_one(graph, name)
        before, left = left, [n.name for n in graph if n.op == "affine"]
        if len(left) == len(before):
            return graph


def _fold_one(graph: Graph, name: str) -> Graph:
    """The graph without affine `name`, or the same graph."""
    if name not in graph.nodes or "clip" in graph[name].attrs:
        return graph
    node = graph[name]
    changes = _into_producer(graph, node.inputs[0], name, Scaling.of(node))
    if changes is None and name not in graph.outputs:
        changes = _into_readers(graph, node, Scaling.of(node))
    if changes is None:
        return graph
    nodes = [changes.get(n.name, n) for n in graph if n.name != name]
    return graph.rebuild(nodes, {name: node.inputs[0]})


def _into_producer(graph: Graph, name: str, reader: str, s: Scaling) -> Changes | None:
    """Changed nodes so that `name` computes its old output times scale plus offset; None if impossible."""
    node, only = graph[name], graph.sole_consumer(name)
    if only is None or only.name != reader or "clip" in node.attrs or only.inputs.count(name) > 1:
        return None
    if node.op != "const" and node.shape[-1] != len(s.scale):
        return None  # the channels appear by broadcasting
    if node.op in LINEAR:
        return {name: scale_output(node, s)}
    if node.op == "const":
        value = node.weights["value"] * s.scale + s.offset
        return {name: node.with_weights(value=value.astype(np.float32)).with_(shape=value.shape)}
    if node.op in ("add", "sub"):
        rest = Scaling(s.scale, np.zeros_like(s.offset), {})
        return _all(
            _into_producer(graph, i, name, p) for i, p in zip(node.inputs, (s.without_stats(), rest), strict=True)
        )
    if node.op == "concat":
        return _all(_into_producer(graph, i, name, p) for i, p in zip(node.inputs, _parts(graph, node, s), strict=True))
    if len(node.inputs) != 1:
        return None
    source = graph[node.inputs[0]]
    moved = in_front(node, source.shape, s)
    return None if moved is None else _into_producer(graph, source.name, name, moved)


def _parts(graph: Graph, node: Node, s: Scaling) -> list[Scaling]:
    """A concatenation's scaling, branch by branch."""
    if node.attrs["axis"] != len(node.shape) - 1:
        return [s] * len(node.inputs)
    edges = np.cumsum([0, *(graph[i].shape[-1] for i in node.inputs)])
    return [s.select(slice(lo, hi)) for lo, hi in itertools.pairwise(edges)]


def _into_readers(graph: Graph, node: Node, s: Scaling) -> Changes | None:
    """Changed nodes so that all readers undo the loss of a scaling on the output of `node`."""
    readers = graph.consumers(node.name)
    if not readers or node.name in graph.outputs:
        return None
    return _all(_into_reader(graph, reader, node.shape, s) for reader in readers)


def _into_reader(graph: Graph, reader: Node, source: Shape, s: Scaling) -> Changes | None:
    if reader.op in LINEAR:
        return {reader.name: scale_input(reader, s)} if sees_offset(reader, source, s) else None
    if len(reader.inputs) != 1 or "clip" in reader.attrs:
        return None
    moved = behind(reader, source, s)
    return None if moved is None else _into_readers(graph, reader, moved)


def _all(parts: Iterable[Changes | None]) -> Changes | None:
    """The union of all changes, or None if one of them is impossible."""
    union: Changes = {}
    for part in parts:
        if part is None or union.keys() & part.keys():
            return None
        union.update(part)
    return union


def sees_offset(node: Node, source: Shape, s: Scaling) -> bool:
    """Whether every tap of the linear operation reads a real element, or the offset is zero."""
    if not s.offset.any() or node.op in ("dense", "affine"):
        return True
    if node.op == "conv2d_transpose":
        return False  # its border outputs see only some of the taps
    if node.attrs["padding"] == "valid":
        return True
    taps = zip(source[1:3], node.shape[1:3], node.weights["kernel"].shape[:2], strict=True)
    settings = zip(taps, node.attrs["strides"], node.attrs["dilation"], strict=True)
    return all((out - 1) * stride + (k - 1) * d + 1 <= size for (size, out, k), stride, d in settings)  # type: ignore[operator]


def scale_output(node: Node, s: Scaling) -> Node:
    """The linear node whose output is scaled: W' = scale * W, b' = scale * b + offset."""
    if node.op == "affine":
        weights = {
            "scale": node.weights["scale"] * s.scale,
            "offset": node.weights["offset"] * s.scale + s.offset,
        }
    else:
        kernel = node.weights["kernel"]
        factor = s.scale
        if node.op == "depthwise_conv2d":
            factor = s.scale.reshape(kernel.shape[2:])
        elif node.op == "conv2d_transpose":
            factor = s.scale[:, None]
        weights = {"kernel": kernel * factor, "bias": node.weights["bias"] * s.scale + s.offset}
    stats = s.stats
    if node.stats and not stats:
        stats = {"mean": node.stats["mean"] * s.scale + s.offset, "std": node.stats["std"] * np.abs(s.scale)}
    return node.with_(weights={k: v.astype(np.float32) for k, v in weights.items()}, stats=stats)


def scale_input(node: Node, s: Scaling) -> Node:
    """The linear node whose input was scaled: W' = W * scale, b' = b + W offset, summed over the taps."""
    if node.op == "affine":
        scale, offset = node.weights["scale"], node.weights["offset"]
        weights = {"scale": scale * s.scale, "offset": scale * s.offset + offset}
        return node.with_weights(**{k: v.astype(np.float32) for k, v in weights.items()})
    kernel, bias = node.weights["kernel"].astype(np.float64), node.weights["bias"]
    if node.op == "conv2d_transpose":  # [h, w, cout, cin]
        scaled, shift = kernel * s.scale, (kernel * s.offset).sum((0, 1, 3))
    elif node.op == "depthwise_conv2d":  # [h, w, c, m]
        scaled, shift = kernel * s.scale[:, None], (kernel * s.offset[:, None]).sum((0, 1)).reshape(-1)
    elif node.op == "dense":  # [cin, cout]
        scaled, shift = kernel * s.scale[:, None], s.offset @ kernel
    else:  # [h, w, cin / groups, cout]: output o reads the inputs of group o // (cout / groups)
        groups, width, cout = node.attrs["groups"], kernel.shape[2], kernel.shape[3]
        group = np.arange(cout) // (cout // groups)
        scale, offset = s.scale.reshape(groups, width)[group].T, s.offset.reshape(groups, width)[group].T
        scaled, shift = kernel * scale, (kernel * offset).sum((0, 1, 2))
    return node.with_weights(kernel=scaled.astype(np.float32), bias=(bias + shift).astype(np.float32))
