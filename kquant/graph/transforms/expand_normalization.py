"""Normalizations written out in operations that integer kernels have.

    d = x - sum(x * scale / c) / scale          a matrix product with a constant, and a subtraction
    v = (scale d) (scale d)^T                   the sum of squares, accumulated in wide integers
    y = d r gamma + beta,  r = 1 / sqrt(v)

One grid for v holds small variances only roughly, and so does one for r. Where the variances of a tensor spread, r is
taken in two stages that meet at k, the geometric mean of the extremes,

    r = rsqrt(min(v, k)) rsqrt(max(v, k)) sqrt(k)

each of which has a grid of its own: saturation takes the minimum, and MAXIMUM takes the maximum. The bound below the
smallest variance seen guards against zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from kquant.graph.ir import Graph, Node, Shape

GROUPS = 4.0  # where the largest channel is so many times the median, the large ones are squared apart
STAGES = 4.0  # sums of squares that differ by this factor get two stages
NEGLIGIBLE = 1e-3  # an epsilon that is smaller than this part of every sum of squares is left out
Spreads = Mapping[str, tuple[float, float]]  # normalization -> the smallest and largest sum of squares above epsilon


def expand_normalization(graph: Graph, spreads: Spreads = MappingProxyType({})) -> Graph:
    """The same function without "normalize" operations.

    Args:
        graph: any float graph.
        spreads: what the sums of squares are; where nothing is known, one stage takes all of them.
    """
    nodes: list[Node] = []
    for node in graph:
        if node.op == "normalize":
            nodes += _Writer(node, graph[node.inputs[0]]).write(spreads.get(node.name))
        else:
            nodes.append(node)
    return graph if len(nodes) == len(graph.nodes) else graph.rebuild(nodes)


class _Writer:
    """Writes one normalization."""

    def __init__(self, node: Node, source: Node) -> None:
        self.node, self.source = node, source
        self.channels = int(node.shape[-1] or 0)
        self.epsilon, self.scale = float(node.attrs["epsilon"]), node.weights["scale"].astype(np.float64)
        self.nodes: list[Node] = []

    def write(self, spread: tuple[float, float] | None) -> list[Node]:
        """Its nodes, the last of which has its name."""
        d = self._deviation()
        rows, one = (*d.shape[:-1], 1, self.channels), (*d.shape[:-1], 1)
        operands = self._operands(d, rows)
        low, high = spread or (0.0, 0.0)
        floor = low / 2
        adds = not self.node.attrs["limit"] and self.epsilon > NEGLIGIBLE * floor
        offset = self.epsilon if adds else 0.0
        floor = floor if adds else max(floor, self.epsilon)

        def root(suffix: str, lo: float, hi: float | None) -> Node:
            parts = len(operands) > 1
            clip, square = (None if parts else lo, hi), (*rows[:-2], 1, 1)
            squares = [
                self._emit(f"squares{suffix}{k}", "batch_matmul", (o, o), square, adjoint=True, clip=clip)
                for k, o in zip(("", "_rest"), operands, strict=False)
            ]
            v = squares[0]
            if parts:
                v = self._emit(f"sum{suffix}", "add", tuple(squares), v.shape, clip=(lo, hi))
            v = self._emit(f"variance{suffix}", "reshape", (v,), one)
            if adds:
                v = self._emit(f"epsilon{suffix}", "add", (v, self._const(f"offset{suffix}", [offset])), one)
            return self._emit(f"root{suffix}", "rsqrt", (v,), one)

        if spread is None or high <= STAGES * floor:
            return self._finish(d, root("", floor, None), 1.0)
        k = float(np.sqrt(floor * high))
        below, above = root("_low", floor, k), root("_high", k, None)
        return self._finish(d, self._emit("roots", "mul", (below, above), one), float(np.sqrt(k + offset)))

    def _operands(self, d: Node, rows: Shape) -> list[Node]:
        """Rows whose products with themselves add up to the sum of squares: of all channels, or of large and others."""
        parts = [self.scale]
        large = self.scale > np.sqrt(self.scale.max() * np.median(self.scale))
        if self.scale.max() > GROUPS * np.median(self.scale):
            parts = [np.where(large, self.scale, 0), np.where(large, 0, self.scale)]
        factors = []
        for suffix, scale in zip(("", "_rest"), parts, strict=False):
            scaled = d
            if not self._even():
                scaled = self._emit(f"scaled{suffix}", "mul", (d, self._const(f"scale{suffix}", scale)), d.shape)
            row = self._emit(f"row{suffix}", "reshape", (scaled,), rows)
            factors.append(row)
        return factors

    def _even(self) -> bool:
        return bool(np.all(self.scale == 1))

    def _deviation(self) -> Node:
        """x less its mean, both divided by `scale`."""
        x = self.source
        if len(x.shape) == 2:
            x = self._emit("rows", "reshape", (x,), (None, 1, self.channels))
        if not self.node.attrs["center"]:
            return x
        average = self._const("average", (self.scale / self.channels)[:, None])
        mean = self._emit("mean", "batch_matmul", (x, average), (*x.shape[:-1], 1))
        if not self._even():
            mean = self._emit("means", "mul", (mean, self._const("inverse", 1 / self.scale)), x.shape)
        return self._emit("deviation", "sub", (x, mean), x.shape)

    def _finish(self, d: Node, root: Node, factor: float) -> list[Node]:
        """d * root * gamma + beta in the shape of the input."""
        node, gamma = self.node, self.node.weights["gamma"] * self.scale * factor
        if np.ptp(gamma) == 0 and not node.weights["beta"].any():
            if gamma[0] != 1:
                root = self._emit("factor", "mul", (root, self._const("gamma", gamma[:1])), root.shape)
            self._emit("product", "mul", (d, root), d.shape)
        else:
            product = self._emit("product", "mul", (d, root), d.shape)
            weights = {"scale": gamma.astype(np.float32), "offset": node.weights["beta"]}
            self._emit("affine", "affine", (product,), d.shape, weights=weights)
        if d.shape != node.shape:
            self._emit("flat", "reshape", (self.nodes[-1],), node.shape)
        last = self.nodes[-1].with_(name=node.name, stats=node.stats)
        return [*self.nodes[:-1], last]

    def _const(self, suffix: str, value: Any) -> Node:
        """A constant, by a name that no weight of the operation itself has ("<name>/scale")."""
        value = np.asarray(value, np.float32)
        return self._emit(f"constant_{suffix}", "const", (), value.shape, weights={"value": value})

    def _emit(
        self,
        suffix: str,
        op: str,
        inputs: tuple[Node, ...],
        shape: Shape,
        weights: Mapping[str, np.ndarray] = MappingProxyType({}),
        **attrs: Any,
    ) -> Node:
        made = Node(
            name=f"{self.node.name}/{suffix}",
            op=op,
            inputs=tuple(i.name for i in inputs),
            shape=tuple(shape),
            batch=self.node.batch if inputs else 1,
            attrs=attrs,
            weights=weights,
            origin=self.node.origin,
            origin_type=self.node.origin_type,
        )
        self.nodes.append(made)
        return made
