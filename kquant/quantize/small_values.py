"""tanh of small numbers on grids of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from kquant.config.quant_config import QuantConfig
from kquant.graph.ir import Graph
from kquant.quantize.calibrate import over_data
from kquant.quantize.data import CalibrationData
from kquant.quantize.layer_specs import resolve
from kquant.targets.target import get_target

SMALL = 1 / 8  # of the reach of a grid that the target dictates: three bits of it are used for nothing


def prepare_small_values(
    graph: Graph, config: QuantConfig, data: CalibrationData | None, progress: bool = True
) -> tuple[Graph, str]:
    """The graph with tables in place of tanh where its values are small, and what was done ("" for nothing).

    The kernels write tanh on a grid from -1 to 1, whatever the numbers are. A table has the grid of its values. It
    takes several times as long, so that values of an ordinary size keep the kernel.
    """
    target = get_target(config.target)
    if data is None or not data.repeatable or not {"tanh", "function"} <= target.kernels.keys():
        return graph, ""
    specs = resolve(graph, config) if any(n.op == "tanh" for n in graph) else {}
    names = [n.name for n in graph if n.op == "tanh" and (a := specs[n.name].activations) and a.bits <= 8]
    if not names or target.fixed_output("tanh", 8) is None:
        return graph, ""

    def reach(values: list[Any]) -> Any:
        return tf.stack([tf.reduce_max(tf.abs(v)) for v in values])

    largest = np.zeros(len(names))
    for found in over_data(graph, names, data, reach, progress, "observing"):
        largest = np.maximum(largest, found.numpy())
    small = {name for name, most in zip(names, largest, strict=True) if 0 < most < SMALL}
    if not small:
        return graph, ""
    tables = (
        n.with_(op="function", attrs={**n.attrs, "steps": (("tanh", 0),)}) if n.name in small else n for n in graph
    )
    return graph.rebuild(tables), f"{len(small)} of {len(names)} tanh as tables, on the grid of their small values"
