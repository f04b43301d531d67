"""Cross-layer equalization and the resolution of dead channels (white paper section 3.2).

Both rewrite the weights of linear operations without a change of function, so that a weight tensor
that has one scale wastes less of its grid. Equalization divides output channel i of a layer by s_i
and multiplies input channel i of its readers by it,

    s_i = (1 / r2_i) sqrt(r1_i r2_i)

with r the largest |w| of the channel, so that both ranges become sqrt(r1_i r2_i). A cap behind the layer (ReLU6)
becomes a cap per channel, cap / s_i. Chains of layers need sweeps.

Weights alone in view, some channels of an activation come out a hundred times larger than others, and its one scale
leaves them few bits. An activation counts as one more row of the layer that makes it: r1_i is the larger of max |w| and
the activation's reach, the latter scaled such that both have the same geometric mean, times `activations`. MobileNetV1
0.25 at W8A8 loses 2.3 points without and 0.5 points with it. Where no batch normalization tells the reach, weights
count alone: a guess from weights and biases cost MobileNetV2 more than a point at W4A8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from kquant.graph.ir import Graph, Node
from kquant.graph.ops import bias_of, clip_of, op_of, with_clip
from kquant.graph.scaling import Scaling
from kquant.graph.transforms.dead_channels import DeadChannels, constant_outputs, resolve_dead_channels
from kquant.graph.transforms.magnitudes import input_ranges, magnitudes, output_ranges, scale_magnitudes
from kquant.graph.transforms.regions import Region, find_regions
from kquant.graph.transforms.rescale import scale_input, scale_output

STEP_LIMIT = 1e4  # a sweep changes no scale by more,
TOTAL_LIMIT = 1e8  # all of them together by no more: float32 neither overflows nor loses weights
SPREAD = 3.0  # standard deviations within which a batch-normalized output lies


@dataclass(frozen=True, eq=False)
class EqualizeReport:
    """What was done.

    Attributes:
        scales: first source of a region -> its total scales s [channels].
        regions: the regions that were equalized.
        stops: linear operation -> why its output was not scaled.
        dead: what became of dead channels.
        sweeps: over all regions.
        change: the largest |log s| of the last sweep.
        converged: whether that is below the tolerance.
    """

    regions: tuple[Region, ...] = field(repr=False)
    scales: Mapping[str, np.ndarray] = field(repr=False)
    stops: Mapping[str, str] = field(repr=False)
    dead: DeadChannels
    sweeps: int
    change: float
    converged: bool


def equalize(
    graph: Graph,
    *,
    max_sweeps: int = 1000,
    tolerance: float = 1e-3,
    across_joins: bool = False,
    dead_channels: bool = True,
    activations: float = 1.0,
) -> tuple[Graph, EqualizeReport]:
    """Resolve dead channels, then equalize the ranges of all channels between linear operations.

    Args:
        graph: a float graph, batch normalization folded and activations fused.
        max_sweeps: at most so many passes over all regions; 0 resolves dead channels only.
        tolerance: stop when no log-scale changes by more in a pass.
        across_joins: also scale through residual additions, all branches alike.
        dead_channels: False leaves them alone (for comparisons; they keep the grid stretched).
        activations: how much the reach of activations counts, where batch normalization tells it; 0 equalizes weights
            alone, as the white paper does.

    Returns:
        A graph that computes the same function up to float32 rounding, with attribute `clip` = (0, [cap per
        channel]) where there was a ReLU6, and a report.
    """
    regions, stops = find_regions(graph, across_joins)
    dead = DeadChannels()
    if dead_channels:
        graph, dead = resolve_dead_channels(graph, regions)
    links = [_Link.of(graph, region, activations) for region in regions]
    blocks = {name: magnitudes(graph[name]) for link in links for name in (*link.region.sources, *link.region.sinks)}
    sweeps, change = 0, 0.0
    while sweeps < max_sweeps and (not sweeps or change >= tolerance):
        change = max((link.balance(blocks) for link in links), default=0.0)
        sweeps += 1
    scales = {link.region.name: np.exp(link.log_scale) for link in links}
    nodes = dict(graph.nodes)
    for region in regions:
        _apply(nodes, region, scales[region.name])
    report = EqualizeReport(tuple(regions), scales, stops, dead, sweeps, change, change < tolerance)
    return graph.rebuild(nodes.values()), report


@dataclass(eq=False)
class _Link:
    """A region on its way to equilibrium.

    Attributes:
        region: its tensors.
        log_scale: log of the scales so far [channels].
        reach: about the largest magnitude of the source's output in every channel, at the scales so far.
        dead: channels that are constant.
        activations: how much `reach` counts.
    """

    region: Region
    log_scale: np.ndarray
    reach: np.ndarray
    dead: np.ndarray
    activations: float

    @classmethod
    def of(cls, graph: Graph, region: Region, activations: float) -> _Link:
        reach, dead = np.zeros(region.channels), np.ones(region.channels, bool)
        known = all(graph[name].stats for name in region.sources)
        for name, index in region.sources.items():
            np.logical_and.at(dead, index, output_ranges(magnitudes(graph[name])) == 0)
            np.maximum.at(reach, index, _reach(graph[name]))
        return cls(region, np.zeros(region.channels), reach, dead, activations if known else 0.0)

    def balance(self, blocks: dict[str, np.ndarray]) -> float:
        """Equalize once; the largest |log s|."""
        r1, r2 = np.zeros(self.region.channels), np.zeros(self.region.channels)
        for name, index in self.region.sources.items():
            np.maximum.at(r1, index, output_ranges(blocks[name]))
        for name, index in self.region.sinks.items():
            np.maximum.at(r2, index, input_ranges(blocks[name]))
        step = np.zeros_like(r1)
        live = (r1 > 0) & (r2 > 0)
        if self.activations:
            r1[live] = _at_least(r1[live], self.reach[live], self.activations)
        step[live] = 0.5 * np.log(r1[live] / r2[live])
        held = self.dead & (r2 > 0) & (self.reach > 0)
        if live.any():  # a constant may grow until it is as large as other channels, which shrinks its readers
            step[held] = np.minimum(0.0, np.log(self.reach[held] / np.median(self.reach[live])))
        step = np.clip(step, -np.log(STEP_LIMIT), np.log(STEP_LIMIT))
        total = np.clip(self.log_scale + step, -np.log(TOTAL_LIMIT), np.log(TOTAL_LIMIT))
        step, self.log_scale = total - self.log_scale, total
        scale = np.exp(step)
        self.reach = self.reach / scale
        for name, index in self.region.sources.items():
            blocks[name] = scale_magnitudes(blocks[name], outputs=1 / scale[index])
        for name, index in self.region.sinks.items():
            blocks[name] = scale_magnitudes(blocks[name], inputs=scale[index])
        return float(np.abs(step).max(initial=0.0))


def _at_least(ranges: np.ndarray, reach: np.ndarray, factor: float) -> np.ndarray:
    """Ranges of weights, raised where `factor` times the activation, on a scale that makes both alike, goes further."""
    if not len(reach) or not (reach > 0).all():
        return ranges
    alike = np.exp(np.mean(np.log(ranges)) - np.mean(np.log(reach)))
    return np.maximum(ranges, factor * alike * reach)


def _reach(node: Node) -> np.ndarray:
    """About the largest |output| of every channel: known exactly for a dead one."""
    block, bias = magnitudes(node), node.weights[bias_of(node)].astype(np.float64)
    ranges = output_ranges(block)
    reach = np.abs(bias) + SPREAD * ranges
    if node.stats:
        reach = np.abs(node.stats["mean"]) + SPREAD * node.stats["std"]
    reach = np.where(ranges == 0, np.abs(constant_outputs(node)), reach)
    hi = clip_of(node)[1]
    return reach if hi is None else np.minimum(reach, np.abs(hi))


def _apply(nodes: dict[str, Node], region: Region, scale: np.ndarray) -> None:
    """Scale the weights, statistics and caps of a region in `nodes`."""
    if np.all(scale == 1):
        return
    for name, index in region.index.items():
        if name in region.sources:
            nodes[name] = scale_output(nodes[name], Scaling.factors(1 / scale[index]))
        else:
            nodes[name] = op_of(nodes[name]).reframed(nodes[name], Scaling.factors(1 / scale[index]))
        nodes[name] = _scale_cap(nodes[name], scale[index])
    for name, index in region.sinks.items():
        nodes[name] = scale_input(nodes[name], Scaling.factors(scale[index]))


def _scale_cap(node: Node, scale: np.ndarray) -> Node:
    lo, hi = clip_of(node)
    if hi is None:
        return node
    return with_clip(node, lo, (np.asarray(hi) / scale).astype(np.float32).tolist())
