"""The tensors that decide what a model returns."""

from __future__ import annotations

from collections.abc import Iterator

from kquant.graph.ir import Graph
from kquant.graph.ops import Tie, op_of

_SQUASHED = ("softmax", "logistic")  # in the order of what they read, on a grid that the target gives them


def decisive(graph: Graph) -> tuple[str, ...]:
    """The tensor behind each output whose grid decides: the logits of probabilities or of classes, the boxes.

    Behind what moves values, makes probabilities of them, or returns integers, such as an argmax.
    """
    return tuple(dict.fromkeys(list(_steps(graph, name))[-1] for name in graph.outputs))


def at_outputs(graph: Graph) -> frozenset[str]:
    """The outputs, the tensors that decide them, and those in between."""
    return frozenset(step for name in graph.outputs for step in _steps(graph, name))


def _steps(graph: Graph, name: str) -> Iterator[str]:
    """From an output to what decides it."""
    node = graph[name]
    yield node.name
    while node.inputs and (node.op in _SQUASHED or node.dtype != "float32" or op_of(node).grid is Tie.OF_INPUT):
        node = graph[node.inputs[0]]
        yield node.name
