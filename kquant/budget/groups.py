"""What the search chooses from: groups of layers that have one spec, and the bits that they may have on a target."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kquant.config.quant_config import QuantConfig
from kquant.config.specs import Rule
from kquant.graph.ir import Node
from kquant.graph.ops import multiplications, op_of, weight_view
from kquant.quantize.plan import Plan
from kquant.targets.choice import choices

Bits = tuple[int, ...]  # of each group, in order
UNPACKED = (2, 3, 4, 5, 6, 8)  # candidates where weights lie in int8 tensors, which a compiler encodes


@dataclass(frozen=True, kw_only=True)
class Group:
    """Nodes whose weights have the same number of bits: those of one of the user's layers.

    Attributes:
        layer: the user's layer, by which rules select it.
        nodes: names of the operations with weights.
        bits: what they may have, rising.
        size: how many weights they have.
        macs: their multiplications for one sample.
    """

    layer: str
    nodes: tuple[str, ...]
    bits: Bits
    size: int
    macs: int


def groups_of(plan: Plan) -> tuple[Group, ...]:
    """The groups of a plan whose weights are matrix products in integers.

    Where the target packs weights, a group may have the bits of the tensors that its kernels take: fewer bits in the
    same tensor save nothing. Elsewhere it may have `UNPACKED`.
    """
    by_layer: dict[str, list[Node]] = {}
    for node in plan.graph:
        if node.name in plan.weights and node.name in plan.activations and op_of(node).matrix:
            by_layer.setdefault(node.origin or node.name, []).append(node)
    return tuple(
        Group(
            layer=layer,
            nodes=tuple(n.name for n in nodes),
            bits=tuple(sorted({b for n in nodes for b in _bits(plan, n)})),
            size=sum(weight_view(n).size for n in nodes),
            macs=sum(map(multiplications, nodes)),
        )
        for layer, nodes in by_layer.items()
    )


def _bits(plan: Plan, node: Node) -> set[int]:
    low, high = plan.target.weight_bits
    if not plan.target.packed_weights:
        return {b for b in UNPACKED if low <= b <= min(8, high)}
    activations = plan.target.container_bits(plan.activations[node.name].bits)
    containers = {c.container for b in UNPACKED for c in choices(plan.target, node, b, activations)}
    return {b for b in containers if low <= b <= high} or {min(8, high)}


def config_of(base: QuantConfig, groups: Sequence[Group], bits: Bits) -> QuantConfig:
    """The base with a rule for every group, but for those that have its bits anyway."""
    rules = []
    for group, wanted in zip(groups, bits, strict=True):
        if base.rules or base.weights is None or base.weights.bits != wanted:
            rules.append(Rule(name=f"^{re.escape(group.layer)}$", weights={"bits": wanted}))
    return replace(base, rules=(*base.rules, *rules))


def uniform(groups: Sequence[Group], bits: int) -> Bits:
    """The number of bits for all groups, as far as they may have it: else the next larger, or the largest."""
    return tuple(next((b for b in g.bits if b >= bits), g.bits[-1]) for g in groups)
