"""Average poolings on grids of their own, where the target computes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from kquant.config.quant_config import QuantConfig
from kquant.graph.ir import Graph
from kquant.graph.ops import op_of
from kquant.graph.transforms.average_windows import average_windows, is_padded
from kquant.quantize.calibrate import over_data
from kquant.quantize.data import CalibrationData
from kquant.targets.target import get_target

GAIN = np.sqrt(2)  # two roundings on a grid of its own are as good as one where the input reaches so much farther


def prepare_pooling(
    graph: Graph, config: QuantConfig, data: CalibrationData | None, progress: bool = True
) -> tuple[Graph, str]:
    """The graph with its average poolings on grids of their own, and what was done ("" for nothing).

    One with padding is rounded twice then, so that the data has to say that it gains. With 16 bits the grid of the
    input is fine enough.
    """
    kernels = get_target(config.target).kernels
    names = [node.name for node in graph if op_of(node).apart in kernels]
    few = config.activations is not None and config.activations.bits <= 8
    if not names or not few:
        return graph, ""
    padded = [name for name in names if is_padded(graph, graph[name])]
    apart = set(padded) - _smaller(graph, padded, data, progress)
    count = len(names) - len(apart)
    return average_windows(graph, apart), f"{count} of {len(names)} averages of windows on grids of their own"


def _smaller(graph: Graph, names: list[str], data: CalibrationData | None, progress: bool) -> set[str]:
    """The nodes whose output has a range that much smaller than their input has."""
    if data is None or not data.repeatable or not names:
        return set()

    def extremes(values: list[Any]) -> Any:
        return tf.stack([[tf.reduce_max(-v), tf.reduce_max(v)] for v in values])

    read = [tensor for name in names for tensor in (graph[name].inputs[0], name)]
    reach = np.zeros((len(read), 2))  # a grid holds zero, too
    for found in over_data(graph, read, data, extremes, progress, "observing"):
        reach = np.maximum(reach, found.numpy())
    widths = reach.sum(1).reshape(-1, 2)
    return {name for name, (source, own) in zip(names, widths, strict=True) if source > GAIN * own}
