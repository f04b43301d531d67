"""Mean, standard deviation and reach of every tensor, channel by channel and without data.

A folded batch normalization leaves the mean and the standard deviation of its pre-activation behind (`Node.stats`).
From there the moments travel: through a clip by the closed form of the clipped normal distribution (white paper
section 3.3; Nagel et al. 2019, arXiv 1906.04721, appendix C), through linear operations by linearity, through other
functions by numerical integration. Channels are the entries of the last axis; the moments are those over the batch
and all places.

What is approximate: pre-activations and sums count as normal; the operands of a linear or binary operation count as
independent, unless one is computed from the other (x * sigmoid(x)); the places of a mean or maximum have a correlation
that is typical of images, and average pooling keeps the standard deviation.
"""

from __future__ import annotations

from collections.abc import Mapping

from kquant.graph.ir import Graph, Node, Shape
from kquant.graph.moments import Array, Moments
from kquant.graph.ops import clip_of, linear_of, op_of


def propagate(graph: Graph, inputs: Mapping[str, Moments] | None = None) -> tuple[dict[str, Moments], dict[str, str]]:
    """The moments of every tensor of a graph, behind its fused activation.

    Statistics of a batch normalization win over what is propagated, so that errors do not add up.

    Args:
        graph: a float graph, batch normalization folded.
        inputs: moments of graph inputs, e.g. from `estimate_inputs`.

    Returns:
        The moments by node, and for every other node why they are unknown.
    """
    known: dict[str, Moments] = {}
    unknown: dict[str, str] = {}
    given = inputs or {}
    for node in graph:
        record = op_of(node)
        missing = next((i for i in node.inputs if i in unknown), None)
        if {"mean", "std"} <= node.stats.keys():
            found = Moments.normal(node.stats["mean"], node.stats["std"])
        elif node.name in given:
            found = given[node.name]
        elif node.op == "input":
            unknown[node.name] = f"nothing is known of the input {node.name!r}"
            continue
        elif record.moments is None:
            unknown[node.name] = f"{node.name!r} ({node.origin_type or node.op}) has no rule for moments"
            continue
        elif missing is not None and not record.lookup:
            unknown[node.name] = unknown[missing]
            continue
        else:
            sources = [graph[i] for i in node.inputs]
            found = record.moments(node, sources, [known[i] for i in node.inputs if i in known])
        known[node.name] = found.clip(*clip_of(node))
    return known, unknown


def linear_mean(node: Node, weight: Array, mean: Array, source: Shape) -> Array:
    """E[W x] of a linear operation without its bias, [channels]; exact whatever the distribution of x.

    With "same" padding a tap counts at the places where it reads an element, not a zero.

    Args:
        node: a linear operation.
        weight: in place of the node's kernel (or scale), e.g. its quantization error.
        mean: of the input [input channels].
        source: shape of the input.
    """
    linear = linear_of(node)
    return linear.contract(node, weight, mean, linear.shares(node, source, weight))
