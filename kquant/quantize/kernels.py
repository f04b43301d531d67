"""The step that chooses a kernel for every layer, by the bytes and the time that the config prefers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from kquant.graph.ir import Node
from kquant.graph.ops import multiplications, op_of, weight_view
from kquant.grids.grid import Grid
from kquant.quantize.plan import Plan
from kquant.targets.choice import Choice, choices, fastest, smallest

GROWTH = 0.05  # of the bytes of all weights: what a config that prefers neither pays for speed


@dataclass(frozen=True, kw_only=True)
class _Options:
    """The smallest and the fastest kernel of a layer, and what the latter costs and saves."""

    node: Node
    small: Choice
    fast: Choice
    size: int

    @property
    def bytes(self) -> float:
        """Bytes that the fastest adds."""
        return self.size * (self.fast.container - self.small.container) / 8

    @property
    def time(self) -> float:
        """Time that it saves, in multiplications of the kernels of int8."""
        return multiplications(self.node) * (self.small.slowdown - self.fast.slowdown)


def choose_kernels(plan: Plan, weights: Mapping[str, Grid], prefer: str | None) -> tuple[Plan, str]:
    """Mark the layers that a variant of their operation's kernel computes.

    "bytes" takes the smallest storage, and of equal ones the fastest kernel; "latency" the fastest kernel, and of those
    that take hardly longer the smallest. None takes the smallest storage but where most time is saved for an added
    byte, as long as all that is added stays within `GROWTH` of the bytes of the weights.

    Args:
        plan: what is quantized.
        weights: node -> the grid of its weights.
        prefer: see `QuantConfig`.

    Returns:
        The plan, and a note; "" where there is nothing to choose.
    """
    found = []
    for node in plan.graph:
        if node.name in weights and node.name in plan.activations and op_of(node).linear:
            activations = plan.target.container_bits(plan.activations[node.name].bits)
            options = choices(plan.target, node, weights[node.name].width, activations)
            if options:
                found.append(
                    _Options(node=node, small=smallest(options), fast=fastest(options), size=weight_view(node).size)
                )
    fast = _fast(found, prefer)
    taken = {o.node.name: o.fast if o.node.name in fast else o.small for o in found}
    named = {name: c.kernel for name, c in taken.items() if c.kernel}
    if not named and not any(c.slowdown > 1 for c in taken.values()):
        return plan, ""
    nodes = [n.with_attrs(kernel=named[n.name]) if n.name in named else n for n in plan.graph]
    return replace(plan, graph=plan.graph.rebuild(nodes)), _note(found, taken, prefer)


def _fast(found: list[_Options], prefer: str | None) -> set[str]:
    """The layers that take the fastest kernel."""
    if prefer is not None:
        return {o.node.name for o in found if prefer == "latency"}
    left = GROWTH * sum(o.size * o.small.container / 8 for o in found)
    names = set()
    for option in sorted(found, key=lambda o: o.bytes / max(o.time, 1e-9)):
        if option.time > 0 and option.bytes <= left:
            left -= option.bytes
            names.add(option.node.name)
    return names


def _note(found: list[_Options], taken: Mapping[str, Choice], prefer: str | None) -> str:
    """What was chosen, and what the other choice would cost."""
    counts = Counter(c.kernel for c in taken.values() if c.kernel)
    parts = [f"{k} layers as {name.replace('_', ' ')}" for name, k in sorted(counts.items())]
    added = sum(o.bytes for o in found if taken[o.node.name] == o.fast != o.small)
    if added:
        parts.append(f"{added:,.0f} bytes more than the smallest, for speed")
    slow = [o for o in found if taken[o.node.name] != o.fast]
    if slow:
        times = max(o.small.slowdown for o in slow)
        parts.append(
            f"{len(slow)} layers take up to {times:.1f} times as long as with int8 weights; "
            f'prefer="latency" stores them in {sum(o.bytes for o in slow):,.0f} bytes more'
        )
    return "; ".join(parts)
