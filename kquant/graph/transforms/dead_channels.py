"""Dead channels: outputs that are constant, because all their weights are zero, or that nobody reads.

Weight decay leaves such channels behind, with arbitrary weights on the other side that stretch the
grid of their tensor and that equalization cannot scale. They are resolved exactly:

* a constant zero: the weights that read it become zero;
* another constant, read without padding: it moves into the reader's bias, and the weights become zero;
* an output that only zero weights read: its weights and its bias become zero.

Each can make the next channel dead, so that they are repeated until nothing changes. Folding a batch normalization
into such a channel leaves weights of 1e-12 instead of zeros, and statistics that are not those of its output: what
is negligible beside the bias becomes zero first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from kquant.graph.ir import Graph, Node
from kquant.graph.ops import bias_of, clip_array, op_of
from kquant.graph.scaling import Scaling
from kquant.graph.transforms.magnitudes import input_ranges, magnitudes, output_ranges
from kquant.graph.transforms.regions import Region
from kquant.graph.transforms.rescale import scale_input, scale_output, sees_offset

NEGLIGIBLE = 1e-6  # sum of |w| over |b|: inputs below 1e6 in magnitude cannot change the sign of the output


@dataclass(frozen=True)
class DeadChannels:
    """How many channels were resolved.

    Attributes:
        flushed: output channels whose weights were negligible beside their bias, and became zero.
        zero: input channels of a layer that were constantly zero, and whose weights became zero.
        absorbed: input channels whose constant moved into the bias.
        unread: output channels that nothing reads, and whose weights and bias became zero.
        kept: output channels that are another constant, read through padding.
    """

    flushed: int = 0
    zero: int = 0
    absorbed: int = 0
    unread: int = 0
    kept: int = 0


def resolve_dead_channels(graph: Graph, regions: list[Region]) -> tuple[Graph, DeadChannels]:
    """The same function without weights that multiply constants, within `regions`."""
    nodes, dead, before = dict(graph.nodes), DeadChannels(), None
    single = [r for r in regions if len(r.sources) == 1]
    while dead != before:
        before = dead
        for region in single:
            dead = _flush(nodes, region.name, dead)
            dead = _resolve_constants(nodes, region, dead)
        for region in reversed(single):
            dead = _resolve_unread(nodes, region, dead)
    kept = sum(int(((output_ranges(magnitudes(nodes[r.name])) == 0) & _read(nodes, r)).sum()) for r in single)
    return graph.rebuild(nodes.values()), replace(dead, kept=kept)


def _flush(nodes: dict[str, Node], name: str, dead: DeadChannels) -> DeadChannels:
    """Make negligible weights zero, and the statistics of a constant its own."""
    node, ranges = nodes[name], output_ranges(magnitudes(nodes[name]))
    bias = _bias(node)
    sums = ranges * sum(w.size for w in node.weights.values()) / len(bias)  # an upper bound
    gone = (sums <= NEGLIGIBLE * np.abs(bias)) & ((ranges > 0) | (node.stats.get("std", ranges) > 0))
    if gone.any():
        nodes[name] = scale_output(node, Scaling(np.where(gone, 0.0, 1.0), np.where(gone, bias, 0.0), {}))
    return replace(dead, flushed=dead.flushed + int((gone & (ranges > 0)).sum()))


def _resolve_constants(nodes: dict[str, Node], region: Region, dead: DeadChannels) -> DeadChannels:
    """Zero the weights that read constants of a region, after moving them into the bias."""
    source = nodes[region.name]
    constant = output_ranges(magnitudes(source)) == 0
    if not constant.any():
        return dead
    values = _constants(nodes, region, np.where(constant, constant_outputs(source), np.nan))
    for name, index in region.sinks.items():
        sink = nodes[name]
        tensor = nodes[sink.inputs[0]]
        value = values[tensor.name][index]
        read = input_ranges(magnitudes(sink)) > 0
        gone = read & (value == 0)
        known = read & np.isfinite(value) & (value != 0)
        offset = Scaling(np.ones_like(value), np.where(known, value, 0.0), {})
        if known.any() and sees_offset(sink, tensor.shape, offset):
            gone |= known
        if gone.any():
            left = Scaling(np.where(gone, 0.0, 1.0), np.where(gone, value, 0.0), {})
            nodes[name] = scale_input(sink, left)
            absorbed = int((gone & known).sum())
            dead = replace(dead, zero=dead.zero + int(gone.sum()) - absorbed, absorbed=dead.absorbed + absorbed)
    return dead


def _resolve_unread(nodes: dict[str, Node], region: Region, dead: DeadChannels) -> DeadChannels:
    """Zero the weights and biases of channels that no sink reads."""
    source = nodes[region.name]
    gone = ~_read(nodes, region) & ((output_ranges(magnitudes(source)) > 0) | (_bias(source) != 0))
    if gone.any():
        nodes[source.name] = scale_output(source, Scaling(np.where(gone, 0.0, 1.0), np.zeros(len(gone)), {}))
    return replace(dead, unread=dead.unread + int(gone.sum()))


def _read(nodes: dict[str, Node], region: Region) -> np.ndarray:
    """Which channels have a weight that reads them."""
    r2 = np.zeros(region.channels)
    for name, index in region.sinks.items():
        np.maximum.at(r2, index, input_ranges(magnitudes(nodes[name])))
    return r2 > 0


def constant_outputs(node: Node) -> np.ndarray:
    """What a linear operation puts out where its weights are zero: its bias, clipped [channels]."""
    return clip_array(node, _bias(node))


def _bias(node: Node) -> np.ndarray:
    return node.weights[bias_of(node)].astype(np.float64)


def _constants(nodes: dict[str, Node], region: Region, start: np.ndarray) -> dict[str, np.ndarray]:
    """Constants in every tensor of a region, by channel; NaN where it is none."""
    values = {region.name: start}
    for name, index in region.index.items():
        if name in values:
            continue
        node = nodes[name]
        x = values[node.inputs[0]].copy()
        x[index] = _behind(node, x[index])
        values[name] = x
    return values


def _behind(node: Node, x: np.ndarray) -> np.ndarray:
    """What a node that passes channels on makes of constants."""
    channels = op_of(node).channels
    return x if channels is None else channels.constant(node, x)
