"""One scale per channel for the tensors of a residual stream, exactly.

Residual sums and what normalizations make of them have few channels that are a hundred times larger than others, and
one grid for all of them leaves the others few bits. So such a tensor x is stored as x / s:

* a dense layer, a normalization, a table or a constant in front makes x / s at once;
* the dense layers and normalizations that read it take s into their weights;
* an addition adds what is divided by the s of its own output: an operand that others read, too, is brought to it by an
  affine.

It is cross-layer equalization over sums and normalizations, with ranges of activations in place of those of weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kquant.graph.ir import Graph, Node
from kquant.graph.ops import op_of
from kquant.graph.scaling import Scaling
from kquant.graph.transforms.rescale import scale_input, scale_output

LEAST = 1e-3  # no scale is smaller than this part of the largest
WORTH = 1.0  # bits that one grid costs the channels on average, from which on scales pay
_MAKERS = frozenset({"dense", "normalize", "add"})  # and look-ups
_READERS = frozenset({"dense", "normalize", "add"})


def candidates(graph: Graph) -> list[str]:
    """The tensors that may have a scale per channel, and gain by it: operands and results of sums, normalized ones."""
    return [n.name for n in graph if _may_scale(graph, n) and _of_a_stream(graph, n)]


def _may_scale(graph: Graph, node: Node) -> bool:
    readers = graph.consumers(node.name)
    if (
        not (node.op in _MAKERS or op_of(node).lookup)
        or "clip" in node.attrs
        or node.name in graph.outputs
        or not readers
    ):
        return False
    return len(node.shape) > 2 and all(_reads(r, node) for r in readers)


def _reads(reader: Node, node: Node) -> bool:
    if reader.op == "add":  # of tensors of one shape, or with a constant
        return "clip" not in reader.attrs and reader.shape == node.shape
    return reader.op in _READERS


def _of_a_stream(graph: Graph, node: Node) -> bool:
    """Whether it is a sum that is normalized or added, is normalized, or is a normalized tensor."""
    if node.op in ("add", "normalize"):
        return True
    return any(r.op == "normalize" for r in graph.consumers(node.name))


def scales_of(largest: np.ndarray, exponent: float = 1.0) -> np.ndarray | None:
    """The scales for the largest magnitudes of channels; None where they gain too little.

    Args:
        largest: of every channel.
        exponent: below 1 the weights that read the tensor take less of it: for weights of few bits.
    """
    top = float(largest.max(initial=0.0))
    if top <= 0:
        return None
    s = np.maximum(largest / top, LEAST)
    if -np.log2(s).mean() < WORTH:
        return None
    return s**exponent


def scale_channels(graph: Graph, scales: Mapping[str, np.ndarray]) -> Graph:
    """The same function with tensors stored divided by `scales`.

    Args:
        graph: a float graph.
        scales: of some of `candidates(graph)`, positive.
    """
    scales = _with_sole_operands(graph, scales)
    nodes: list[Node] = []
    for node in graph:
        extra: list[Node] = []
        if node.op == "add":
            node, extra = _sum(graph, node, scales)
        else:
            for name in node.inputs:
                if name in scales:
                    node = _reading(node, scales[name])
            if node.name in scales:
                node = _making(node, 1 / scales[node.name])
        nodes += [*extra, node]
    return graph.rebuild(nodes)


def _with_sole_operands(graph: Graph, scales: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Operands that only a sum reads have its scale, or none."""
    found = dict(scales)
    for node in reversed(list(graph)):
        reader = graph.sole_consumer(node.name)
        if reader is None or reader.op != "add" or not _may_scale(graph, node):
            continue
        found.pop(node.name, None)
        if reader.name in found:
            found[node.name] = found[reader.name]
    return found


def _reading(node: Node, s: np.ndarray) -> Node:
    if node.op == "normalize":
        return node.with_weights(scale=(node.weights["scale"] * s).astype(np.float32))
    return scale_input(node, Scaling.factors(s))


def _making(node: Node, factor: np.ndarray) -> Node:
    if op_of(node).linear:
        return scale_output(node, Scaling.factors(factor))
    keys = ("gamma", "beta") if node.op == "normalize" else ("table",)
    return node.with_weights(**{k: (node.weights[k] * factor).astype(np.float32) for k in keys})


def _sum(graph: Graph, node: Node, scales: Mapping[str, np.ndarray]) -> tuple[Node, list[Node]]:
    """An addition, and what brings its operands to its scale."""
    one = np.ones(int(node.shape[-1] or 1))
    own, inputs, extra = scales.get(node.name, one), [], []
    for k, name in enumerate(node.inputs):
        factor, source = scales.get(name, one) / own, graph[name]
        if not np.array_equal(factor, one):
            made = f"{node.name}/operand_{k}"
            if source.op == "const":
                value = (source.weights["value"] * factor).astype(np.float32)
                extra.append(source.with_(name=made, shape=value.shape, weights={"value": value}))
            else:
                weights = {"scale": factor.astype(np.float32), "offset": np.zeros(len(factor), np.float32)}
                affine = source.with_(name=made, op="affine", inputs=(name,), attrs={}, weights=weights, stats={})
                extra.append(affine.with_(origin=node.origin, origin_type=node.origin_type))
            name = made
        inputs.append(name)
    return node.with_(inputs=tuple(inputs)), extra
