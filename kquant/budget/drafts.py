"""Drafts: the file of a config without its integers being decided, for what does not depend on them.

A draft has every tensor, operator and grid of the real file, with weights rounded to nearest. So its bytes are those of
the real file, and so are its latency and arena. The compiler of an Ethos-U encodes the values of weights: there a draft
is close, and only the real file counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from kquant.budget.groups import Group, config_of
from kquant.budget.latency import LatencyTable, measured
from kquant.config.quant_config import QuantConfig
from kquant.errors import ConfigError
from kquant.graph.ir import Graph
from kquant.graph.ops import bias_of, op_of
from kquant.quantize.calibrate import activation_ranges, make_grids, observe, weight_grids
from kquant.quantize.data import CalibrationData
from kquant.quantize.inputs import declare_ranges
from kquant.quantize.kernels import choose_kernels
from kquant.quantize.pipeline import Log, decide, prepared
from kquant.quantize.plan import Plan, make_plan
from kquant.targets.litert.reader import read
from kquant.targets.litert.sizes import sizes
from kquant.targets.litert.writer import write_tflite
from kquant.targets.target import Target, get_target

BYTES, LATENCY, ARENA, FLASH = "max_bytes", "max_latency", "max_arena", "max_flash"
Costs = dict[str, float]


@dataclass(eq=False)
class Drafts:
    """Writes drafts, and asks what they cost.

    Args:
        graph: the float graph (`transforms.prepare_graph`).
        base: the config that choices change.
        data: calibration data.
        resources: of BYTES, LATENCY, ARENA, FLASH, those that are asked for.
        latencies: a table of another device; None measures here.
    """

    graph: Graph
    base: QuantConfig
    data: CalibrationData
    resources: tuple[str, ...]
    latencies: LatencyTable | None = None
    _statistics: dict[Any, Mapping[str, Any]] = field(default_factory=dict)

    def plan(self, config: QuantConfig) -> tuple[Plan, bool]:
        """The plan of a config behind all steps in front of it, and whether AdaRound will set the biases."""
        reasons = decide(make_plan(self.graph, config), config, self.data)
        log = Log(reasons)
        graph = prepared(self.graph, config, self.data, log, False)
        return make_plan(graph, config), not reasons["adaround"] or not reasons["correct_bias"]

    def content(self, config: QuantConfig) -> bytes:
        """The draft of a config."""
        plan, biases = self.plan(config)
        quick = {n: s if s.format != "uniform" else replace(s, method="min_max") for n, s in plan.weights.items()}
        plan = replace(plan, weights=quick)
        weights = weight_grids(plan)
        plan, _ = choose_kernels(plan, weights, config.prefer)
        key = tuple((n, s) for n, s in plan.activations.items())
        if key not in self._statistics:
            self._statistics[key] = observe(plan, self.data, False) if plan.observed else {}
        statistics = self._statistics[key]
        plan, _ = declare_ranges(plan, statistics, self.data.byte_inputs)
        if biases:
            plan = replace(plan, graph=_with_own_biases(plan.graph))
        qgraph = make_grids(plan, weights, activation_ranges(plan, statistics))
        return write_tflite(qgraph, target=plan.target)[0]

    def costs(self, content: bytes) -> Costs:
        """What a file costs, of the resources that are asked for."""
        return costs_of(content, get_target(self.base.target), self.resources, self.latencies)


def costs_of(content: bytes, target: Target, resources: Sequence[str], latencies: LatencyTable | None = None) -> Costs:
    """Bytes of the file, seconds on LiteRT, and bytes of arena (or SRAM) and flash on the target's device.

    Raises:
        ConfigError: a resource that the target cannot tell.
    """
    found: Costs = {BYTES: float(len(content))}
    if LATENCY in resources:
        if latencies is None and (target.runtime is None or not target.runtime.timed):
            raise ConfigError(f"{target.name} has no latency here; use max_latency with target='litert'.")
        table = measured([content]) if latencies is None else latencies
        found[LATENCY] = table.total(content)
    if ARENA in resources or FLASH in resources:
        runtime = target.runtime
        if runtime is None or runtime.measure is None:
            raise ConfigError(f"{target.name} tells neither arena nor flash; use target='tflm' or 'ethos_u'.")
        footprint = runtime.measure(content)[0]
        found |= {ARENA: float(footprint.memory), FLASH: float(footprint.flash)}
    return found


def _with_own_biases(graph: Graph) -> Graph:
    """Biases that differ from each other, as those do that follow from data: equal ones would share their bytes."""
    rng = np.random.default_rng(0)
    nodes = []
    for node in graph:
        if op_of(node).matrix:
            bias = node.weights[bias_of(node)]
            reach = float(np.abs(bias).max(initial=0.0)) or 1e-2
            node = node.with_weights(**{bias_of(node): (bias + reach * rng.normal(0, 0.3, bias.shape)).astype("f4")})
        nodes.append(node)
    return graph.rebuild(nodes)


def cost_tables(drafts: Drafts, groups: Sequence[Group]) -> tuple[dict[str, list[np.ndarray]], Costs]:
    """What each group costs with each of its bits, and what the rest of the file costs.

    One draft for every number of bits, all groups alike. Bytes and latency are the operators' own. Flash, and the SRAM
    of a compiler that encodes weights, is shared among the groups by how many weights they have. An arena into which
    kernels unpack weights has one draft for every group and number of bits: what that adds.

    Returns:
        Resource -> for each group an array like `Group.bits`; and resource -> the rest.
    """
    widths = sorted({b for g in groups for b in g.bits})
    uniform = {b: tuple(b if b in g.bits else g.bits[-1] for g in groups) for b in widths}
    contents = {b: drafts.content(config_of(drafts.base, groups, bits)) for b, bits in uniform.items()}
    totals = {b: drafts.costs(c) for b, c in contents.items()}
    tables: dict[str, list[np.ndarray]] = {}
    for resource in totals[widths[0]]:
        shares = {b: _shares(drafts, groups, contents[b], resource) for b in widths}
        if resource == ARENA and get_target(drafts.base.target).packed_weights:
            tables[resource] = _added(drafts, groups, totals[widths[-1]][ARENA])
        else:
            parts = {b: shares[b] or _by_size(groups, totals[b][resource]) for b in widths}
            tables[resource] = [np.array([parts[b][k] for b in g.bits]) for k, g in enumerate(groups)]
    top = widths[-1]
    largest = {r: sum(float(t[-1]) for t in tables[r]) for r in tables}
    return tables, {r: totals[top][r] - largest[r] for r in tables}


def _shares(drafts: Drafts, groups: Sequence[Group], content: bytes, resource: str) -> list[float] | None:
    """What the operators of each group take of a resource; None where that is not known."""
    if resource not in (BYTES, LATENCY):
        return None
    program = read(content)
    owner = {f"{n}": k for k, g in enumerate(groups) for n in g.nodes}
    found = [0.0] * len(groups)
    table = (drafts.latencies or measured([content])) if resource == LATENCY else None
    for op, size in zip(program.operators, sizes(program), strict=True):
        name = op.outputs[0].name if op.outputs else ""
        k = owner.get(name, owner.get(name.rsplit("/", 1)[0]))
        if k is not None:
            found[k] += float(size.constants + size.parameters) if table is None else float(table.of(op) or 0.0)
    return found


def _by_size(groups: Sequence[Group], total: float) -> list[float]:
    """A total, shared by how many weights the groups have."""
    return [g.size / sum(h.size for h in groups) * total for g in groups]


def _added(drafts: Drafts, groups: Sequence[Group], largest: float) -> list[np.ndarray]:
    """What each group adds to the arena at each of its bits, all others having the most."""
    most = tuple(g.bits[-1] for g in groups)
    found = []
    for k, group in enumerate(groups):
        added = []
        for b in group.bits[:-1]:
            alone = config_of(drafts.base, groups, (*most[:k], b, *most[k + 1 :]))
            added.append(max(0.0, drafts.costs(drafts.content(alone))[ARENA] - largest))
        found.append(np.array([*added, 0.0]))
    return found


def fits(costs: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    """Whether no budget is exceeded."""
    return all(costs[r] <= limit for r, limit in limits.items())
