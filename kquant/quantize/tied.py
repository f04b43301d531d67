"""Weights that several operations have: every step of a recurrent layer, or every call of a shared one.

They are stored once, so their integers are decided once, for the inputs of all: those of the float network, since the
first of them is decided before the others' inputs are known in the quantized one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from kquant.graph.ir import Graph
from kquant.graph.ops import evaluate, weight_of


def tied_weights(graph: Graph, names: Iterable[str]) -> dict[str, str]:
    """Node -> the first of those with the same weight; nodes that are alone with theirs are not among them."""
    groups: dict[tuple[str, tuple[int, ...], bytes], list[str]] = {}
    for name in names:
        node = graph[name]
        weight = node.weights[weight_of(node).name]
        groups.setdefault((node.op, weight.shape, hashlib.sha256(weight.tobytes()).digest()), []).append(name)
    return {name: members[0] for members in groups.values() if len(members) > 1 for name in members}


def inputs_of(graph: Graph, members: Sequence[str], data: Iterable[Sequence[Any]]) -> Any:
    """The float inputs of some nodes of one input each, one after the other: batches() yields (x, x)."""
    sources = list(dict.fromkeys(graph[name].inputs[0] for name in members))

    @tf.function(autograph=False, reduce_retracing=True)
    def run(*batch: Any) -> list[Any]:
        return list(evaluate(graph, batch, sources))

    def batches() -> Iterator[tuple[Any, Any]]:
        for batch in data:
            for x in run(*map(tf.convert_to_tensor, batch)):
                yield x, x

    return batches
