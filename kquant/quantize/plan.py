"""Graph + config + target -> for every tensor a spec, a shared grid, or a reason to stay float.

The plan makes the graph a legal program of the target: it decides which nodes run in integers,
inserts a "requantize" node wherever a tensor must change its grid (float to integer, int8 to int16,
an input of a concatenation that is also read elsewhere), and unites the tensors that the target's
kernels force onto one grid.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from kquant.config.quant_config import QuantConfig
from kquant.config.specs import LayerSpec, QuantSpec
from kquant.errors import ConfigError
from kquant.graph.ir import Graph, Node
from kquant.graph.ops import op_of
from kquant.graph.transforms.bound_masks import unbounded_masks
from kquant.grids.grid import Grid
from kquant.quantize.layer_specs import resolve
from kquant.quantize.record import Skip
from kquant.targets.target import Target, get_target

_PASSES = ("reshape", "train_only")  # a final softmax, and its logits, are looked for through them


@dataclass(frozen=True, eq=False)
class Plan:
    """What is quantized and how.

    Attributes:
        graph: the float graph, with "requantize" nodes inserted.
        weights: node -> spec of its weights, for nodes with quantized weights.
        activations: node -> spec of its output grid, for nodes that run in integers.
        groups: node -> the member that stands for all tensors on the same grid (itself, if alone).
        fixed: member that stands for a group -> the grid that the target dictates.
        sources: member -> the tensors whose ranges, fixed or observed, set the grid of its group.
        skipped: the nodes that stay float.
        target: the hardware.
    """

    graph: Graph
    weights: dict[str, QuantSpec]
    activations: dict[str, QuantSpec]
    groups: dict[str, str]
    fixed: dict[str, Grid]
    sources: dict[str, tuple[str, ...]]
    skipped: tuple[Skip, ...]
    target: Target

    @property
    def shared(self) -> dict[str, str]:
        """Node -> the first tensor on its grid, where that is another and the target does not dictate the grid."""
        return {n: first for n, first in self.groups.items() if n != first and first not in self.fixed}

    @property
    def dictated(self) -> tuple[str, ...]:
        """The nodes whose grid the target dictates."""
        return tuple(n for n, first in self.groups.items() if first in self.fixed)

    def block_scales(self, name: str) -> bool:
        """Whether the kernel of a node reads scales of blocks of its weight: one that runs in float."""
        spec = self.weights[name]
        in_float = name not in self.activations
        return spec.block is not None and in_float and self.target.takes_blocks(self.graph[name].op, spec.bits)

    @property
    def observed(self) -> dict[str, tuple[str, ...]]:
        """The `sources` without a fixed range: the tensors that have to be looked at."""
        unknown = {k: tuple(n for n in names if self.activations[n].range is None) for k, names in self.sources.items()}
        return {k: names for k, names in unknown.items() if names}


def make_plan(graph: Graph, config: QuantConfig) -> Plan:
    """Decide for every tensor of `graph`.

    Raises:
        ConfigError: the config is impossible for its target, or a rule matches no layer.
    """
    target = get_target(config.target)
    target.check(config)
    specs = resolve(graph, config)
    reasons = _float_reasons(graph, specs, target)
    graph, specs = _insert_requantize(graph, specs, reasons, target)
    integer = {n.name for n in graph if n.name not in reasons and n.dtype == "float32"}
    groups = share_grids(graph, integer, target)
    activations = {name: _activation_spec(graph[name], specs[name]) for name in integer}
    fixed: dict[str, Grid] = {}
    members: dict[str, list[str]] = {}
    for name in graph.nodes:
        if name not in integer:
            continue
        node, leader = graph[name], groups[name]
        bits = target.container_bits(activations[name].bits)
        if (grid := target.fixed_output(node.op, bits)) is not None:
            fixed[leader] = _full_grid(grid, bits)
        if name == leader or node.op in target.inputs_share_output or _part(node):
            members.setdefault(leader, []).append(name)
    sources = {
        leader: tuple(n for n in names if graph[n].op in target.inputs_share_output or _part(graph[n])) or (leader,)
        for leader, names in members.items()
        if leader not in fixed
    }
    for name in _centered(graph, groups, activations, target):
        activations[name] = replace(activations[name], symmetric=True, signed=True)
    for name in _logits(graph) & {n for names in sources.values() for n in names}:
        activations[name] = _logits_spec(activations[name], specs[name], config)
    return Plan(
        graph=graph,
        weights=_weight_specs(graph, specs, integer, target),
        activations=activations,
        groups=groups,
        fixed=fixed,
        sources=sources,
        skipped=tuple(
            Skip(node=n, layer=graph[n].origin or n, reason=r)
            for n, r in reasons.items()
            if graph[n].op not in ("const", "train_only")
        ),
        target=target,
    )


def _float_reasons(graph: Graph, specs: dict[str, LayerSpec], target: Target) -> dict[str, str]:
    """Why nodes stay float, in topological order. Constants follow their reader."""
    reasons: dict[str, str] = {}
    masks = set(unbounded_masks(graph))
    for node in graph:
        if node.dtype != "float32" or node.op == "const":
            continue
        spec = specs[node.name]
        data = [graph[i] for i in node.inputs if graph[i].op != "const"]
        if node.op == "input" and not graph.consumers(node.name) and node.name not in graph.outputs:
            reasons[node.name] = "nothing reads it"
        elif node.op == "float":
            reasons[node.name] = f"{node.origin_type} has no integer kernel in kquant"
        elif spec.float:
            reasons[node.name] = spec.reason
        elif node.name in masks:
            reasons[node.name] = "no grid holds its mask beside the numbers, and no softmax or maximum alone reads it"
        elif spec.activations is None:
            reasons[node.name] = spec.reason or "activations are not quantized"
        elif target.float_only(node.op, target.container_bits(spec.activations.bits)):
            reasons[node.name] = f"{target.name} has no {spec.activations.bits}-bit kernel for {node.op}"
        elif op_of(node).linear and spec.weights is None and not target.float_weights:
            reasons[node.name] = spec.reason or "its weights are not quantized"
        elif node.op in target.same_scale and data[0].name in reasons:
            reasons[node.name] = f"it only moves the values of {data[0].name!r}, which stays float"
        elif not (op_of(node).lookup or op_of(node).selects) and any(d.dtype != "float32" for d in data):
            reasons[node.name] = "it reads integer ids"
    for node in graph:
        if node.op == "const" and all(c.name in reasons for c in graph.consumers(node.name)):
            reasons[node.name] = "its reader stays float"
    return reasons


def _insert_requantize(
    graph: Graph, specs: dict[str, LayerSpec], reasons: dict[str, str], target: Target
) -> tuple[Graph, dict[str, LayerSpec]]:
    """Insert "requantize" nodes so that every integer node reads what its kernel takes."""
    specs, nodes, names = dict(specs), [], set(graph.nodes)
    converted: dict[tuple[str, object], str] = {}  # (tensor, container or the reader that needs its own) -> node

    def container(name: str, reader: Node) -> int | None:
        if name in reasons:
            return None
        owner = reader if graph[name].op == "const" else graph[name]
        return target.container_bits(_activation_spec(graph[name], specs[owner.name]).bits)

    for node in graph:
        if node.op == "const" and node.name not in reasons:
            specs[node.name] = specs[graph.consumers(node.name)[0].name]
        if node.name in reasons or node.dtype != "float32" or not node.inputs:
            nodes.append(node)
            continue
        inputs = []
        wanted = target.container_bits(_activation_spec(node, specs[node.name]).bits)
        shares = node.op in target.inputs_share_output and not _one_part(graph, node, reasons, target)
        for source in node.inputs:
            own = shares and not _may_share(graph, source, node, reasons, target)
            if graph[source].dtype == "float32" and (own or container(source, node) != wanted):
                key = (source, node.name if own else wanted)
                if key not in converted:
                    converted[key] = _fresh(f"{source}/requantize", names)
                    specs[converted[key]] = specs[node.name]
                    nodes.append(_requantize(graph[source], converted[key], container(source, node)))
                source = converted[key]
            inputs.append(source)
        nodes.append(node.with_(inputs=tuple(inputs)))
    return graph.rebuild(nodes), specs


def _fresh(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _requantize(source: Node, name: str, input_bits: int | None) -> Node:
    """A change of grid; `input_bits` is the container it reads, None for a float tensor."""
    return Node(
        name=name,
        attrs={"input_bits": input_bits},
        op="requantize",
        inputs=(source.name,),
        shape=source.shape,
        batch=source.batch,
        origin=source.origin,
        origin_type=source.origin_type,
    )


def _may_share(graph: Graph, source: str, reader: Node, reasons: dict[str, str], target: Target) -> bool:
    """Whether `source` can take the grid of its reader's output without harming other readers."""
    while True:
        node = graph[source]
        if graph.sole_consumer(source) is not reader or source in reasons or op_of(node).lookup:
            return False
        if target.fixed_output(node.op, 8) is not None or reader.inputs.count(source) > 1:
            return False
        if node.op not in target.same_scale:
            return True
        source, reader = node.inputs[0], node


