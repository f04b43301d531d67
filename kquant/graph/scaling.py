"""Factors and offsets per channel, the entries of the last axis, and how an operation passes channels on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kquant.graph.ir import Node, Shape

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Scaling:
    """y = x * scale + offset on the last axis, with the statistics of y if they are known.

    Attributes:
        scale: float64 [channels].
        offset: float64 [channels].
        stats: see `Node.stats`; empty where unknown.
    """

    scale: Array
    offset: Array
    stats: dict[str, Array]

    @classmethod
    def factors(cls, scale: Array) -> Scaling:
        """y = x * scale."""
        return cls(scale, np.zeros(len(scale)), {})

    def select(self, index: slice | Array) -> Scaling:
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
        """The same with unknown statistics."""
        return Scaling(self.scale, self.offset, {})


@dataclass(frozen=True, kw_only=True)
class Channels:
    """How an operation passes the channels of its inputs on to its output.

    f(x * s + o) = f(x) * s' + o' holds exactly for operations that only move elements (reshape, transpose, slice), that
    average with weights of sum one (mean, average pooling without the padding, resize), and, for s > 0, for the
    maximum. s' is s in the channel order of the output. f(x * s) = f(x) * s for s > 0 holds for a ReLU and its
    relatives, and for sums of several inputs.

    Attributes:
        behind: f(node, shape of the input, s) -> the scaling of the output that equals `s` on the input; None if the
            two do not commute.
        in_front: f(node, shapes of the inputs, s) -> the scalings of the inputs, one for each, that equal `s` on the
            output; None if there are none.
        equivariant: element by element, f(x * s) = f(x) * s for s > 0 (the bounds of a clip aside), or f(x * s, y * s)
            = f(x, y) * s.
        carry: f(node, index) -> the input channel of every output channel where factors commute though `behind` says
            nothing, index being that of the input; None if it does not keep the channels apart.
        offset: f(node) -> whether an offset passes where a factor does.
        constant: f(node, x) -> the output where the input is constant in each channel [channels]; NaN for no constant.
    """

    behind: Callable[[Node, Shape, Scaling], Scaling | None] = lambda node, source, s: None
    in_front: Callable[[Node, Sequence[Shape], Scaling], Sequence[Scaling] | None] = lambda node, sources, s: None
    equivariant: bool = False
    carry: Callable[[Node, Array], Array | None] | None = None
    offset: Callable[[Node], bool] = lambda node: False
    constant: Callable[[Node, Array], Array] = lambda node, x: x

    def index_behind(self, node: Node, source: Shape, index: Array) -> Array | None:
        """The channel of every entry of the output's last axis behind positive factors; None if they do not commute.

        Args:
            node: of this operation.
            source: shape of the input.
            index: the channels of the input.
        """
        if self.equivariant:
            return index if node.shape[-1] == source[-1] else None
        if self.carry is not None:
            return self.carry(node, index)
        # numbers of channels travel as factors do
        moved = self.behind(node, source, Scaling.factors(index + 1.0))
        return None if moved is None else (moved.scale - 1).astype(int)
