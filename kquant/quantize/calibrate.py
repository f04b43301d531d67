"""Ranges of weights, and of activations from streamed data, turned into the grids of a plan.

The float graph runs once over the data; memory does not grow with the number of batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm.auto import tqdm

from kquant.config.specs import QuantSpec
from kquant.errors import CalibrationError, ConfigError
from kquant.graph.ir import Graph, Node, sample_size
from kquant.graph.ops import bias_of, compute, evaluate, op_of, weight_of, weight_view
from kquant.graph.quantized import QuantizedGraph
from kquant.graph.transforms.padding import only_largest_count
from kquant.graph.transforms.training import in_training
from kquant.grids.formats import weight_grid
from kquant.grids.grid import Grid, fit_bias, grid_from_range
from kquant.grids.observers import Histogram, MinMax, Rows
from kquant.grids.ranges import activation_range
from kquant.quantize.data import CalibrationData
from kquant.quantize.plan import Plan

Observers = dict[str, Any]  # what `ranges.activation_range` reads: observers of the data, or moments
Ranges = Mapping[str, tuple[float, float]]  # what grids of activations cover, by the first tensor of each

_DRAWN = 2**13  # values of a sample that a histogram counts; all for small tensors
_LARGEST_FACTOR = 128.0  # XNNPACK takes less than 256, and crashes with more

# How each range method looks at a tensor; "batch_norm" does not, its moments come from the graph.
_OBSERVERS: Mapping[str, Callable[[str], MinMax | Histogram | Rows]] = MappingProxyType(
    {"min_max": MinMax, "mse": Histogram, "percentile": Histogram, "cross_entropy": Rows}
)


def quantize_graph(plan: Plan, data: CalibrationData | None, progress: bool = True) -> QuantizedGraph:
    """Give every tensor of the plan its grid, weights rounded to nearest.

    Raises:
        CalibrationError: the data is empty or does not fit the model, or a tensor is not finite.
    """
    statistics = {} if data is None else observe(plan, data, progress)
    return make_grids(plan, weight_grids(plan), activation_ranges(plan, statistics))


def observe(plan: Plan, data: CalibrationData, progress: bool = True) -> Observers:
    """Statistics of the tensors whose values set a grid, from one pass over the data.

    Extremes are reduced inside the compiled graph. What other range methods look at leaves it: rows of logits, and for
    histograms a part of every sample, evenly spread. A graph that is made for training is observed as it trains: behind
    a Dropout, say, values reach further than at inference.
    """
    graph = in_training(plan.graph)
    names = [n for members in plan.observed.values() for n in members if op_of(graph[n]).values is None]
    kinds = {n: _OBSERVERS[m] for n in names if (m := plan.activations[n].method) in _OBSERVERS}
    observers: Observers = {n: kind(n) for n, kind in kinds.items()}
    drawn, rows = ([n for n, kind in kinds.items() if kind is wanted] for wanted in (Histogram, Rows))
    reduced = [n for n in kinds if n not in rows]

    def statistics(values: list[Any]) -> tuple[Any, list[Any], list[Any]]:
        tensors = dict(zip(kinds, values, strict=True))
        extremes = [[tf.reduce_min(tensors[n]), tf.reduce_max(tensors[n])] for n in reduced]
        stacked = tf.stack(extremes) if extremes else tf.zeros((0, 2))
        return stacked, [_evenly_drawn(tensors[n], graph[n]) for n in drawn], [tensors[n] for n in rows]

    for extremes, parts, wholes in over_data(graph, list(kinds), data, statistics, progress, "calibrating"):
        values = dict(zip(drawn, parts, strict=True))
        for name, low_high in zip(reduced, extremes.numpy(), strict=True):
            observers[name].update(*((values[name], low_high) if name in values else (low_high,)))
        for name, whole in zip(rows, wholes, strict=True):
            observers[name].update(np.asarray(whole))  # an array where it depends on no input
    return observers


def _evenly_drawn(x: Any, node: Node) -> Any:
    """About `_DRAWN` values of every sample: each k-th, where k shares no factor with the size, so with no axis."""
    size = sample_size(node)
    step = -(-size // _DRAWN)
    while math.gcd(step, size) > 1:
        step += 1
    return tf.reshape(x, (-1, size))[:, ::step]


def smallest_outputs(
    graph: Graph, names: Sequence[str], data: CalibrationData, progress: bool = True
) -> dict[str, np.ndarray]:
    """The smallest value that each channel (entry of the last axis) of some tensors takes over the data.

    Returns:
        node -> float32 [channels].
    """

    def smallest(values: list[Any]) -> list[Any]:
        return [tf.reduce_min(tf.reshape(v, (-1, v.shape[-1])), axis=0) for v in values]

    found: dict[str, np.ndarray] = {}
    for values in over_data(graph, names, data, smallest, progress, "observing"):
        for name, value in zip(names, values, strict=True):
            found[name] = np.minimum(found.get(name, np.inf), value.numpy())
    return found


def over_data(
    graph: Graph, names: Sequence[str], data: CalibrationData, summarize: Callable[[list[Any]], Any], *bar: Any
) -> Iterator[Any]:
    """summarize(the tensors `names`), compiled with the float graph, of one slice of the data after another."""
    progress, title = bar
    # captured tensors are shared by the compiled function, arrays would be copied into it as constants
    graph = graph.rebuild(n.with_(weights={k: tf.constant(w) for k, w in n.weights.items()}) for n in graph)
    signature = [tf.TensorSpec(graph[i].shape, graph[i].dtype) for i in graph.inputs]

    @tf.function(input_signature=signature, autograph=False)
    def run(*feeds: Any) -> Any:
        return summarize(evaluate(graph, feeds, names))

    run = run.get_concrete_function()  # a call of `run` would warn of traces: each walk over the data has its own
    rows = _rows_at_once(graph)
    total = data.num_batches
    for batch in tqdm(iter(data), desc=title, unit="batch", total=total, disable=not progress, leave=False):
        for k in range(0, len(batch[0]), rows):
            feeds = [x[k : k + rows] for x in batch]
            try:
                found = run(*feeds)
            except tf.errors.InvalidArgumentError as error:
                raise CalibrationError(_refusal(graph, feeds) or str(error)) from error
            yield found


def _refusal(graph: Graph, feeds: Sequence[Any]) -> str:
    """Which layer cannot compute a batch, and why; such as ids beyond a table."""
    values = dict(zip(graph.inputs, feeds, strict=True))
    for node in graph:
        if node.op == "input":
            continue
        try:
            values[node.name] = compute(node, [values[i] for i in node.inputs])
        except tf.errors.InvalidArgumentError as error:
            reason = str(error.message).splitlines()[0]
            return f"Layer {node.name!r} cannot compute the calibration data: {reason}. Correct the data."
    return ""


def _rows_at_once(graph: Graph) -> int:
    """Samples whose largest activation takes about 32 MB: memory does not depend on the caller's batch size."""
    largest = max(4 * sample_size(node) for node in graph)
    return max(1, (32 << 20) // largest)


def weight_grids(plan: Plan) -> dict[str, Grid]:
    """The grids of all quantized weights, by the range methods of their specs."""
    grids = {}
    for name, spec in plan.weights.items():
        node = plan.graph[name]
        axis = weight_of(node).channels if spec.per_channel else None
        w = weight_view(node)
        if op_of(node).linear and not w.any():  # any scale will do: one that keeps the bias' step fine
            high = np.full(() if axis is None else w.shape[axis], np.abs(node.weights[bias_of(node)]).max(initial=0.0))
            plain = replace(spec, bits=max(spec.bits, 2), format="uniform", block=None)
            grids[name] = grid_from_range(np.zeros_like(high), high / 256, plain, axis)
        else:
            grids[name] = weight_grid(w, spec, axis, name=node.origin or name, block_scales=plan.block_scales(name))
    return grids


def make_grids(
    plan: Plan,
    weights: Mapping[str, Grid],
    ranges: Ranges,
    integers: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> QuantizedGraph:
    """All grids: those of activations from ranges, and those of weights, where a bias must fit its accumulator.

    Args:
        plan: what is quantized.
        weights: from `weight_grids`.
        ranges: from `activation_ranges`.
        integers: node -> the integers of its weight on that grid, where a step has decided them; others are the nearest
            ones. They are decided anew only where the bias leaves no room for them.
    """
    leaders = {n: place(grid_from_range(*r, plan.activations[n])) for n, r in ranges.items()} | plan.fixed
    leaders = _as_around(plan, leaders, all_zero(ranges))
    leaders = _readable(plan, _above_operands(plan, leaders, weights))
    activations: dict[str, Grid | None] = {n.name: None for n in plan.graph}
    activations.update({name: leaders[leader] for name, leader in plan.groups.items()})
    chosen: dict[str, Grid | None] = {n: _with_room(plan.graph[n], q, activations) for n, q in weights.items()}
    decided = {n: q for n, q in integers.items() if chosen[n] is weights[n]}
    chosen |= {n.name: q for n in plan.graph if op_of(n).lookup and (q := activations[n.name]) is not None}
    return QuantizedGraph(plan.graph, activations, chosen, decided)


def activation_ranges(plan: Plan, statistics: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """What each grid of activations covers, by its first tensor.

    Args:
        plan: what is quantized.
        statistics: tensor -> its observer, or its moments for "batch_norm".
    """
    return {leader: _range(plan, leader, statistics) for leader in plan.sources}


def all_zero(ranges: Ranges) -> tuple[str, ...]:
    """The first tensors of the grids whose range has no width: any scale holds a zero."""
    return tuple(leader for leader, edges in ranges.items() if not any(edges))


def _as_around(plan: Plan, leaders: Mapping[str, Grid], zero: Sequence[str]) -> dict[str, Grid]:
    """The grids, where tensors that are always zero have the scale of what they come from, or else of what reads them.

    Any scale holds a zero, but kernels add and multiply scales that differ by less than `_LARGEST_FACTOR`.
    """
    found, settled = dict(leaders), set(leaders) - set(zero)

    def settle(name: str, around: Iterable[str]) -> None:
        scales = [found[plan.groups[n]].scale for n in around if plan.groups.get(n) in settled]
        if scales and name not in settled:
            found[name] = replace(found[name], scale=np.max(scales))
            settled.add(name)

    for name in zero:
        settle(name, plan.graph[name].inputs)
    for name in reversed(zero):
        settle(name, (n.name for n in plan.graph.consumers(name)))
    return found


def _above_operands(plan: Plan, leaders: Mapping[str, Grid], weights: Mapping[str, Grid]) -> dict[str, Grid]:
    """The grids, none of which is finer than what a sum or a product can tell, such as those of what cancels out.

    A product is a multiple of the product of its operands' steps, and a sum no finer than the larger step. Kernels
    multiply it by less than `_LARGEST_FACTOR`.
    """
    found = dict(leaders)
    for node in plan.graph:
        leader = plan.groups.get(node.name)
        if leader is None or leader in plan.fixed:
            continue
        step = operand_step(node, [found[plan.groups[i]] for i in node.inputs if i in plan.groups], weights)
        least = step / _LARGEST_FACTOR
        if float(found[leader].scale) < least:
            found[leader] = replace(found[leader], scale=np.full_like(found[leader].scale, least))
    return found


def _readable(plan: Plan, leaders: Mapping[str, Grid]) -> dict[str, Grid]:
    """The grids, wider where the kernel that reads one wants that: see `Kernel.least_scale` and `beside_powers`."""
    found = dict(leaders)
    for node in plan.graph:
        leader = plan.groups.get(node.inputs[0]) if node.inputs else None
        if leader is None or leader in plan.fixed:
            continue
        least = plan.target.least_scale(node.op, found[leader].container)
        if found[leader].scale < least:  # a power of two
            found[leader] = replace(found[leader], scale=np.full_like(found[leader].scale, least))
        if plan.activations[leader].power_of_two:
            continue
        exponent = float(np.log2(found[leader].scale))
        distance = plan.target.beside_powers(node.op, found[leader].container)
        if abs(exponent - round(exponent)) < distance:
            scale = np.full_like(found[leader].scale, 2.0 ** (round(exponent) + 1.5 * distance))
            found[leader] = replace(found[leader], scale=scale)
    return found


def operand_step(node: Node, operands: Sequence[Grid], weights: Mapping[str, Grid]) -> float:
    """What kernels multiply to get the output of a sum or product, as a real number; 0 for other operations."""
    if op_of(node).linear and node.name in weights and operands:
        return float(operands[0].scale) * float(np.max(weights[node.name].scale))
    if op_of(node).products and len(operands) == 2:
        return float(operands[0].scale) * float(operands[1].scale)
    return max((float(q.scale) for q in operands), default=0.0) if node.op in ("add", "sub") else 0.0


def _with_room(node: Node, weights: Grid, activations: Mapping[str, Grid | None]) -> Grid:
    """The weights' grid, coarser where the bias of an integer operation would not fit otherwise."""
    x = activations.get(node.inputs[0])
    return weights if not op_of(node).linear or x is None else fit_bias(weights, node.weights[bias_of(node)], x.scale)


def _range(plan: Plan, leader: str, observers: Mapping[str, Any]) -> tuple[float, float]:
    """What the grid of a group covers: the hull of the ranges of its sources, and of what is put on it beside them."""
    spec = plan.activations[leader]
    ranges = [_source_range(plan, name, spec, observers) for name in plan.sources[leader]]
    ranges += _inserted(plan, leader)
    return min(r[0] for r in ranges), max(r[1] for r in ranges)


def _source_range(plan: Plan, name: str, grid: QuantSpec, observers: Mapping[str, Any]) -> tuple[float, float]:
    """The range of one tensor: fixed, of its constants, or by its own method for the `grid` of its group."""
    node, own = plan.graph[name], plan.activations[name]
    if own.range is not None:
        return own.range
    if (values := op_of(node).values) is not None:
        value = node.weights[values]
        return float(value.min()), float(value.max())
    if name not in observers:
        raise CalibrationError(
            f"Nothing is known of the values at {name!r} (method={own.method!r}): pass calibration data with "
            'method="min_max", or set its range=(low, high).'
        )
    low, high = activation_range(own.method, observers[name], replace(grid, percentile=own.percentile))
    room = plan.target.headroom(node.op, plan.target.container_bits(own.bits))
    return float(low) * room, float(high) * room


def _inserted(plan: Plan, leader: str) -> list[tuple[float, float]]:
    """The values that operations put on the grid of a group, such as those of a padding.

    Those that are lower than all others need not be on it where only the largest values count: the lowest step does.

    Raises:
        ConfigError: one is outside a range that the config fixes.
    """
    graph, found = plan.graph, []
    for node in graph:
        value = node.attrs.get(op_of(node).inserts or "")
        if not value or plan.groups.get(node.name) != leader:
            continue
        if only_largest_count(graph, node):
            if value > 0:
                found.append((0.0, float(value)))
            continue
        for name in plan.sources[leader]:
            fixed = plan.activations[name].range
            if fixed is not None and not fixed[0] <= value <= fixed[1]:
                raise ConfigError(
                    f"{node.origin or node.name!r} pads with {value:.4g}, which is outside the range {tuple(fixed)} "
                    f"that the config fixes for {name!r}, on whose grid it is: widen that range."
                )
        found.append((min(0.0, float(value)), max(0.0, float(value))))
    return found


def place(q: Grid) -> Grid:
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
