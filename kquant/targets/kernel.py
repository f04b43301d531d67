"""How a target computes an operation: one record for each, made in the file of its family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kquant.targets.operand import Call

Arithmetic = Callable[[Call], Any]  # -> integers q - zero_point of the output, rounded but not clamped


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel of a target.

    Attributes:
        op: key of `graph.ops.OPS`.
        arithmetic: container of the activations (8 or 16 bits) -> what it computes, on tensors, for the simulation;
            a container that is not in it has no kernel.
        weights: container of the activations -> the containers below 8 bits that its weights may have.
        output: container of the activations -> the (scale, zero point) that it insists on for its output.
        write: f(emitter, node, input tensors, sink) writes it into a file.
        fuses: activations that it applies itself.
        max_rank: most axes that it takes, None for any number.
        reference: operator of the file -> its arithmetic in numpy, bit for bit with the runtime's reference kernels.
    """

    op: str
    arithmetic: Mapping[int, Arithmetic]
    write: Callable[..., None]
    weights: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    output: Mapping[int, tuple[float, int]] = field(default_factory=dict)
    fuses: tuple[str, ...] = ("NONE",)
    max_rank: int | None = None
    reference: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
