"""A graph with the parameters of every integer tensor: what the simulation and the writer share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kquant.graph.ir import Graph
from kquant.grids.grid import Grid


@dataclass(frozen=True, eq=False)
class QuantizedGraph:
    """A legal integer program: a float graph plus the grids of its tensors.

    Attributes:
        graph: float weights. Quantizing them with `weights` gives the integers; weights that are
            already on their grid (AdaRound, trained) come out verbatim.
        activations: node name -> grid of the node's output, None where it stays float (or is an
            integer id tensor).
        weights: node name -> grid of its quantized weight (`ops.weight_view`), None or absent where the
            weights stay float. The bias of an integer linear operation is
            stored at scale s_x * s_w with zero point 0 and has no entry.

    A node runs in integers exactly where `activations[node]` is not None; then each of its inputs
    has a grid too, with two exceptions: "requantize" may read a float tensor (it becomes
    QUANTIZE), and a look-up in a table reads ids. A node that runs in float may read an integer tensor,
    which is dequantized in front of it.
    """

    graph: Graph
    activations: Mapping[str, Grid | None]
    weights: Mapping[str, Grid | None]
