"""Fusing ReLU, ReLU6 and other clips into the operation in front of them, as the target's kernels do."""

from __future__ import annotations

from kquant.graph.ir import Graph
from kquant.graph.ops import clip_of, op_of


def fuse_activations(graph: Graph) -> Graph:
    """Turn every clip behind a linear operation, addition, subtraction or multiplication into its attribute.

    The integer kernels clamp the accumulator they have just rescaled, so the pre-activation is never
    rounded: without the fusion it would get a quantizer of its own. A producer with other readers, or
    whose output the model returns, is left alone, since its unclipped value is needed.

    Args:
        graph: any float graph.

    Returns:
        The graph in which the producer carries `clip` = (lo, hi) under its own name, and the clip node is gone.
    """
    for node in list(graph):
        if node.op != "clip":
            continue
        producer = graph[graph[node.name].inputs[0]]
        if op_of(producer).fuses_clip and "clip" not in producer.attrs and graph.sole_consumer(producer.name):
            fused = producer.with_attrs(clip=clip_of(node))
            nodes = [fused if n.name == producer.name else n for n in graph if n.name != node.name]
            graph = graph.rebuild(nodes, {node.name: producer.name})
    return graph
