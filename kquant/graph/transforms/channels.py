"""Per-channel vectors and the operations through which `x * scale + offset` commutes.

f(x * s + o) = f(x) * s' + o' holds exactly for operations that only move elements (reshape,
transpose, slice), that average with weights of sum one (mean, average pooling without the padding,
resize), and, for s > 0, for the maximum. s' is s in the channel order of the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kquant.graph.ir import Node, Shape


@dataclass(frozen=True, eq=False)
class Scaling:
    """y = x * scale + offset on the last axis, with the statistics of y if they are known.

    Attributes:
        scale: float64 [channels].
        offset: float64 [channels].
        stats: see `Node.stats`; empty where unknown.
    """

    scale: np.ndarray
    offset: np.ndarray
    stats: dict[str, np.ndarray]

    @classmethod
    def of(cls, node: Node) -> Scaling:
        """What an "affine" node does."""
        return cls(
            node.weights["scale"].astype(np.float64), node.weights["offset"].astype(np.float64), dict(node.stats)
        )

    def select(self, index: slice | np.ndarray) -> Scaling:
        """The channels at `index` (a slice or an index array)."""
        return Scaling(
            self.scale[index],
            self.offset[index],
            {k: v[index] for k, v in self.stats.items()},
        )

    def tile(self, channels: int | None) -> Scaling | None:
        """Repeated to `channels`, or None if that is not a multiple."""
        if not channels or channels % len(self.scale):
            return None
        return self.select(np.arange(channels) % len(self.scale))

    def without_stats(self) -> Scaling:
        return Scaling(self.scale, self.offset, {})


def _keeps_last_axis(node: Node, source: Shape) -> bool:
    last = len(source) - 1
    if node.op == "transpose":
        return bool(node.attrs["perm"][-1] == last)
    if node.op in ("mean", "reduce_max"):
        return last not in node.attrs["axes"]
    return True


def behind(node: Node, source: Shape, s: Scaling) -> Scaling | None:
    """The scaling behind `node` that equals `s` in front of it; None if they do not commute.

    Args:
        node: reads the scaled tensor.
        source: shape of that tensor.
        s: along the last axis of `source`.
    """
    if not _commutes(node, source, s):
        return None
    if node.op == "reshape":
        return s.tile(node.shape[-1])
    if node.op == "slice":
        a = node.attrs
        return s.select(slice(a["begin"][-1], a["end"][-1], a["strides"][-1]))
    return s


def in_front(node: Node, source: Shape, s: Scaling) -> Scaling | None:
    """The scaling in front of `node` that equals `s` behind it; None if there is none.

    Statistics survive where the operation only moves elements.
    """
    if not _commutes(node, source, s) or (node.op == "slice" and source[-1] != node.shape[-1]):
        return None
    if node.op == "reshape":
        return s.tile(source[-1])
    return s if node.op == "transpose" else s.without_stats()


def _commutes(node: Node, source: Shape, s: Scaling) -> bool:
    if node.op in ("reshape", "slice"):
        return True
    if node.op in ("transpose", "mean"):
        return _keeps_last_axis(node, source)
    if node.op in ("max_pool2d", "reduce_max"):
        return _keeps_last_axis(node, source) and bool((s.scale > 0).all())
    return node.op in ("avg_pool2d", "resize")
