"""What an operation means: one record for each, made in the file of its family and read by every pass."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kquant.graph.ir import Node, Shape
from kquant.graph.moments import Moments
from kquant.graph.ops.blocks import Linear
from kquant.graph.ops.functions import Program
from kquant.graph.scaling import Channels, Scaling

Tensor = Any
Compute = Callable[[Node, Sequence[Tensor], Mapping[str, Tensor]], Tensor]
MomentRule = Callable[[Node, Sequence[Node], Sequence[Moments]], Moments]


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
        channels: the axis of its output channels in its `view`, or of the rows of a table; None for one scale for all.
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
        values: name of the weight whose entries are the values of its output, if there is one.
        parameters: names of its other weights.
        selects: inputs that are no numbers (ids, truth values) choose among the values of the others, or among its own.
        given: its values are given: by the user, or by a weight; no data is needed to know their range.
        linear: the layout of its weight, where it is linear in one input with a weight of constants.
        grid: how the output's grid is tied.
        fuses_clip: a clip behind it may be part of it (attribute `clip`).
        elementwise: the same function of every element.
        program: f(node) -> its value, element by element, as a program of its inputs (`functions`), without a fused
            activation; None where it is none.
        products: it multiplies tensors with one another: an entry that a range cuts off changes all that it meets.
        averages: on the grid of its input, with values between the steps of it.
        apart: the operation that computes the same on a grid of its own; empty where there is none.
        inserts: name of the attribute with the value that it puts, on the grid of its input, beside those of the input.
        largest: each of its outputs is the largest of several inputs.
        channels: how it passes channels on; None where it does not keep them apart.
        moments: f(node, the nodes that it reads, the moments of their outputs as far as they are known) -> the moments
            of its output, without a fused activation; None where there is no rule.
        unchanged: f(node, shape of the input) -> whether it returns its input as it is.
        merge: f(first, node) -> one node that does what `node` behind `first`, both of this operation, does.
        simpler: f(node, shape of the input) -> a simpler node that computes the same; None if there is none.
        reframed: f(node, s) -> the node where what was x, its input and output, is x * s.scale + s.offset now.
    """

    name: str
    compute: Compute
    weight: Weight | None = None
    bias: str | None = None
    values: str | None = None
    parameters: tuple[str, ...] = ()
    selects: bool = False
    given: bool = False
    linear: Linear | None = None
    grid: Tie = Tie.OWN
    fuses_clip: bool = False
    elementwise: bool = False
    program: Callable[[Node], Program | None] = lambda node: None
    products: bool = False
    averages: bool = False
    apart: str = ""
    inserts: str | None = None
    largest: bool = False
    channels: Channels | None = None
    moments: MomentRule | None = None
    unchanged: Callable[[Node, Shape], bool] = lambda node, source: False
    merge: Callable[[Node, Node], Node] | None = None
    simpler: Callable[[Node, Shape], Node | None] = lambda node, source: None
    reframed: Callable[[Node, Scaling], Node] = lambda node, s: node

    @property
    def lookup(self) -> bool:
        """Whether integer ids choose its output from a table, whose grid is that of the output."""
        return self.weight is not None and self.weight.name == self.values

    @property
    def matrix(self) -> bool:
        """Whether it is a matrix product with patches of its input: several weights add up to an output."""
        return self.linear is not None and self.weight is not None and bool(self.weight.fan_in)


def same_moments(node: Node, sources: Sequence[Node], xs: Sequence[Moments]) -> Moments:
    """`Op.moments` of what changes no moments of its input."""
    return xs[0]


def collect(*records: Op) -> dict[str, Op]:
    """The records of a family by name."""
    return {record.name: record for record in records}