def _part(node: Node) -> str | None:
    """The part that a node plays in every step of a recurrent layer: those of one part have one grid."""
    return node.attrs.get("part_of")


def _one_part(graph: Graph, node: Node, reasons: dict[str, str], target: Target) -> bool:
    """Whether all numbers that a node reads have one grid, since they play one part."""

    def part(name: str) -> str | None:
        while graph[name].op in target.same_scale:
            name = graph[name].inputs[0]
        return None if name in reasons else _part(graph[name])

    found = {part(name) for name in node.inputs if graph[name].dtype == "float32"}
    return len(found) == 1 and None not in found


def share_grids(graph: Graph, integer: set[str], target: Target) -> dict[str, str]:
    """Unite tensors that must have one grid: node -> the first member of its group."""
    groups = {n.name: n.name for n in graph if n.name in integer}

    def unite(a: str, b: str) -> None:
        a, b = groups[a], groups[b]
        first = next(n for n in graph.nodes if n in (a, b))
        for name, leader in groups.items():
            if leader in (a, b):
                groups[name] = first

    parts: dict[str, str] = {}
    for node in graph:
        if node.name in integer and (node.op in target.same_scale or node.op in target.inputs_share_output):
            for source in node.inputs:
                if source in groups:  # ids and truth values are not
                    unite(source, node.name)
        if node.name in integer and (part := _part(node)):
            unite(parts.setdefault(part, node.name), node.name)
    return groups


