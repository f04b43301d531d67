"""What the arithmetic of a kernel sees in the simulation: integer tensors, and the call of an operation on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kquant.graph.ir import Node

Tensor = Any


@dataclass(frozen=True)
class Operand:
    """`centered` = q - zero_point, integer-valued float32; the real value is scale * centered.

    `bits` are those of the integer type that stores it.
    """

    centered: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int = 8

    @property
    def value(self) -> Tensor:
        """The real values."""
        return self.centered * self.scale


@dataclass(frozen=True, kw_only=True)
class Call:
    """An operation on integer tensors, without its fused activation.

    Attributes:
        node: the operation; its weights are shapes.
        inputs: its inputs (integer ids have scale 1).
        out: the grid of its output (`centered` is None); `bits` are those of the activations' integer type.
        weight: the integers of its quantized weight in the weight's own shape, with the scale of its output channels
            (or of all); None where it has none.
        weights: its weights as real numbers.
    """

    node: Node
    inputs: Sequence[Operand]
    out: Operand
    weight: Operand | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)
