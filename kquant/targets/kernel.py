"""How a target computes an operation: one record for each, made in the file of its family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.graph.ir import Node
from kquant.targets.builtin import Builtin
from kquant.targets.operand import Call

Arithmetic = Callable[[Call], Any]  # -> integers q - zero_point of the output, rounded but not clamped


@dataclass(frozen=True)
class Layout:
    """How the quantized weight of an operation lies in a file.

    Attributes:
        to_file: from its view with output channels on one axis (`graph.ops`) to the file's axes.
        axis: the file's axis of the output channels.
        hybrid: bits of the integer weights that the float kernel takes; it quantizes its input itself, if it has one
            that is no id.
        blocks: those of them that may have a scale for every block of inputs.
    """

    to_file: Callable[[np.ndarray], np.ndarray] = lambda w: w
    axis: int = 0
    hybrid: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel of a target.

    Attributes:
        op: key of `graph.ops.OPS`.
        arithmetic: container of the activations (8 or 16 bits) -> what it computes, on tensors, for the simulation;
            a container that is not in it has no kernel.
        write: f(emitter, node, input tensors, sink) writes it into a file.
        operators: operators of the file that it is written with, or that compute it in files made elsewhere.
        layout: how its quantized weight is stored, if it has one.
        weights: container of the activations -> the containers below 8 bits that its weights may have.
        discrete: containers whose integers it reads where it makes no numbers of them, but places or truth values.
        output: container of the activations -> the (scale, zero point) that it insists on for its output.
        headroom: container of the activations -> by what factor the range of its output has to exceed its values, since
            it interpolates between samples that saturate.
        beside_powers: container of the activations -> how far, as a binary logarithm, the scale of its input has to be
            from a power of two, near which its builds compute different things.
        least_scale: container of the activations -> the scale of its input below which its builds abort.
        centered: inputs that it multiplies many times faster with zero point 0.
        fuses: activations that it applies itself.
        saturates: what it makes lies within the output's grid.
        max_rank: most axes that it takes, None for any number.
        slowdown: bits of the integers of its weights -> how many times as long it takes as with 8 bits.
        takes: whether it computes a node, as far as attributes and shapes of weights say so.
        variants: name -> another kernel for the same operation. A node is computed by it that names it in its attribute
            `kernel` (see `choice`).
    """

    op: str
    arithmetic: Mapping[int, Arithmetic]
    write: Callable[..., None]
    operators: Mapping[str, Builtin] = field(default_factory=dict)
    layout: Layout | None = None
    weights: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    discrete: tuple[int, ...] = ()
    output: Mapping[int, tuple[float, int]] = field(default_factory=dict)
    headroom: Mapping[int, float] = field(default_factory=dict)
    beside_powers: Mapping[int, float] = field(default_factory=dict)
    least_scale: Mapping[int, float] = field(default_factory=dict)
    centered: tuple[int, ...] = ()
    fuses: tuple[str, ...] = ("NONE",)
    saturates: bool = False
    max_rank: int | None = None
    slowdown: Mapping[int, float] = field(default_factory=dict)
    takes: Callable[[Node], bool] = lambda node: True
    variants: Mapping[str, Kernel] = field(default_factory=dict)

    def container(self, bits: int, activations: int) -> int:
        """Bits (2, 4 or 8) of the integers that store `bits`-bit weights beside activations in that container."""
        return next((c for c in sorted(self.weights.get(activations, ())) if bits <= c), 8)

    def lower_bound(self, lo: float, steps: Any) -> Any:
        """The integer at which a bound is enforced, for the simulation.

        Args:
            lo: the bound in real units.
            steps: the same in steps of the output, a tensor. At the floor of 16 bits a file leaves it to saturation,
                which ends at -32768 and not at -32767, but for the bound of an activation that the kernel applies.
        """
        if lo == -1.0 and "RELU_N1_TO_1" in self.fuses:
            return steps
        return tf.where(steps > -32767.0, steps, -32768.0)
