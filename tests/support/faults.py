"""The toy graph quantized, and what may be wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from kquant.graph.ir import Node
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import Grid
from kquant.keras.model import QuantizedModel, insert
from kquant.quantize.calibrate import quantize_graph
from kquant.quantize.plan import make_plan
from tests.support.toy import calibration, config, toy_data, toy_graph


def build(name: str = "w8a8") -> tuple[QuantizedModel, QuantizedGraph]:
    plan = make_plan(toy_graph(), config(name))
    qgraph = quantize_graph(plan, calibration(toy_data()), progress=False)
    return insert(qgraph, {"target": plan.target.name}), qgraph


def with_node(qgraph: QuantizedGraph, name: str, change: Callable[[Node], Node]) -> QuantizedGraph:
    graph = qgraph.graph
    return replace(qgraph, graph=graph.rebuild(change(n) if n.name == name else n for n in graph))


def with_scale(grids: dict[str, Grid | None], names: list[str], factor: float) -> dict[str, Grid | None]:
    """Some grids stretched."""
    return {k: q and (replace(q, scale=q.scale * np.float32(factor)) if k in names else q) for k, q in grids.items()}


def swapped_depthwise(q: QuantizedGraph) -> QuantizedGraph:
    return with_node(q, "dw", lambda n: n.with_weights(kernel=n.weights["kernel"][:, :, ::-1]))
