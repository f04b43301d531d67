"""Analytic bias correction: what quantized weights add to the mean of an output is taken out of the bias, without data.

    E[W_q x] - E[W x] = (W_q - W) E[x]

White paper section 3.3 (Nagel et al. 2019, arXiv 1906.04721, section 4.2): the expectation E[x] of an input comes from
batch normalization statistics and the clipped normal distribution (`quantize.moments`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from kquant.graph.ir import Graph
from kquant.graph.moments import Moments
from kquant.graph.ops import bias_of, op_of, weight_of
from kquant.grids.grid import Grid
from kquant.quantize.bias_correction import round_kernel
from kquant.quantize.input_moments import estimate_inputs
from kquant.quantize.moments import linear_mean, propagate


@dataclass(frozen=True, eq=False)
class CorrectionReport:
    """What was done.

    Attributes:
        corrected: linear operation -> what was added to its bias [channels].
        skipped: linear operation whose weights were quantized -> why its bias was left as it is.
    """

    corrected: Mapping[str, np.ndarray] = field(repr=False)
    skipped: Mapping[str, str]


def correct_biases_analytically(
    graph: Graph, weights: Mapping[str, Grid], inputs: Mapping[str, Moments] | None = None
) -> tuple[Graph, CorrectionReport]:
    """Quantize the weights of linear operations and correct their biases by -(W_q - W) E[x].

    E[x] is that of the float network: corrected layers keep their means, so that it is also that of the quantized one.

    Args:
        graph: a float graph, batch normalization folded.
        weights: linear operation -> the grid of its `weight_view`; entries for other operations are ignored.
        inputs: moments of the graph's inputs; `estimate_inputs(graph)` by default. Layers that see an input without
            moments are quantized and not corrected.

    Returns:
        The graph with weights on their grids and corrected biases, and a report.
    """
    known, unknown = propagate(graph, estimate_inputs(graph) if inputs is None else inputs)
    nodes, corrected, skipped = dict(graph.nodes), {}, {}
    for node in graph:
        if not op_of(node).linear or node.name not in weights:
            continue
        key, source = weight_of(node).name, node.inputs[0]
        rounded = round_kernel(node, weights[node.name])
        nodes[node.name] = rounded
        if source in unknown:
            skipped[node.name] = unknown[source]
            continue
        error = rounded.weights[key].astype(np.float64) - node.weights[key]
        shift = -linear_mean(node, error, known[source].mean, graph[source].shape)
        bias = (node.weights[bias_of(node)] + shift).astype(np.float32)
        nodes[node.name] = rounded.with_weights(**{bias_of(node): bias})
        corrected[node.name] = shift
    return graph.rebuild(nodes.values()), CorrectionReport(corrected, skipped)
