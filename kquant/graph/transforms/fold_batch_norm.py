"""Folding of batch normalization, and of every other per-channel affine, into linear operations.

White paper section 3.1 (eq. 14-15 of arXiv 2106.08295): with y = scale * (W x + b) + offset,

    W' = scale * W,    b' = scale * b + offset

An affine is folded backward into the linear operations that produce its input, or else forward into
all that read its output:

    W (scale * x + offset) + b = (W * scale) x + (b + W offset)

which needs every tap to see the offset, that is, no zero padding. Both directions pass through
operations that commute with the affine (`Op.channels`), backward also through
concatenation, addition and subtraction. An affine is folded completely or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from kquant.graph.ir import Graph, Node, Shape
from kquant.graph.ops import bias_of, op_of
from kquant.graph.scaling import Scaling
from kquant.graph.training import with_affine
from kquant.graph.transforms.rescale import scale_input, scale_output, sees_offset

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
    if any(weight.asked for weight in node.user.values()):  # a gain of the user's with a penalty of its own
        return graph
    scale, offset = (node.weights[k].astype(np.float64) for k in ("scale", "offset"))
    s = Scaling(scale, offset, dict(node.stats))
    changes = _into_producer(graph, node.inputs[0], name, s)
    behind = changes is None
    if changes is None and name not in graph.outputs:
        changes = _into_readers(graph, node, s)
    if changes is None:
        return graph
    changes = {k: _took_up(n, node, behind) for k, n in changes.items()}
    nodes = [changes.get(n.name, n) for n in graph if n.name != name]
    return graph.rebuild(nodes, {name: node.inputs[0]})


def _took_up(node: Node, affine: Node, behind: bool) -> Node:
    """A changed node that trains what the affine trained, as far as its bias can."""
    if not (node.user and affine.user and op_of(node).linear):
        return node
    user = with_affine(node.user, bias_of(node), affine.user)
    return node.with_(user={k: w for k, w in user.items() if k != "gamma" or k in node.user} if behind else user)


def _into_producer(graph: Graph, name: str, reader: str, s: Scaling) -> Changes | None:
    """Changed nodes so that `name` computes its old output times scale plus offset; None if impossible."""
    node, only = graph[name], graph.sole_consumer(name)
    if not s.stats and not s.offset.any() and np.all(s.scale == 1):
        return {}
    if only is None or only.name != reader or "clip" in node.attrs or only.inputs.count(name) > 1:
        return None
    if node.op != "const" and node.shape[-1] != len(s.scale):
        return None  # the channels appear by broadcasting
    record = op_of(node)
    if record.linear:
        return {name: scale_output(node, s)}
    if node.op == "const":
        value = node.weights["value"] * s.scale + s.offset
        return {name: node.with_weights(value=value.astype(np.float32)).with_(shape=value.shape)}
    if record.channels is None:
        return None
    moved = record.channels.in_front(node, [graph[i].shape for i in node.inputs], s)
    if moved is None:
        return None
    own: Changes = {name: reframed} if (reframed := record.reframed(node, s)) is not node else {}
    return _all([own, *(_into_producer(graph, i, name, p) for i, p in zip(node.inputs, moved, strict=True))])


def _into_readers(graph: Graph, node: Node, s: Scaling) -> Changes | None:
    """Changed nodes so that all readers undo the loss of a scaling on the output of `node`."""
    readers = graph.consumers(node.name)
    if not readers or node.name in graph.outputs:
        return None
    return _all(_into_reader(graph, reader, node.shape, s) for reader in readers)


def _into_reader(graph: Graph, reader: Node, source: Shape, s: Scaling) -> Changes | None:
    record = op_of(reader)
    if record.linear:
        return {reader.name: scale_input(reader, s)} if sees_offset(reader, source, s) else None
    if len(reader.inputs) != 1 or "clip" in reader.attrs or record.channels is None:
        return None
    moved = record.channels.behind(reader, source, s)
    if moved is None:
        return None
    inverse = Scaling(1 / np.where(s.scale == 0, 1.0, s.scale), -s.offset / np.where(s.scale == 0, 1.0, s.scale), {})
    own: Changes = {reader.name: reframed} if (reframed := record.reframed(reader, inverse)) is not reader else {}
    return _all([own, _into_readers(graph, reader, moved)])


def _all(parts: Iterable[Changes | None]) -> Changes | None:
    """The union of all changes, or None if one of them is impossible."""
    union: Changes = {}
    for part in parts:
        if part is None or union.keys() & part.keys():
            return None
        union.update(part)
    return union
