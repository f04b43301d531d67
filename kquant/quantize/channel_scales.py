"""Scales per channel for residual streams, from the reach of their channels over the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from kquant.config.quant_config import QuantConfig
from kquant.graph.ir import Graph
from kquant.graph.ops.normalization import deviations
from kquant.graph.transforms.channel_scales import candidates, scale_channels, scales_of
from kquant.quantize.calibrate import over_data
from kquant.quantize.data import CalibrationData


def prepare_channels(
    graph: Graph, config: QuantConfig, data: CalibrationData | None, progress: bool = True
) -> tuple[Graph, str]:
    """The graph with scales per channel where they gain bits, and what was done ("" for nothing)."""
    names = candidates(graph)
    if not config.channel_scales or data is None or not data.repeatable or not names:
        return graph, ""
    exponent = 1.0 if config.weights is None or config.weights.bits >= 8 else 0.5
    reach = _observe(graph, names, data, progress)
    scales = {n: s for n in names if (s := scales_of(reach[n], exponent)) is not None}
    if not scales:
        return graph, ""
    bits = np.mean([-np.log2(reach[n] / reach[n].max() + 1e-3).mean() for n in scales])
    return scale_channels(graph, scales), f"{len(scales)} tensors, {bits:.1f} bits for a channel on average"


def _observe(graph: Graph, names: list[str], data: CalibrationData, progress: bool) -> dict[str, np.ndarray]:
    """The largest magnitude of every channel, and of what a normalization that reads it makes of it."""
    readers = {n: [r for r in graph.consumers(n) if r.op == "normalize"] for n in names}

    def largest(values: list[Any]) -> list[Any]:
        found = []
        for name, value in zip(names, values, strict=True):
            parts = [value, *(deviations(r, value, r.weights["scale"])[0] for r in readers[name])]
            rows = [tf.reduce_max(tf.abs(tf.reshape(v, (-1, v.shape[-1]))), 0) for v in parts]
            found.append(tf.reduce_max(tf.stack(rows), 0))
        return found

    reach: dict[str, np.ndarray] = {}
    for found in over_data(graph, names, data, largest, progress, "observing"):
        for name, value in zip(names, found, strict=True):
            reach[name] = np.maximum(reach.get(name, 0.0), value.numpy())
    return reach
