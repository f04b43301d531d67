"""What each quantizer does to its tensor, and the ranges of channels: streamed over data, without training anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm.auto import tqdm

from kquant.diagnosis.metrics import ratio_db
from kquant.diagnosis.records import ChannelRanges, Quartiles, TensorRecord
from kquant.diagnosis.samples import Samples
from kquant.diagnosis.switches import ACTIVATIONS, Quantizer, Switches
from kquant.errors import CalibrationError
from kquant.graph.ir import Graph
from kquant.graph.ops import op_of, weight_of, weight_view
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import Grid, fake_quantize
from kquant.keras.fake_quant import FakeQuant, grid_settings
from kquant.keras.model import QuantizedModel
from kquant.quantize.data import CalibrationData

Array = np.ndarray[Any, Any]
Tensor = Any
NEGLIGIBLE = 1e-6  # of the layer's largest weight: what batch normalizations leave of dead channels is far below


def tensor_records(
    source: QuantizedModel | QuantizedGraph | Switches, data: Any, *, bins: int = 64, progress: bool = True
) -> tuple[TensorRecord, ...]:
    """What every quantizer does to the float network's tensor.

    Two passes over the data: sums and extremes first, then histograms between the extremes. Everything is reduced
    inside the compiled graph, so memory grows neither with the data nor with its batches.

    Args:
        source: what is quantized. Switches are left all off.
        data: `Samples`, or data of any kind that `quantize_model` takes and that can be read twice.
        bins: of the histograms.
        progress: show a progress bar.

    Returns:
        One record per quantizer, in the order of the network.

    Raises:
        CalibrationError: the data is empty or does not fit, or a tensor is not finite.
    """
    switches = source if isinstance(source, Switches) else Switches.of(source)
    switches.switch(())
    batches = as_batches(data, switches.qgraph.graph)
    live = [q for q in switches.quantizers if q.kind == ACTIVATIONS and q.op != "const"]
    sums = _accumulate(switches, live, _bar(batches, "ranges", progress))
    counts = _histograms(switches, live, sums, _bar(batches, "histograms", progress), bins)
    records = []
    for q in switches.quantizers:
        if q.name in sums:
            records.append(_record(q, sums[q.name], *counts[q.name]))
            continue
        value, axis = _constant(switches.qgraph.graph, q)
        found = _sums_of_constant(value, axis, q.grid)
        lowest, highest = _edges(found)
        records.append(_record(q, found, *np.histogram(value, bins, (lowest, highest))))
    return tuple(records)


def as_batches(data: Any, graph: Graph) -> Samples | CalibrationData:
    """Checked batches of data of any kind."""
    if isinstance(data, Samples | CalibrationData):
        return data
    names = zip(graph.inputs, graph.input_names, strict=True)
    return CalibrationData(data, [(name, graph[node].shape, graph[node].dtype) for node, name in names])


def channel_ranges(before: Graph, after: Graph) -> tuple[ChannelRanges, ...]:
    """Ranges and quartiles of each output channel of the linear layers that two graphs share (white paper, figure 5).

    Args:
        before, after: e.g. the prepared graph, and the graph of the quantized model.
    """
    names = [n.name for n in before if op_of(n).linear and n.name in after.nodes and after[n.name].op == n.op]
    return tuple(ChannelRanges(node=n, before=_weight_ranges(before, n), after=_weight_ranges(after, n)) for n in names)


def _weight_ranges(graph: Graph, name: str) -> tuple[Quartiles, ...]:
    channels = _by_channel(weight_view(graph[name]), weight_of(graph[name]).channels)
    a, b, c, d, e = np.percentile(channels, [0, 25, 50, 75, 100], axis=1).tolist()
    return tuple(zip(a, b, c, d, e, strict=True))


@dataclass(frozen=True, eq=False)
class _Sums:
    """Of one tensor against its grid; of values of any number, to be added.

    Attributes:
        sums: float64 [4]: squares of the values, squares of what quantization changes in them, how many values the
            grid cuts off, how many there are.
        low, high: extremes per channel.
        of_weights: whether the channels are those of weights.
    """

    sums: Array
    low: Array
    high: Array
    of_weights: bool = False

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.sums + other.sums, np.minimum(self.low, other.low), np.maximum(self.high, other.high))


def _accumulate(switches: Switches, quantizers: Sequence[Quantizer], batches: Iterable[Any]) -> dict[str, _Sums]:
    grids = [(q.grid, _fake_quant(q.grid)) for q in quantizers]

    def summarize(tensors: list[Tensor]) -> list[Any]:
        return [_sums(x, *grid) for x, grid in zip(tensors, grids, strict=True)]

    totals: dict[str, _Sums] = {}
    for values in switches.stream(batches, [q.node for q in quantizers], summarize):
        for q, (sums, low, high) in zip(quantizers, values, strict=True):
            found = _Sums(sums, low, high)
            totals[q.name] = totals[q.name] + found if q.name in totals else found
    for q in quantizers:
        found = totals[q.name]
        if not (np.isfinite(found.low).all() and np.isfinite(found.high).all()):
            raise CalibrationError(
                f"The values at {q.node!r} hold NaN or infinite numbers; check the model's weights and the data."
            )
    return totals


def _fake_quant(grid: Grid) -> FakeQuant:
    """The quantizer of a grid."""
    quantizer = FakeQuant(**(grid_settings(grid) or {}))
    quantizer.assign(grid)
    return quantizer


def _sums(x: Tensor, grid: Grid, quantizer: FakeQuant) -> tuple[Tensor, Tensor, Tensor]:
    """(`_Sums.sums`, low per channel, high per channel) of a tensor [n, ..., channels]."""
    low, high = _limits(grid)
    rows = tf.reshape(x, (-1, x.shape[-1] if x.shape.rank > 1 else 1))
    outside = tf.math.count_nonzero((x < low) | (x > high))
    squares = [tf.reduce_sum(tf.square(v)) for v in (x, x - quantizer.fake_quantize(x)[0])]
    counts = [tf.cast(v, tf.float64) for v in (outside, tf.size(x, tf.int64))]
    sums = tf.stack([*(tf.cast(s, tf.float64) for s in squares), *counts])
    return sums, tf.reduce_min(rows, 0), tf.reduce_max(rows, 0)


def _limits(grid: Grid) -> tuple[Array, Array]:
    """The values from which on rounding ends at the edges of the grid: half a step beyond them."""
    low, high = ((b - grid.zero_point) * grid.scale for b in (grid.qmin - 0.5, grid.qmax + 0.5))
    return np.asarray(low, np.float32), np.asarray(high, np.float32)


def _histograms(
    switches: Switches, quantizers: Sequence[Quantizer], sums: dict[str, _Sums], batches: Iterable[Any], bins: int
) -> dict[str, tuple[Array, Array]]:
    edges = {q.name: _edges(sums[q.name]) for q in quantizers}

    def summarize(tensors: list[Tensor]) -> list[Tensor]:
        ranges = [tf.constant(edges[q.name], tf.float32) for q in quantizers]
        return [tf.histogram_fixed_width(x, r, bins) for x, r in zip(tensors, ranges, strict=True)]

    totals = {q.name: np.zeros(bins, np.int64) for q in quantizers}
    for values in switches.stream(batches, [q.node for q in quantizers], summarize):
        for q, counts in zip(quantizers, values, strict=True):
            totals[q.name] += counts
    return {name: (totals[name], np.linspace(*edges[name], bins + 1)) for name in totals}


def _edges(sums: _Sums) -> tuple[float, float]:
    low, high = float(sums.low.min()), float(sums.high.max())
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _constant(graph: Graph, q: Quantizer) -> tuple[Array, int | None]:
    """Weights or a constant, and the axis of their channels."""
    node = graph[q.node]
    if node.op == "const":
        value = node.weights["value"]
        return value, value.ndim - 1 if value.ndim else None
    return weight_view(node), weight_of(node).channels


def _sums_of_constant(value: Array, axis: int | None, grid: Grid) -> _Sums:
    channels = _by_channel(value, axis)
    low, high = (np.reshape(v, (-1, 1)) for v in _limits(grid))
    by_grid = channels if grid.axis is not None else value.reshape(1, -1)
    wide = value.astype(np.float64)
    squares = [np.sum(wide**2), np.sum((wide - fake_quantize(value, grid)) ** 2)]
    outside = np.count_nonzero((by_grid < low) | (by_grid > high))
    return _Sums(np.array([*squares, outside, value.size]), channels.min(1), channels.max(1), of_weights=True)


def _by_channel(value: Array, axis: int | None) -> Array:
    """[channels, rest]; one channel where there is no axis."""
    return value.reshape(1, -1) if axis is None else np.moveaxis(value, axis, 0).reshape(value.shape[axis], -1)


def _record(q: Quantizer, sums: _Sums, counts: Array, edges: Array) -> TensorRecord:
    ranges = np.maximum(np.abs(sums.low), np.abs(sums.high)) if sums.of_weights else sums.high - sums.low
    dead = ranges <= NEGLIGIBLE * ranges.max() if sums.of_weights else ranges == 0
    living = ranges[~dead]
    low, high = ((b - q.grid.zero_point) * q.grid.scale for b in (q.grid.qmin, q.grid.qmax))
    signal, noise, outside, count = (float(v) for v in sums.sums)
    return TensorRecord(
        node=q.node,
        layer=q.layer,
        op=q.op,
        kind=q.kind,
        bits=q.bits,
        low=float(np.min(low)),
        high=float(np.max(high)),
        seen_low=float(sums.low.min()),
        seen_high=float(sums.high.max()),
        sqnr=ratio_db(signal, noise),
        saturated=outside / max(1.0, count),
        channel_ratio=float(living.max() / np.median(living)) if living.size else 1.0,
        dead_channels=int(np.count_nonzero(dead)),
        counts=tuple(int(c) for c in counts),
        edges=tuple(float(e) for e in edges),
    )


def _bar(batches: Samples | CalibrationData, title: str, progress: bool) -> Iterable[Any]:
    total = len(batches.batches) if isinstance(batches, Samples) else batches.num_batches
    return tqdm(iter(batches), desc=title, unit="batch", total=total, disable=not progress, leave=False)
