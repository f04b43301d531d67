"""Absorption of high biases (white paper section 3.2; Nagel et al. 2019, arXiv 1906.04721, section 4.1.3).

Where a channel in front of a ReLU is never below c > 0, the ReLU does nothing to c, and c moves into the next bias:

    relu(W1 x + b1) = relu(W1 x + b1 - c) + c,    b1' = b1 - c,    b2' = b2 + W2 c

which shrinks the range of the activation between the two. An upper bound of the activation becomes hi - c, in a list
with one for every channel. Without data, c = max(0, mean - 3 std) of the batch normalization, with data the smallest
value seen (eq. 24). The function is the same wherever the pre-activation is at least c. Since that is a guess where
there is no data, a channel gives up no more than what narrows the range that all channels share: with `high` about the
largest values, no c_i brings the largest high_i - c_i below t = max_i(high_i - c_i), and c_i = high_i - t suffices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from kquant.graph.ir import Graph, Node
from kquant.graph.ops import clip_of, op_of, with_clip
from kquant.graph.scaling import Scaling
from kquant.graph.transforms.regions import Region, find_regions
from kquant.graph.transforms.rescale import scale_input, scale_output, sees_offset

REACH = 6.0  # standard deviations above the mean that a channel reaches (alpha of eq. 18-19, Nagel et al. 2019)


@dataclass(frozen=True, eq=False)
class AbsorbReport:
    """What was done.

    Attributes:
        absorbed: linear operation -> c, what its bias lost [channels]; 0 where nothing is to be gained.
        skipped: linear operation in front of a ReLU -> why nothing was absorbed.
    """

    absorbed: Mapping[str, np.ndarray] = field(repr=False)
    skipped: Mapping[str, str]


def absorb_bias(
    graph: Graph, *, sigmas: float = 3.0, lows: Mapping[str, np.ndarray] | None = None
) -> tuple[Graph, AbsorbReport]:
    """Move what a ReLU always lets through into the biases behind it.

    Zeros of a padding that became zeros less c would change the border, so that a region is left alone where a
    padding lies between its layers, or where a padded window reads it.

    Args:
        graph: a float graph, batch normalization folded and activations fused.
        sigmas: how many standard deviations below its mean a pre-activation is taken to reach.
        lows: linear operation -> the smallest values of its output seen [channels], before or after its activation;
            they take the place of its statistics.

    Returns:
        A graph that computes the same function where no pre-activation is below its c, and a report.
    """
    regions, _ = find_regions(graph)
    nodes, absorbed, skipped = dict(graph.nodes), {}, {}
    for region in regions:
        source = nodes[region.name]
        if clip_of(source)[0] != 0:
            continue
        c = _offset(source, sigmas, lows or {})
        why = _obstacle(nodes, region)
        if isinstance(c, str) or why:
            skipped[region.name] = why or str(c)
            continue
        absorbed[region.name] = c
        if c.any():
            _move(nodes, region, c)
    return graph.rebuild(nodes.values()), AbsorbReport(absorbed, skipped)


def _offset(source: Node, sigmas: float, lows: Mapping[str, np.ndarray]) -> np.ndarray | str:
    """c [channels], or why it is unknown."""
    hi = np.asarray(np.inf if clip_of(source)[1] is None else clip_of(source)[1], np.float64)
    if source.name in lows:
        return np.clip(np.asarray(lows[source.name], np.float64), 0.0, hi)
    if not {"mean", "std"} <= source.stats.keys():
        return "no batch normalization tells its range"
    mean, std = (source.stats[k].astype(np.float64) for k in ("mean", "std"))
    c, high = np.clip(mean - sigmas * std, 0.0, hi), np.clip(mean + REACH * std, 0.0, hi)
    return np.clip(high - (high - c).max(), 0.0, c)


def _obstacle(nodes: Mapping[str, Node], region: Region) -> str:
    """Why an offset of the source's output cannot be undone in all sinks; empty if it can."""
    if len(region.sources) > 1:
        return "several layers make its output"
    offset = Scaling(np.ones(region.channels), np.ones(region.channels), {})
    for name in region.index:
        node, channels = nodes[name], op_of(nodes[name]).channels
        if name != region.name and not (channels and channels.offset(node)):
            return f"{name!r} ({node.op}) does not commute with an offset"
    for name in region.sinks:
        if not sees_offset(nodes[name], nodes[nodes[name].inputs[0]].shape, offset):
            return f"{name!r} reads it with zeros beside it"
    return ""


def _move(nodes: dict[str, Node], region: Region, c: np.ndarray) -> None:
    """Take c out of the source and put it into the sinks, in `nodes`."""
    source = scale_output(nodes[region.name], Scaling(np.ones_like(c), -c, {}))
    lo, hi = clip_of(source)
    if hi is not None:
        source = with_clip(source, lo, (np.asarray(hi) - c).astype(np.float32).tolist())
    nodes[region.name] = source
    for name, index in region.index.items():
        if name != region.name:
            nodes[name] = op_of(nodes[name]).reframed(nodes[name], Scaling(np.ones(len(index)), -c[index], {}))
    for name, index in region.sinks.items():
        nodes[name] = scale_input(nodes[name], Scaling(np.ones(len(index)), c[index], {}))
