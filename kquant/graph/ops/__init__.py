"""The vocabulary of primitive operations: what each means, in one record (`record.Op`) that every pass reads.

The families list attributes and weights: `boundary` (inputs, constants), `linear`, `elementwise`, `activations`,
`normalization`, `reductions`, `layout`. Operations with `fuses_clip` may carry the attribute `clip` = (lo, hi): an
activation fused behind them; hi may be a list with a cap for every entry of the last axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import tensorflow as tf

from kquant.graph.ir import Graph, Node, sample_size
from kquant.graph.ops import activations, boundary, elementwise, layout, linear, normalization, reductions
from kquant.graph.ops.activations import clip_array, clip_of, clip_tensor, with_clip, without_clip
from kquant.graph.ops.blocks import Linear
from kquant.graph.ops.layout import LOWEST, pads_zeros
from kquant.graph.ops.record import Op, Tensor, Tie, Weight

__all__ = [
    "LOWEST",
    "OPS",
    "Linear",
    "Op",
    "Tie",
    "Weight",
    "bias_of",
    "clip_array",
    "clip_of",
    "compute",
    "evaluate",
    "linear_of",
    "multiplications",
    "op_of",
    "pads_zeros",
    "weight_of",
    "weight_view",
    "with_clip",
    "with_insertion",
    "without_clip",
]

OPS: Mapping[str, Op] = MappingProxyType(
    boundary.RECORDS
    | linear.RECORDS
    | elementwise.RECORDS
    | activations.RECORDS
    | normalization.RECORDS
    | reductions.RECORDS
    | layout.RECORDS
)


def op_of(node: Node) -> Op:
    """The record of a node's operation."""
    return OPS[node.op]


def weight_of(node: Node) -> Weight:
    """The weight of a node that carries a grid."""
    weight = OPS[node.op].weight
    if weight is None:
        raise AssertionError(f"{node.name!r} ({node.op}) has no weight that carries a grid")
    return weight


def weight_view(node: Node, weight: Any = None) -> Any:
    """The weight that `QuantizedGraph.weights` describes, with its output channels on one axis.

    `Grid.axis` refers to this view.

    Args:
        node: has a weight that carries a grid.
        weight: array or tensor in place of the node's own, in its own shape.
    """
    facts = weight_of(node)
    return facts.view(node.weights[facts.name] if weight is None else weight)


def bias_of(node: Node) -> str:
    """The name of a linear operation's bias."""
    bias = OPS[node.op].bias
    if bias is None:
        raise AssertionError(f"{node.name!r} ({node.op}) has no bias")
    return bias


def linear_of(node: Node) -> Linear:
    """The layout of a linear operation."""
    layout = OPS[node.op].linear
    if layout is None:
        raise AssertionError(f"{node.name!r} ({node.op}) is not linear")
    return layout


def multiplications(node: Node) -> int:
    """How often a node multiplies by a trained weight, for one sample; 0 where it is no matrix product.

    The weights may be arrays, or their shapes.
    """
    if not OPS[node.op].matrix:
        return 0
    weight = weight_of(node)
    array = node.weights[weight.name]
    shape = getattr(array, "shape", array)
    return math.prod(shape[k] for k in weight.fan_in) * sample_size(node)


def compute(node: Node, inputs: Sequence[Tensor], weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """The node's float function.

    Args:
        node: any node but an input.
        inputs: one tensor per entry of `node.inputs`.
        weights: tensors to use in place of the node's own weights.
    """
    y = OPS[node.op].compute(node, inputs, node.weights if weights is None else weights)
    lo, hi = node.attrs.get("clip", (None, None))
    return clip_tensor(y, lo, hi)


def with_insertion(node: Node, grid: Sequence[Tensor], limits: Sequence[int] | None) -> Node:
    """The node; a value of its own that it puts beside those of its input is the nearest on their grid.

    Args:
        node: any node.
        grid: scale and zero point of its input.
        limits: smallest and largest integer of that grid; None leaves the node as it is.
    """
    key = op_of(node).inserts
    if key is None or limits is None or not node.attrs.get(key):
        return node
    low, high = (limit - grid[1] for limit in limits)
    value = tf.clip_by_value(tf.round(node.attrs[key] / grid[0]), low, high) * grid[0]
    return node.with_attrs(**{key: value})


def evaluate(graph: Graph, feeds: Sequence[Tensor], fetch: Sequence[str] | None = None) -> list[Tensor]:
    """Run the float graph.

    Args:
        graph: what to run.
        feeds: one tensor per graph input, in order.
        fetch: names of the nodes wanted; the graph's outputs by default.

    Returns:
        The tensors, in the order of `fetch`.
    """
    wanted = list(graph.outputs if fetch is None else fetch)
    values: dict[str, Tensor] = dict(zip(graph.inputs, feeds, strict=True))
    last_use = {source: node.name for node in graph for source in node.inputs}
    keep = set(wanted)
    for node in graph:
        if node.op != "input":
            values[node.name] = compute(node, [values[i] for i in node.inputs])
        for source in set(node.inputs):
            if last_use[source] == node.name and source not in keep:
                del values[source]
    return [values[name] for name in wanted]
