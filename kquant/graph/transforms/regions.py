"""Regions: sets of tensors whose channels can be scaled together without a change of function.

Where linear operations write tensors (sources), only scaling-equivariant operations carry them on, f(s x) = s f(x)
for s > 0, and linear operations alone read them in the end (sinks), channel i of the sources may be divided by s_i
and channel i of the sinks multiplied by it (white paper section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kquant.graph.ir import Graph, Node
from kquant.graph.ops import clip_of, op_of


@dataclass(frozen=True, eq=False)
class Region:
    """Tensors that share one scale per channel.

    Attributes:
        channels: number of scales.
        index: tensor -> channel of every entry of its last axis, in topological order.
        sources: linear operation whose output is scaled -> channel of each of its outputs.
        sinks: linear operation whose input is scaled -> channel of each of its inputs.
    """

    channels: int
    index: Mapping[str, np.ndarray]
    sources: Mapping[str, np.ndarray]
    sinks: Mapping[str, np.ndarray]

    @property
    def name(self) -> str:
        """The first source."""
        return next(iter(self.sources))


def find_regions(graph: Graph, across_joins: bool = False) -> tuple[list[Region], dict[str, str]]:
    """All regions of a graph.

    Args:
        graph: a float graph.
        across_joins: also tie together what additions join; otherwise a region stops there.

    Returns:
        The regions in topological order of their first source, and for every linear operation that is the source
        of none, why its output cannot be scaled.
    """
    regions: list[Region] = []
    stops: dict[str, str] = {}
    covered: set[str] = set()
    for node in graph:
        if not op_of(node).linear or node.name in covered:
            continue
        found = _Growth(graph, node, across_joins).grow()
        if isinstance(found, str):
            stops[node.name] = found
        else:
            regions.append(found)
            covered.update(found.sources)
    return regions, stops


class _Growth:
    """Spreads from one source over everything that its scale reaches."""

    def __init__(self, graph: Graph, seed: Node, across_joins: bool) -> None:
        self.graph, self.across_joins = graph, across_joins
        self.channels = int(seed.shape[-1] or 0)
        self.index: dict[str, np.ndarray] = {}
        self.todo: list[str] = []
        self._reach(seed.name, np.arange(self.channels))

    def grow(self) -> Region | str:
        """The region, or what stands in its way."""
        sinks: dict[str, np.ndarray] = {}
        while self.todo:
            node = self.graph[self.todo.pop()]
            if node.name in self.graph.outputs:
                return f"{node.name!r} is an output of the model"
            if not self._equivariant(node):
                return f"{node.name!r} does not commute with a scaling"
            if not (self._backward(node) and self._forward(node, sinks)):
                return f"{self.blocked!r} does not commute with a scaling"
        order = {name: k for k, name in enumerate(self.graph.nodes)}
        index = {name: self.index[name] for name in sorted(self.index, key=order.__getitem__)}
        sources = {name: i for name, i in index.items() if op_of(self.graph[name]).linear}
        return Region(self.channels, index, sources, sinks)

    def _equivariant(self, node: Node) -> bool:
        """Whether the node passes channels on, and its activation scales with its bounds."""
        return bool(op_of(node).linear or op_of(node).channels) and clip_of(node)[0] in (None, 0)

    def _backward(self, node: Node) -> bool:
        """Reach the inputs of what is no source: only additions have one that is not reached yet."""
        if op_of(node).linear:
            return True
        for name in node.inputs:
            if name not in self.index:
                self.blocked = name
                if self.graph[name].shape != node.shape or not self._passes(node):
                    return False
                self._reach(name, self.index[node.name])
        return True

    def _forward(self, node: Node, sinks: dict[str, np.ndarray]) -> bool:
        """Reach the readers of a tensor, up to the linear ones."""
        for reader in self.graph.consumers(node.name):
            if op_of(reader).linear:
                sinks[reader.name] = self.index[node.name]
                continue
            moved, self.blocked = self._behind(reader, node), reader.name
            if moved is None or not self._reach(reader.name, moved):
                return False
        return bool(self.graph.consumers(node.name))

    def _passes(self, node: Node) -> bool:
        """Whether it works element by element; additions tie their inputs together where they are asked to."""
        channels = op_of(node).channels
        return bool(channels and channels.equivariant) and (self.across_joins or len(node.inputs) == 1)

    def _behind(self, reader: Node, source: Node) -> np.ndarray | None:
        """The channels behind a reader of `source`, None if it does not keep them apart."""
        channels = op_of(reader).channels
        if channels is None or (channels.equivariant and not self._passes(reader)):
            return None
        return channels.index_behind(reader, source.shape, self.index[source.name])

    def _reach(self, name: str, index: np.ndarray) -> bool:
        """Add a tensor; False if it is in the region with other channels."""
        if name in self.index:
            return np.array_equal(self.index[name], index)
        self.index[name] = index
        self.todo.append(name)
        return True
