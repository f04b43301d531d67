"""Fusing ReLU, ReLU6 and other clips into the operation in front of them, as the target's kernels do."""

from __future__ import annotations

from kquant.graph.ir import Graph, Node
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
        between: list[Node] = []
        while producer.op == "train_only" and graph.sole_consumer(producer.name):
            between.insert(0, producer)
            producer = graph[producer.inputs[0]]
        if op_of(producer).fuses_clip and "clip" not in producer.attrs and graph.sole_consumer(producer.name):
            graph = _fused(graph, node, producer, between)
    return graph


def _fused(graph: Graph, clip: Node, producer: Node, between: list[Node]) -> Graph:
    """The clip as an attribute of the producer, with what acts in between in training.

    Dropout goes behind a ReLU, which is the same, but leaves the range of what is quantized as it is at inference.
    """
    behind: list[Node] = []
    while between and clip_of(clip) == (0, None) and between[-1].attrs["drops"] and between[-1].attrs["offset"] is None:
        behind.insert(0, between.pop())
    fused = producer.with_attrs(clip=clip_of(clip)).with_(between=(*producer.between, *between))
    gone = {clip.name, *(n.name for n in between)}
    nodes = [fused if n.name == producer.name else n for n in graph if n.name not in gone]
    last = behind[-1].name if behind else producer.name
    rename = {clip.name: last, **dict.fromkeys((n.name for n in between), producer.name)}
    return graph.rebuild(nodes, rename)
