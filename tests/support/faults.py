"""The toy graph quantized, and what may be wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from kquant.graph.ir import Node
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import Grid
from kquant.keras.model import QuantizedModel, insert
from tests.support.toy import asked, config, toy_qgraph


def build(name: str = "w8a8") -> tuple[QuantizedModel, QuantizedGraph]:
    qgraph = toy_qgraph(name)
    return insert(qgraph, asked(config(name).target)), qgraph


def with_node(qgraph: QuantizedGraph, name: str, change: Callable[[Node], Node]) -> QuantizedGraph:
    """The graph with one node changed, its integers rounded anew."""
    graph = qgraph.graph.rebuild(change(n) if n.name == name else n for n in qgraph.graph)
    return QuantizedGraph(graph, qgraph.activations, qgraph.weights)


def with_scale(grids: dict[str, Grid | None], names: list[str], factor: float) -> dict[str, Grid | None]:
    """Some grids stretched."""
    return {k: q and (replace(q, scale=q.scale * np.float32(factor)) if k in names else q) for k, q in grids.items()}


def swapped_depthwise(q: QuantizedGraph) -> QuantizedGraph:
    return with_node(q, "dw", lambda n: n.with_weights(kernel=n.weights["kernel"][:, :, ::-1]))
