"""Normalizations written out for integers, by what the data says of their sums of squares."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from kquant.config.quant_config import QuantConfig
from kquant.graph.ir import Graph
from kquant.graph.ops.normalization import deviations
from kquant.graph.transforms.expand_normalization import Spreads, expand_normalization
from kquant.quantize.calibrate import over_data
from kquant.quantize.data import CalibrationData


def prepare_normalization(
    graph: Graph, config: QuantConfig, data: CalibrationData | None, progress: bool = True
) -> tuple[Graph, str]:
    """The graph with its normalizations written out, and what was done ("" without any)."""
    names = [n.name for n in graph if n.op == "normalize"]
    if not names:
        return graph, ""
    if data is None or not data.repeatable:
        return expand_normalization(graph), f"{len(names)} in one stage: the spread of their variances is not known"
    spreads = observe_spreads(graph, names, data, progress)
    expanded = expand_normalization(graph, spreads)
    two = sum(f"{name}/roots" in expanded.nodes for name in names)
    return expanded, f"{len(names)}, {two} of them in two stages"


def observe_spreads(graph: Graph, names: list[str], data: CalibrationData, progress: bool = True) -> Spreads:
    """The smallest and largest sum of squares above epsilon, of every normalization that has one."""
    nodes = [graph[name] for name in names]

    def extremes(values: list[Any]) -> Any:
        found = []
        for node, x in zip(nodes, values, strict=True):
            _, total = deviations(node, x, node.weights["scale"])
            above = total > node.attrs["epsilon"]
            found.append([tf.reduce_min(tf.where(above, total, np.inf)), tf.reduce_max(total)])
        return tf.stack(found)

    low, high = np.full(len(names), np.inf), np.zeros(len(names))
    for found in over_data(graph, [n.inputs[0] for n in nodes], data, extremes, progress, "observing"):
        low, high = np.minimum(low, found.numpy()[:, 0]), np.maximum(high, found.numpy()[:, 1])
    return {n: (float(lo), float(hi)) for n, lo, hi in zip(names, low, high, strict=True) if np.isfinite(lo)}
