"""What a model says of its inputs: whether they are ids or numbers, and whether the numbers are bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from kquant.errors import ModelError
from kquant.graph.ir import Graph, Node
from kquant.graph.ops import op_of
from kquant.graph.ops.record import Tie
from kquant.graph.tracing.keras_graph import dtype_of, recorded_calls

# type of an input -> what it can hold
RANGES: Mapping[str, tuple[float, float]] = {"uint8": (0.0, 255.0), "int8": (-128.0, 127.0)}

_BYTES = RANGES["uint8"]
_COLOURS = (1, 3, 4)
_MEANS, _DEVIATIONS = (16.0, 240.0), (16.0, 128.0)  # of the bytes of images


def types_of(function: Any) -> list[str]:
    """The types of a function's inputs: those at which a table is read are ids, whatever their own is."""
    calls = recorded_calls(function)
    ids = {id(args[0]) for op, args, kwargs, _ in calls if _is_table(op) and args and not kwargs.get("reverse")}
    return ["int32" if id(t) in ids else dtype_of(t) for t in function.inputs]


def _is_table(operation: Any) -> bool:
    return isinstance(operation, keras.layers.Embedding)


def settle_inputs(graph: Graph) -> Graph:
    """Type each input by how it is read: ids are int32, numbers float32; attribute `expects`: the range of the numbers.

    That is known where the input has an integer type of 8 bits, or where its first layer turns bytes into numbers.

    Raises:
        ModelError: an input is read in both ways.
    """
    graph = _typed(graph)
    nodes = dict(graph.nodes)
    for name in graph.inputs:
        readers = graph.consumers(name)
        if nodes[name].dtype == "float32" and readers and all(_reads_bytes(r, nodes[name]) for r in readers):
            nodes[name] = nodes[name].with_attrs(expects=_BYTES)
    return graph.rebuild(nodes.values())


def _reads_bytes(reader: Node, source: Node) -> bool:
    """Whether a Rescaling maps 0..255 to 0..1 or -1..1, or a Normalization has the mean and deviation of bytes."""
    if reader.op != "affine" or reader.origin_type not in ("Rescaling", "Normalization"):
        return False
    scale, offset = (np.asarray(reader.weights[k], np.float64) for k in ("scale", "offset"))
    if reader.origin_type == "Rescaling":
        ends = [offset, 255 * scale + offset]
        return any(np.allclose(ends, [[low], [1.0]], atol=0.01) for low in (0.0, -1.0))
    if len(source.shape) != 4 or source.shape[-1] not in _COLOURS or (scale <= 0).any():
        return False
    known = zip((-offset / scale, 1 / scale), (_MEANS, _DEVIATIONS), strict=True)
    return all((low <= values).all() and (values <= high).all() for values, (low, high) in known)


def _behind_moves(graph: Graph, name: str) -> tuple[list[Node], list[Node]]:
    """The nodes that only move an input of integers, one behind the other, and all others that read it or them."""
    moved: list[Node] = []
    ends: list[Node] = []
    for node in graph.consumers(name):
        if op_of(node).grid is Tie.OWN or node.dtype != "int32":
            ends.append(node)
        else:
            further, behind = _behind_moves(graph, node.name)
            moved += [node, *further]
            ends += behind
    return moved, ends


def _typed(graph: Graph) -> Graph:
    """Type each input by how it is read: ids are int32, numbers float32."""
    nodes = dict(graph.nodes)
    for name in graph.inputs:
        readers = graph.consumers(name)
        # a mask compares the ids with zero, in any type
        places = [n for n in readers if n.op == "take_along" and n.inputs[0] != name]
        compares = [n for n in readers if n.op == "float" and n.origin_type == "NotEqual"]
        moved, ends = _behind_moves(graph, name)
        ids = [*places, *(n for n in readers if op_of(n).lookup or n in compares or n in moved)]
        casts = [n for n in ends if n.op == "float" and n.origin_type == "Cast" and n.dtype == "float32"]
        numbers = [n for n in readers if n not in ids and n.op != "float"]
        if ends and len(casts) + len(numbers) == len(ends):
            nodes |= {n.name: n.with_(op="reshape", attrs={}, call=None) for n in casts}
            nodes |= {n.name: n.with_(dtype="float32") for n in moved}
            numbers = list(readers)
        if name in graph.outputs or not ids + numbers:
            continue
        if graph[name].dtype == "float32" and len(ids) == len(readers):
            nodes[name] = graph[name].with_(dtype="int32")
        elif numbers and (graph[name].dtype == "int32" or any(op_of(n).lookup for n in ids)):
            if len(numbers) != len(readers):
                raise ModelError(f"Input {name!r} is read both as ids and as numbers: give the model two inputs.")
            nodes[name] = graph[name].with_(dtype="float32")
    return graph.rebuild(nodes.values())
