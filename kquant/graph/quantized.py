"""A graph with the integers and grids of its tensors: what the simulation and the writer share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from kquant.graph.ir import Graph
from kquant.graph.ops import weight_view
from kquant.grids.grid import Grid, quantize


@dataclass(frozen=True, eq=False)
class QuantizedGraph:
    """A legal integer program: a graph, the grids of its tensors, and the integers of its weights.

    Attributes:
        graph: the operations; its weights in float32 are where training starts, and what stays float. They lie on
            their grid where a step decided their integers (AdaRound, bias correction, training).
        activations: node name -> grid of the node's output, None where it stays float (or is an
            integer id tensor).
        weights: node name -> grid of its quantized weight (`ops.weight_view`), None or absent where the
            weights stay float. The bias of an integer linear operation is
            stored at scale s_x * s_w with zero point 0 and has no entry.
        integers: node name -> the integers of the weight that `weights` describes, int8 or int16, in the shape of its
            `weight_view`: decided once, by whoever made the graph. Those that are not given are the nearest ones.

    A node runs in integers exactly where `activations[node]` is not None; then each of its inputs
    has a grid too, with two exceptions: "requantize" may read a float tensor (it becomes
    QUANTIZE), and a look-up in a table reads ids. A node that runs in float may read an integer tensor,
    which is dequantized in front of it.
    """

    graph: Graph
    activations: Mapping[str, Grid | None]
    weights: Mapping[str, Grid | None]
    integers: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        grids = {name: q for name, q in self.weights.items() if q is not None}
        nearest = {
            name: quantize(weight_view(self.graph[name]), q).astype(np.int8 if q.container == 8 else np.int16)
            for name, q in grids.items()
            if name not in self.integers
        }
        object.__setattr__(self, "integers", {**self.integers, **nearest})
