"""Padding with constants: what of it is seen, and what a grid has to hold."""

from __future__ import annotations

import math

from kquant.errors import ModelError
from kquant.graph.ir import Graph, Node
from kquant.graph.ops import LOWEST, Tie, op_of

_HIGHEST = -LOWEST


def settle_padding(graph: Graph) -> Graph:
    """Write minus infinity, and what is as far away, as `LOWEST` where only maxima are taken of the padded tensor.

    So a padding that no output shows, in front of a max pooling say, is finite, and no range needs to hold it.

    Raises:
        ModelError: infinity is read by something else.
    """
    nodes = []
    for node in graph:
        value = node.attrs.get(op_of(node).inserts or "")
        if value is not None and value <= LOWEST and only_largest_count(graph, node):
            node = node.with_attrs(value=LOWEST)
        elif value is not None and (math.isnan(value) or abs(value) >= _HIGHEST):
            readers = ", ".join(repr(n.origin or n.name) for n in graph.consumers(node.name)) or "the model's output"
            raise ModelError(
                f"{node.origin or node.name!r} pads with {value}, and {readers} reads it: no integer grid holds that. "
                "Pad with a value of the size of the tensor's own, or with -inf in front of a max pooling only."
            )
        nodes.append(node)
    return graph.rebuild(nodes)


def only_largest_count(graph: Graph, node: Node) -> bool:
    """Whether the output is read, directly or moved, by nothing but operations that take the largest of several values,
    of which at least one is not from the padding of `node`."""
    width = max((max(pair) for pair in node.attrs.get("paddings", ())), default=0)
    return _only_selected(graph, node.name, width)


def _only_selected(graph: Graph, name: str, width: int) -> bool:
    readers = graph.consumers(name)
    if name in graph.outputs or not readers:
        return False
    for reader in readers:
        record = op_of(reader)
        if record.largest:
            if width >= min(reader.attrs.get("pool_size", (width + 1,))):
                return False
        elif record.grid is not Tie.OF_INPUT or record.averages or not _only_selected(graph, reader.name, width):
            return False
    return True
