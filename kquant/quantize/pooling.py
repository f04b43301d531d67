"""Average poolings on grids of their own, where the target computes them."""

from __future__ import annotations

from kquant.config.quant_config import QuantConfig
from kquant.graph.ir import Graph
from kquant.graph.transforms.average_windows import average_windows
from kquant.quantize.data import CalibrationData
from kquant.targets.target import get_target


def prepare_pooling(
    graph: Graph, config: QuantConfig, data: CalibrationData | None, progress: bool = True
) -> tuple[Graph, str]:
    """The graph with its average poolings on grids of their own, and what was done ("" for nothing).

    With 16 bits the grid of the input is fine enough.
    """
    count = sum(node.op == "avg_pool2d" for node in graph)
    few = config.activations is not None and config.activations.bits <= 8
    if not count or not few or "window_mean" not in get_target(config.target).kernels:
        return graph, ""
    return average_windows(graph), f"{count} averages of windows on grids of their own"