def _activation_spec(node: Node, spec: LayerSpec) -> QuantSpec:
    """The spec of the node's output; constants are stored with at least 8 bits, embedding tables with at most 8."""
    if spec.activations is None:
        raise ConfigError(f"{node.name!r} runs in integers but its activations have no spec")
    if node.op == "const" and spec.activations.bits < 8:
        return replace(spec.activations, bits=8)
    if op_of(node).lookup and spec.activations.bits > 8:
        return replace(spec.activations, bits=8)
    return spec.activations


def _logits(graph: Graph) -> set[str]:
    """The tensors that only a final softmax reads, directly or through reshapes that keep the classes' axis."""
    found = set()
    for node in graph:
        if node.op != "softmax" or not is_final(graph, node):
            continue
        name = node.inputs[0]
        while graph[name].op in _PASSES and graph[graph[name].inputs[0]].shape[-1] == node.shape[-1]:
            name = graph[name].inputs[0]
        reader = graph.sole_consumer(name)
        while reader is not None and reader is not node:
            reader = graph.sole_consumer(reader.name)
        if reader is node:
            found.add(name)
    return found


def is_final(graph: Graph, node: Node) -> bool:
    """Whether `node` is a model output, directly or through reshapes."""
    if node.name in graph.outputs:
        return True
    return any(reader.op in _PASSES and is_final(graph, reader) for reader in graph.consumers(node.name))


def _logits_spec(spec: QuantSpec, layer: LayerSpec, config: QuantConfig) -> QuantSpec:
    """`spec` with the config's method for logits, unless a rule chose one, or the model is quantized without data."""
    chosen = any({"method", "range"} & set(config.rules[i].activations or ()) for i in layer.matched)
    if config.logits is None or chosen or spec.method == "batch_norm":
        return spec
    return replace(spec, method=config.logits)


def _full_grid(grid: tuple[float, int], bits: int) -> Grid:
    scale, zero_point = grid
    half = 2 ** (bits - 1)
    return Grid(np.asarray(scale, np.float32), np.asarray(zero_point, np.int32), -half, half - 1)


def _centered(graph: Graph, groups: dict[str, str], integer: Iterable[str], target: Target) -> set[str]:
    """The tensors that set the grid of an input which a kernel wants with zero point 0."""
    found = set()
    for node in graph:
        if node.name in integer and node.op in target.kernels:
            found |= {groups[node.inputs[k]] for k in target.kernels[node.op].centered}
    return {n for n in integer if groups[n] in found}


def _weight_specs(graph: Graph, specs: dict[str, LayerSpec], integer: set[str], target: Target) -> dict[str, QuantSpec]:
    """Specs of the weights. Batch-norm scales and PReLU slopes are few, and keep 8 bits.

    A table that is read in integers is not among them: it has the grid of the output.
    """
    chosen = {}
    for node in graph:
        spec, record = specs[node.name].weights, op_of(node)
        if record.weight is None or spec is None or (record.lookup and node.name in integer):
            continue
        stored = record.matrix or record.lookup
        if node.name not in integer and (not stored or specs[node.name].float):
            continue
        if not record.matrix:
            own = spec.per_channel and record.weight.channels is not None
            bits = spec.bits if record.lookup else 8
            blocks = record.lookup and target.takes_blocks(node.op, bits)
            spec = replace(spec, bits=bits, per_channel=own, format="uniform", block=spec.block if blocks else None)
        chosen[node.name] = spec
    return chosen
