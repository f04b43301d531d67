"""Average poolings on grids of their own."""

from __future__ import annotations

from collections.abc import Set

import numpy as np

from kquant.graph.ir import Graph, Node
from kquant.graph.ops import op_of
from kquant.graph.ops.reductions import inside


def average_windows(graph: Graph, apart: Set[str] = frozenset()) -> Graph:
    """The same function with every average pooling, but for those `apart`, as a window_mean.

    Where padding leaves windows incomplete, their zeros count in a window_mean, so that a factor for each place
    follows: avg = window_mean * size / (places inside).
    """
    nodes: list[Node] = []
    for node in graph:
        lowered = op_of(node).apart == "window_mean" and node.name not in apart
        nodes += _of_windows(graph, node) if lowered else [node]
    return graph.rebuild(nodes)


def is_padded(graph: Graph, node: Node) -> bool:
    """Whether some windows of a pooling are incomplete."""
    return bool((inside(node, graph[node.inputs[0]].shape) < np.prod(node.attrs["pool_size"])).any())


def _of_windows(graph: Graph, node: Node) -> list[Node]:
    count, size = inside(node, graph[node.inputs[0]].shape), int(np.prod(node.attrs["pool_size"]))
    if not is_padded(graph, node):
        return [node.with_(op="window_mean").with_attrs(padding="valid")]
    mean = node.with_(op="window_mean", name=graph.unique_name(f"{node.name}/sum"))
    factors = (size / count).astype(np.float32)
    name = graph.unique_name(f"{node.name}/factors")
    const = Node(
        name=name,
        op="const",
        shape=factors.shape,
        weights={"value": factors},
        origin=node.origin,
        origin_type=node.origin_type,
    )
    return [mean, const, node.with_(op="mul", inputs=(mean.name, name), attrs={})]
