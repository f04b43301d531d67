"""What an operation means: one record for each, made in the file of its family and read by every pass."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kquant.graph.ir import Node

Tensor = Any
Compute = Callable[[Node, Sequence[Tensor], Mapping[str, Tensor]], Tensor]


class Tie(enum.Enum):
    """How the grid of an operation's output depends on those of its inputs."""

    OWN = enum.auto()  # computed anew, on a grid of its own
    OF_INPUT = enum.auto()  # values are moved or selected: the grid of the input
    SHARED = enum.auto()  # inputs and output are on one grid


@dataclass(frozen=True, kw_only=True)
class Weight:
    """The weight of an operation that carries a grid.

    Attributes:
        name: key of `Node.weights`.
        channels: the axis of its output channels in its `view`; None for one scale for all.
        view: the weight with its output channels on one axis, which is what `QuantizedGraph.weights` describes.
        fan_in: the axes of the weight itself over which an output channel adds up.
    """

    name: str = "kernel"
    channels: int | None = None
    view: Callable[[Any], Any] = lambda w: w
    fan_in: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Op:
    """The meaning of an operation.

    Attributes:
        name: key of `OPS` and `Node.op`.
        compute: f(node, input tensors, weights) -> output, in real numbers, without a fused activation.
        weight: the weight that carries a grid, if there is one.
        bias: name of the weight that is added to the accumulator, if there is one.
        grid: how the output's grid is tied.
        fuses_clip: a clip behind it may be part of it (attribute `clip`).
    """

    name: str
    compute: Compute
    weight: Weight | None = None
    bias: str | None = None
    grid: Tie = Tie.OWN
    fuses_clip: bool = False
