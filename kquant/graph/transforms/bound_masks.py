"""Additive masks, bounded to what their reader can see: a softmax, or what takes the largest of several values.

A mask of -1e9 on the grid of a sum leaves no step for the scores. Beyond 14 below the largest score of a row a key has
less than a millionth of its weight, so that 0 and -A with a few tens for A mask as well, and the sum need not reach
below a floor, where all masked keys saturate. In front of a maximum that floor is the smallest value that is seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import tensorflow as tf

from kquant.graph.ir import Graph, Node
from kquant.graph.ops import op_of, with_clip
from kquant.graph.ops.functions import run

LARGE = 1e3  # what adds so much to a score is a mask
UNBOUNDED = 1e6  # what adds so much to other numbers leaves them no step
WITHOUT_DATA = 100.0  # the mask where nothing is known of the scores
BELOW_SMALLEST, BELOW_LARGEST = (
    6.0,
    14.0,
)  # how far below visible scores, and below the largest of a row, masked keys lie
_MOVES = frozenset({"reshape", "transpose", "slice", "gather", "concat"})


@dataclass(frozen=True)
class MaskedScores:
    """A softmax, or a maximum, of scores with masks.

    Attributes:
        reader: its node.
        scores: the tensor in front of all masks.
        sums: the additions of masks, the last of which the reader reads.
        leaves: the constants, and the affines and functions of a tensor of zeros and ones, that the masks come from.
    """

    reader: str
    scores: str
    sums: tuple[str, ...]
    leaves: tuple[str, ...]


@dataclass(frozen=True)
class Seen:
    """What the data says of scores with a mask.

    Attributes:
        smallest: of the keys that are seen.
        most: the largest, of all keys.
        least_largest: the smallest of the rows' largest ones, of the keys that are seen.
        below: how far below all that are seen a masked key is to lie.
        of_largest: only the largest key is read.
    """

    smallest: float
    most: float
    least_largest: float
    below: float = BELOW_LARGEST
    of_largest: bool = False

    @property
    def floor(self) -> float:
        """Where masked keys may saturate."""
        if self.of_largest:
            return self.smallest
        return max(self.smallest - self.below, self.least_largest - BELOW_LARGEST)

    @property
    def amplitude(self) -> float:
        """What brings the largest score below the floor."""
        return 1.05 * (self.most - self.floor) + 0.5


def masked_scores(graph: Graph) -> list[MaskedScores]:
    """Every softmax and every maximum of a graph with additive masks in front of it."""
    readers = (node for node in graph if node.op == "softmax" or op_of(node).largest)
    return [found for node in readers if (found := _masked(graph, node)) is not None]


def unbounded_masks(graph: Graph) -> Iterator[str]:
    """The additions of masks so large that no grid holds them beside other numbers.

    A logarithm is none, though it is infinite at zero.
    """
    for node in graph:
        if node.op == "add" and "clip" not in node.attrs:
            leaves = [graph[leaf] for i in node.inputs for leaf in _leaves(graph, i, UNBOUNDED)]
            if any(leaf.op != "function" or _of_truth(graph, leaf) or _is_finite(graph, leaf) for leaf in leaves):
                yield node.name


def part_masks(graph: Graph) -> Graph:
    """The same graph, where a sum of a mask and numbers is added to others one after the other.

    T5 and its like add the mask to the bias of the positions once, and that sum to the scores of every layer: no grid
    holds it. As (scores + bias) + mask each reader bounds the mask by itself.
    """
    for name in list(unbounded_masks(graph)):
        node = graph[name]
        masks = [i for i in node.inputs if _leaves(graph, i, UNBOUNDED)]
        readers = graph.consumers(name)
        if len(masks) != 1 or not readers or name in graph.outputs:
            continue
        if all(r.op == "add" and "clip" not in r.attrs and _other(graph, r, name).shape == r.shape for r in readers):
            graph = _parted(graph, name, _other(graph, node, masks[0]).name, masks[0])
    return graph


def _other(graph: Graph, node: Node, name: str) -> Node:
    """The other input of a node with two."""
    first, second = node.inputs
    return graph[second if first == name else first]


def _parted(graph: Graph, name: str, numbers: str, mask: str) -> Graph:
    """The graph without the sum `name` of numbers and a mask."""
    nodes = []
    for node in graph:
        if node.name == name:
            continue
        if name in node.inputs:
            inner = node.with_(name=f"{node.name}/numbers", inputs=(_other(graph, node, name).name, numbers))
            nodes += [inner, node.with_(inputs=(inner.name, mask))]
        else:
            nodes.append(node)
    return graph.rebuild(nodes)


def _of_truth(graph: Graph, node: Node) -> bool:
    return graph[node.inputs[0]].dtype == "bool"


def _is_finite(graph: Graph, node: Node) -> bool:
    ends = ends_of(graph, node)
    return ends is not None and bool(np.isfinite(ends).all())


def _masked(graph: Graph, reader: Node) -> MaskedScores | None:
    name, sums, leaves = reader.inputs[0], [], []
    while True:
        node = graph[name]
        if graph.sole_consumer(name) is None:
            break
        if node.op in ("reshape", "transpose"):
            name = node.inputs[0]
            continue
        found = [(k, _leaves(graph, i)) for k, i in enumerate(node.inputs)] if node.op == "add" else []
        masks = [(k, leaf) for k, leaf in found if leaf]
        if len(masks) != 1 or "clip" in node.attrs:
            break
        (side, leaf) = masks[0]
        sums.append(name)
        leaves += leaf
        name = node.inputs[1 - side]
    return MaskedScores(reader.name, name, tuple(sums[::-1]), tuple(leaves)) if sums else None


def _leaves(graph: Graph, name: str, large: float = LARGE) -> list[str]:
    """What a mask comes from, through sums; empty for what is no mask."""
    leaves: list[str] = []
    todo, known = [name], {name}  # a graph has as many paths as it likes
    while todo:
        node = graph[todo.pop()]
        ends = (node.weights["value"],) if node.op == "const" else ends_of(graph, node)
        if ends is not None:
            if not (min(e.min() for e in ends) <= -large and max(e.max() for e in ends) < LARGE):
                return []
            leaves.append(node.name)
        elif node.op in _MOVES or (node.op == "add" and "clip" not in node.attrs):
            inputs = [i for i in dict.fromkeys(reversed(node.inputs)) if i not in known]
            known.update(inputs)
            todo += inputs
        else:
            return []
    return leaves


def ends_of(graph: Graph, node: Node) -> tuple[np.ndarray, np.ndarray] | None:
    """What an affine, or a function of one tensor, makes of 0 (false) and of 1 (true); None for other nodes."""
    if node.op == "affine" and "clip" not in node.attrs:
        scale, offset = node.weights["scale"], node.weights["offset"]
        return offset, scale + offset
    if node.op == "function" and len(node.inputs) == 1 and node.dtype == "float32":
        both = tf.constant([False, True] if _of_truth(graph, node) else [0.0, 1.0])
        found = np.asarray(run(node.attrs["steps"], [both]))
        return found[:1], found[1:]
    return None


def bound_masks(graph: Graph, seen: Mapping[str, Seen] = MappingProxyType({})) -> Graph:
    """The same function, as far as the readers tell, with bounded masks.

    Args:
        graph: any float graph.
        seen: reader -> what is known of its scores; of others nothing is.
    """
    nodes = dict(graph.nodes)
    amplitudes: dict[str, float] = {}
    for site in masked_scores(graph):
        known = seen.get(site.reader)
        for leaf in site.leaves:
            amplitude = known.amplitude if known else WITHOUT_DATA
            amplitudes[leaf] = max(amplitude, amplitudes.get(leaf, 0.0))
        for name in site.sums if known else ():
            assert known is not None
            nodes[name] = with_clip(nodes[name], known.floor, None)
    for leaf, amplitude in amplitudes.items():
        nodes[leaf] = _bounded(nodes[leaf], amplitude)
    return graph.rebuild(nodes.values())


def _bounded(node: Node, amplitude: float) -> Node:
    """A leaf whose large negative values are -amplitude."""

    def bound(value: np.ndarray) -> np.ndarray:
        return np.where(value <= -LARGE / 2, -amplitude, value).astype(np.float32)

    if node.op == "const":
        return node.with_weights(value=bound(node.weights["value"]))
    if node.op == "function":
        steps = node.attrs["steps"]
        return node.with_attrs(steps=(*steps, ("maximum", len(steps), -float(amplitude))))
    zero = bound(node.weights["offset"])
    return node.with_weights(offset=zero, scale=bound(node.weights["scale"] + node.weights["offset"]) - zero)


def truths(graph: Graph) -> Iterator[Node]:
    """The functions of numbers in front of masks, and the masks that are such functions."""
    for site in masked_scores(graph):
        todo = [graph[leaf].name for leaf in site.leaves]
        while todo:
            node = graph[todo.pop()]
            if node.op == "function" and len(node.inputs) == 1 and graph[node.inputs[0]].dtype == "float32":
                yield node
            elif node.op in _MOVES or node.op in ("mul", "affine"):
                todo += node.inputs


def as_affine(graph: Graph, node: Node) -> Node:
    """A function that reads zeros and ones as what it is then."""
    ends = ends_of(graph, node)
    assert ends is not None, "a function of numbers"
    zero, one = (np.broadcast_to(e, int(node.shape[-1] or 1)).astype(np.float32) for e in ends)
    return node.with_(op="affine", attrs={}, weights={"scale": one - zero, "offset": zero})
