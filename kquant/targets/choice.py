"""Which kernel computes a layer with weights of few bits, where the target has several for it.

Packed weights take fewer bytes, and some kernels more time for them: a record says how much more was measured
(`Kernel.slowdown`). What is written by a variant of its operation's kernel carries the variant's name in its attribute
`kernel`; simulation, file and verifier read it there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kquant.graph.ir import Node
from kquant.graph.ops import op_of
from kquant.graph.quantized import QuantizedGraph
from kquant.targets.target import Target

FREE = 1.15  # times the time: no reason for more bytes


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A kernel for a layer.

    Attributes:
        kernel: name of the variant, "" for the operation's own kernel.
        container: bits of the integers that store its weights.
        slowdown: its time, relative to that of int8 weights.
    """

    kernel: str = ""
    container: int = 8
    slowdown: float = 1.0


def choices(target: Target, node: Node, bits: int, activations: int) -> tuple[Choice, ...]:
    """The kernels that compute a node with `bits`-bit weights and activations in that container; its own first."""
    own = target.kernels[node.op]
    found = []
    for name, kernel in (("", own), *own.variants.items()):
        if activations in kernel.arithmetic and kernel.takes(node):
            container = kernel.container(bits, activations) if target.packed_weights else 8
            slowdown = kernel.slowdown.get(container, 1.0) if activations == 8 else 1.0
            found.append(Choice(kernel=name, container=container, slowdown=slowdown))
    return tuple(found)


def smallest(found: tuple[Choice, ...]) -> Choice:
    """The kernel with the fewest bytes, the fastest of those."""
    return min(found, key=lambda c: (c.container, c.slowdown))


def fastest(found: tuple[Choice, ...]) -> Choice:
    """The smallest of the kernels that take hardly longer (`FREE`) than the fastest."""
    least = min(c.slowdown for c in found)
    return smallest(tuple(c for c in found if c.slowdown <= FREE * least))


def chosen(target: Target, node: Node, bits: int, activations: int) -> Choice:
    """The kernel that a node names."""
    own, name = target.kernels[node.op], node.attrs.get("kernel", "")
    found = choices(target, node, bits, activations)
    return next((c for c in found if c.kernel == name and name in own.variants), found[0])


def slow_layers(qgraph: QuantizedGraph, target: Target) -> Iterator[tuple[str, Choice, int]]:
    """The layers whose kernel takes longer than another would: node, its kernel, the bytes that the other adds."""
    for node in qgraph.graph:
        q, w = qgraph.activations.get(node.name), qgraph.weights.get(node.name)
        if q is None or w is None or not op_of(node).linear:
            continue
        now = chosen(target, node, w.width, q.container)
        other = fastest(choices(target, node, w.width, q.container))
        if now.slowdown > FREE * other.slowdown:
            size = qgraph.integers[node.name].size
            yield node.name, now, size * (other.container - now.container) // 8
