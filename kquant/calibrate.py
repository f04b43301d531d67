"""Ranges of activations from streamed data, and of weights, turned into the grids of a plan.

The float graph runs once over the data; memory does not grow with the number of batches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm.auto import tqdm

from kquant.affine import QParams, fit_bias, qparams_from_range
from kquant.data import CalibrationData
from kquant.graph.ir import Graph, Node
from kquant.graph.ops import BIAS, LINEAR, QUANTIZED_WEIGHT, evaluate, weight_view
from kquant.observers import Histogram, MinMax
from kquant.plan import Plan
from kquant.qgraph import QuantizedGraph
from kquant.ranges import activation_range, weight_range

Observers = dict[str, MinMax | Histogram]


def quantize_graph(plan: Plan, data: CalibrationData | None, progress: bool = True) -> QuantizedGraph:
    """Give every tensor of the plan its grid.

    Raises:
        CalibrationError: the data is empty or does not fit the model, or a tensor is not finite.
    """
    return grids_from_observers(plan, {} if data is None else observe(plan, data, progress))


def observe(plan: Plan, data: CalibrationData, progress: bool = True) -> Observers:
    """Statistics of the tensors whose values set a grid, from one pass over the data.

    Extremes are reduced inside the compiled graph; only tensors whose range method looks at the
    distribution leave it, into streaming histograms.
    """
    # captured tensors are shared by the compiled function, arrays would be copied into it as constants
    graph = plan.graph.rebuild(n.with_(weights={k: tf.constant(w) for k, w in n.weights.items()}) for n in plan.graph)
    names = [n for members in plan.observed.values() for n in members if graph[n].op not in ("const", "embedding")]
    reduced = [n for n in names if plan.activations[n].method == "min_max"]
    detailed = [n for n in names if n not in reduced]
    observers: Observers = {n: MinMax(name=n) for n in reduced} | {n: Histogram(name=n) for n in detailed}

    signature = [tf.TensorSpec(graph[i].shape, graph[i].dtype) for i in graph.inputs]

    @tf.function(input_signature=signature, autograph=False)
    def statistics(*feeds: Any) -> tuple[Any, Any]:
        values = evaluate(graph, feeds, [*reduced, *detailed])
        extremes = [[tf.reduce_min(v), tf.reduce_max(v)] for v in values[: len(reduced)]]
        return tf.stack(extremes) if extremes else tf.zeros((0, 2)), values[len(reduced) :]

    rows = _rows_at_once(graph)
    bar = tqdm(iter(data), desc="calibrating", unit="batch", total=data.num_batches, disable=not progress, leave=False)
    for batch in bar:
        for k in range(0, len(batch[0]), rows):
            extremes, values = statistics(*(x[k : k + rows] for x in batch))
            for name, low_high in zip(reduced, extremes.numpy(), strict=True):
                observers[name].update(low_high)
            for name, value in zip(detailed, values, strict=True):
                observers[name].update(value.numpy())
    return observers


def _rows_at_once(graph: Graph) -> int:
    """Samples whose largest activation takes about 32 MB: memory does not depend on the caller's batch size."""
    largest = max(4 * int(np.prod([d or 1 for d in node.shape])) for node in graph)
    return max(1, (32 << 20) // largest)


def grids_from_observers(plan: Plan, observers: Observers) -> QuantizedGraph:
    """Weight and activation grids; activations first, since a bias must fit its accumulator."""
    graph = plan.graph
    leaders = {leader: _activation_grid(plan, leader, observers) for leader in plan.observed} | plan.fixed
    activations: dict[str, QParams | None] = {n.name: None for n in graph}
    activations.update({name: leaders[leader] for name, leader in plan.groups.items()})
    weights: dict[str, QParams | None] = {}
    for name in plan.weights:
        weights[name] = _weight_grid(plan, graph[name], activations)
    for node in graph:
        if node.op == "embedding":
            weights[node.name] = activations[node.name]
    return QuantizedGraph(graph, activations, weights)


def _activation_grid(plan: Plan, leader: str, observers: Observers) -> QParams:
    """The grid of a group: the hull of the ranges of its observed tensors."""
    spec, ranges = plan.activations[leader], []
    for name in plan.observed[leader]:
        node = plan.graph[name]
        if node.op in ("const", "embedding"):
            value = node.weights["value" if node.op == "const" else "table"]
            ranges.append((float(value.min()), float(value.max())))
        else:
            low, high = activation_range(spec.method, observers[name], spec)
            ranges.append((float(low), float(high)))
    return place(qparams_from_range(min(r[0] for r in ranges), max(r[1] for r in ranges), spec))


def place(q: QParams) -> QParams:
    """Move a grid of fewer than 8 bits to an edge of the int8 container, so that saturation clamps it.

    A grid that starts at zero goes to the upper edge (a fused ReLU clamps below), any other to the
    lower edge. Grids of 8 bits or more stay.
    """
    levels = q.qmax - q.qmin
    if levels >= 254:
        return q
    offset = 127 - q.qmax if int(q.zero_point) == q.qmin else -128 - q.qmin
    return replace(
        q, zero_point=np.asarray(q.zero_point + offset, np.int32), qmin=q.qmin + offset, qmax=q.qmax + offset
    )


def _weight_grid(plan: Plan, node: Node, activations: dict[str, QParams | None]) -> QParams:
    spec = plan.weights[node.name]
    view = weight_view(node)
    axis = QUANTIZED_WEIGHT[node.op][1] if spec.per_channel else None
    low, high = weight_range(spec.method, view, spec, axis, name=node.origin or node.name)
    q = qparams_from_range(low, high, spec, axis)
    x = activations.get(node.inputs[0])
    if node.op in LINEAR and x is not None:
        q = fit_bias(q, node.weights[BIAS[node.op]], x.scale)
    return q
