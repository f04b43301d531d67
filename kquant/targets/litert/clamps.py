"""Bounds of an output in integers, and the cheapest operators that enforce them.

An integer kernel saturates at the limits of its container (int8, int16) and can apply one of a few
fused activations for nothing. What these two do not guarantee needs MAXIMUM or MINIMUM operators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kquant.grids.grid import Grid
from kquant.targets.litert.arithmetic import REAL_BOUNDS

Clip = tuple[float | None, float | Sequence[float] | None]  # the upper bound may be a list, a cap per channel

ACTIVATIONS = {a.name: bounds for a, bounds in REAL_BOUNDS.items()}  # name -> (lo, hi) in real units


@dataclass(frozen=True)
class Clamp:
    """How to bound an output.

    Attributes:
        fused: activation that the operator applies itself.
        lower: operand of a MAXIMUM behind it, None for no such operator; an integer of the grid,
            or a real number where the output is float.
        upper: operand of a MINIMUM, likewise; or one per channel.
    """

    fused: str = "NONE"
    lower: float | None = None
    upper: float | tuple[float, ...] | None = None


def container_range(bits: int) -> tuple[int, int]:
    """Smallest and largest integer of a signed container."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def integer_bounds(q: Grid, clip: tuple[float | None, float | None] = (None, None)) -> tuple[int, int]:
    """Smallest and largest integer that the output may take: its grid's, tightened by the clip."""
    lower, upper = q.qmin, q.qmax
    if clip[0] is not None:
        lower = max(lower, _steps(clip[0], q))
    if clip[1] is not None:
        upper = min(upper, _steps(clip[1], q))
    return min(lower, q.qmax), max(upper, q.qmin)


def integer_clamp(q: Grid, clip: Clip, fusable: Sequence[str], given: tuple[int, int] | None = None) -> Clamp:
    """The cheapest way to keep an output within its bounds.

    Args:
        q: its grid.
        clip: the activation fused behind the operation, in real units.
        fusable: activations that the kernel can apply, NONE among them.
        given: the integers that the kernel can produce at all; those of the container by default.
    """
    lo, hi = clip
    if isinstance(hi, Sequence):
        caps = tuple(integer_bounds(q, (lo, cap))[1] for cap in hi)
        if min(caps) < max(caps):
            return replace(integer_clamp(q, (lo, None), fusable, given), upper=caps)
        hi = hi[0]  # on this grid they are one
    least, most = container_range(q.container) if given is None else given
    if q.container == 16:
        # A symmetric grid leaves out -32768, which a kernel reaches only by saturating: 1 LSB at most.
        least = max(least, -32767)
    lower, upper = integer_bounds(q, (lo, hi))
    best: Clamp | None = None
    plain_first = lo is None and hi is None
    for name in sorted(fusable, key=lambda a: (a == "NONE") != plain_first):
        # The kernels round half away from zero (QuantizeMultiplier's CalculateActivationRange).
        low, high = ACTIVATIONS[name]
        low_q = least if low is None else max(least, _kernel_steps(low, q))
        high_q = most if high is None else min(most, _kernel_steps(high, q))
        if low_q > lower and low_q > least or high_q < upper and high_q < most:
            continue  # it would cut off values that are wanted
        found = Clamp(name, lower if low_q < lower else None, upper if high_q > upper else None)
        if best is None or _extra(found) < _extra(best):
            best = found
    assert best is not None, "NONE never cuts off anything"
    return best


def float_clamp(clip: Clip, fusable: Sequence[str]) -> Clamp:
    """The same for a float output: the activation that is the clip itself, or operators behind it."""
    for name in fusable:
        if ACTIVATIONS[name] == clip:
            return Clamp(name)
    lo, hi = clip
    upper = tuple(hi) if isinstance(hi, Sequence) else hi
    return Clamp("RELU", None, upper) if lo == 0.0 and "RELU" in fusable else Clamp("NONE", lo, upper)


def _steps(x: float, q: Grid) -> int:
    steps = float(np.rint(np.float32(x) / np.float32(q.scale)))
    return int(q.zero_point) + int(min(max(steps, -(2**20)), 2**20))


def _kernel_steps(x: float, q: Grid) -> int:
    steps = float(np.float32(x) / np.float32(q.scale))
    rounded = math.copysign(math.floor(abs(steps) + 0.5), steps)
    return int(q.zero_point) + int(min(max(rounded, -(2**20)), 2**20))


def _extra(clamp: Clamp) -> int:
    return (clamp.lower is not None) + (clamp.upper is not None)
