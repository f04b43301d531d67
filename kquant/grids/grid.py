"""Grids: sets of allowed integers on a scale, x ~ scale * (q - zero_point), as pure numpy functions.

The integers are all of a range (uniform quantization; section 2.2 of the white paper, arXiv 2106.08295, eq. 4-8) or
those of a table: {-1, 0, 1}, powers of two, k centroids. They lie in the integer tensors of the target in either case,
so that its kernels need to know of a scale per channel only; what a table changes is which integer is nearest, and how
many bits a value needs in storage. Rounding is half to even, in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]
BIAS_MAX = 2**31 - 1

# The product of two scales (that of a bias) stays a normal float32 above 2^-126.
_MIN_SCALE = 2.0**-63
_MAX_SCALE = 2.0**127


class Spec(Protocol):
    """The part of a `specs.QuantSpec` that decides about the grid."""

    @property
    def bits(self) -> int: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def signed(self) -> bool: ...
    @property
    def narrow_range(self) -> bool: ...
    @property
    def power_of_two(self) -> bool: ...


@dataclass(frozen=True, eq=False)
class Grid:
    """A set of allowed integers on a scale: x ~ scale * (q - zero_point).

    Attributes:
        scale: float32 > 0, shape () for the tensor, (channels,), or (channels, blocks) with one for every `block`
            entries of the axis `block_axis`.
        zero_point: int32, () or (channels,).
        qmin: smallest allowed integer, as stored on the target.
        qmax: largest allowed integer.
        axis: the axis that the channels run along; None without channels.
        table: the allowed integers in rising order, int32 (levels,), (channels, levels) or (channels, blocks, levels);
            None where all from qmin to qmax are allowed. An entry may repeat.
        block: entries of `block_axis` that share a scale or a table; None without blocks.
        block_axis: the axis that the blocks run along.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    qmin: int
    qmax: int
    axis: int | None = None
    table: np.ndarray | None = None
    block: int | None = None
    block_axis: int | None = None

    def __post_init__(self) -> None:
        blocked = self.scale.ndim == 2 or (self.table is not None and self.table.ndim == 3)
        if (self.block is not None, self.block_axis is not None) != (blocked, blocked):
            raise ValueError("block and block_axis belong to a grid whose scale or table has blocks, and to no other")
        if self.axis is None and (np.ndim(self.scale) or (self.table is not None and self.table.ndim > 1)):
            raise ValueError("a scale or a table for every channel needs the axis of the channels")
        if self.table is not None:
            if not self.table.size or np.any(np.diff(self.table, axis=-1) < 0):
                raise ValueError(f"the allowed integers must rise, found {self.table}")
            if (int(self.table.min()), int(self.table.max())) != (self.qmin, self.qmax):
                raise ValueError(f"[{self.qmin}, {self.qmax}] are not the ends of the table")

    @property
    def bits(self) -> int:
        """Bits of a code of fixed length for the allowed integers."""
        levels = self.qmax - self.qmin + 1 if self.table is None else self.table.shape[-1]
        return (levels - 1).bit_length()

    @property
    def width(self) -> int:
        """Bits of a signed integer that holds every allowed one: what the container of a weight must have."""
        return signed_width(self.qmin, self.qmax)

    @property
    def container(self) -> int:
        """Bits of the integer type that stores the grid as an activation: 8 or 16."""
        return 8 if self.qmin >= -128 and self.qmax <= 127 else 16

    def entropy(self, integers: Any) -> float:
        """Zero-order entropy of integers of the grid, in bits per value."""
        found = np.asarray(integers).reshape(-1).astype(np.int64)
        counts = np.bincount(found - found.min(initial=0))
        share = counts[counts > 0] / counts.sum()
        return float(-(share * np.log2(share)).sum())

    def spread(self, values: Any, shape: tuple[int, ...]) -> Any:
        """What the grid has for the tensor, its channels, or its blocks, shaped to broadcast against a tensor.

        Args:
            values: (), (channels,) or (channels, blocks), e.g. the scale.
            shape: of the tensor.
        """
        if np.ndim(values) == 0:
            return values
        at = [1] * len(shape)
        assert self.axis is not None, "checked before"
        at[self.axis] = -1
        if np.ndim(values) == 1:
            return values.reshape(at)
        assert self.block is not None and self.block_axis is not None, "checked before"
        size = at[self.block_axis] = shape[self.block_axis]
        each = np.repeat(values, self.block, axis=1)[:, :size]
        return (each if self.axis < self.block_axis else each.T).reshape(at)

    def levels(self, shape: tuple[int, ...]) -> list[Any]:
        """The allowed integers less the zero point, float32, one array to broadcast against a tensor for each."""
        if self.table is None:
            raise ValueError("all integers of a range are allowed: it has no table")
        zero = self.spread(self.zero_point, shape)
        return [(self.spread(v, shape) - zero).astype(np.float32) for v in np.moveaxis(self.table, -1, 0)]


def grid_from_range(low: Any, high: Any, spec: Spec, axis: int | None = None) -> Grid:
    """The grid that covers [low, high] (eq. 4-8).

    Asymmetric: scale = (high - low) / (2^bits - 1), with the integer zero point that puts `low`
    nearest to qmin, so that 0 is exact. Symmetric: scale = max(|low|, |high|) / qmax with zero
    point 0; symmetric unsigned (eq. 8b): scale = high / (2^bits - 1), stored on the signed
    integers with zero point qmin. A power-of-two scale is rounded up, so the range stays covered.

    Args:
        low: lower edge, () or (channels,), finite; widened to contain 0.
        high: upper edge, likewise.
        spec: bits and kind of grid, e.g. a `specs.QuantSpec`.
        axis: the axis that the channels run along; None with scalar edges.

    Returns:
        Parameters whose scale is always a normal float32 of at least 2^-63. A range of zero width
        has scale 1, or the largest scale of the other channels: its values (zeros) stay exact, and
        the scale of a bias stays comparable to that of its neighbours.
    """
    low = np.minimum(np.asarray(low, np.float64), 0.0)
    high = np.maximum(np.asarray(high, np.float64), 0.0)
    if (axis is None) != (low.ndim == 0) or low.shape != high.shape:
        raise ValueError(f"edges of shapes {low.shape} and {high.shape} do not fit axis {axis}")
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError(f"a range must be finite, found [{low.min()}, {high.max()}]")
    half = 2 ** (spec.bits - 1)
    qmin, qmax = -half, half - 1
    if not spec.symmetric:
        raw = (high - low) / (qmax - qmin)
    elif not spec.signed:
        raw = high / (qmax - qmin)
    else:
        qmin = -qmax if spec.narrow_range else qmin
        raw = np.maximum(-low, high) / qmax
    scale = valid_scale(raw, spec.power_of_two)
    if spec.symmetric:
        zero_point = np.full(scale.shape, 0 if spec.signed else qmin, np.int32)
    else:
        zero_point = np.clip(np.rint(qmin - low / scale.astype(np.float64)), qmin, qmax).astype(np.int32)
    return Grid(scale, np.asarray(zero_point), qmin, qmax, axis)


def valid_scale(raw: Array, power_of_two: bool = False) -> Array:
    """Scales as normal float32 numbers of at least 2^-63; 0 becomes the largest of the others, or 1."""
    used = raw > 0
    fallback = raw.max() if used.any() else 1.0
    scale = np.clip(np.where(used, raw, fallback), _MIN_SCALE, np.finfo(np.float32).max).astype(np.float32)
    if power_of_two:
        mantissa, exponent = np.frexp(scale.astype(np.float64))
        exact = np.ldexp(1.0, exponent - (mantissa == 0.5))
        scale = np.minimum(exact, _MAX_SCALE).astype(np.float32)
    return np.asarray(scale)


def _steps(x: Any, q: Grid) -> tuple[Array, Array, Array]:
    """(quantized x less the zero point, scale and zero point shaped to broadcast), float32."""
    x = np.asarray(x, np.float32)
    scale, zero = q.spread(q.scale, x.shape), q.spread(q.zero_point, x.shape)
    with np.errstate(over="ignore"):  # a quotient beyond float32 is clamped as any other
        steps = np.asarray(x / scale)
    if q.table is not None:
        return nearest(steps, q.levels(x.shape)), scale, zero
    np.rint(steps, out=steps)
    # Clamping before the zero point is added keeps every sum exact.
    np.maximum(steps, (q.qmin - zero).astype(np.float32), out=steps)
    np.minimum(steps, (q.qmax - zero).astype(np.float32), out=steps)
    return steps, scale, zero


def signed_width(qmin: int, qmax: int) -> int:
    """Bits of a signed integer that holds qmin and qmax."""
    return max(qmax, -qmin - 1, 1).bit_length() + 1


def nearest(steps: Array, levels: Sequence[Any] | Array) -> Array:
    """The nearest of some levels, the lower one of two that are equally near.

    Args:
        steps: numbers.
        levels: in rising order; each broadcasts against `steps`.
    """
    found = np.broadcast_to(levels[0], steps.shape).astype(steps.dtype)
    for lower, upper in itertools.pairwise(levels):  # few levels: a pass for each
        np.copyto(found, upper, where=steps > (lower + upper) / 2)
    return found


def quantize(x: Any, q: Grid) -> Array:
    """The nearest allowed integers, int32; on a range clamp(round(x / scale) + zero_point, qmin, qmax) (eq. 4).

    Args:
        x: finite numbers of any shape; per channel, `q.axis` has one entry per channel.
        q: the grid.
    """
    steps, _, zero = _steps(x, q)
    return np.asarray(steps.astype(np.int32) + zero)


def dequantize(ints: Any, q: Grid) -> Array:
    """scale * (ints - zero_point) as float32 (eq. 5)."""
    ints = np.asarray(ints).astype(np.int32)
    scale, zero = q.spread(q.scale, ints.shape), q.spread(q.zero_point, ints.shape)
    return np.asarray((ints - zero).astype(np.float32) * scale)


def fake_quantize(x: Any, q: Grid) -> Array:
    """The value that the grid gives to x: dequantize(quantize(x)) (eq. 6), float32."""
    steps, scale, _ = _steps(x, q)
    steps *= scale
    return steps


def quantize_bias(bias: Any, input_scale: Any, weight_scale: Any) -> Array:
    """The bias at scale input_scale * weight_scale: int64 numbers within +-(2^31 - 1).

    Args:
        bias: (channels,).
        input_scale: ().
        weight_scale: () or (channels,).

    Returns:
        rint(bias / (input_scale * weight_scale)), product and quotient in float32. A bias that
        does not fit is clipped; `fit_bias` avoids that.
    """
    scale = np.asarray(input_scale, np.float32) * np.asarray(weight_scale, np.float32)
    with np.errstate(over="ignore"):
        steps = np.rint(np.asarray(bias, np.float32) / scale).astype(np.float64)
    return np.clip(steps, -BIAS_MAX, BIAS_MAX).astype(np.int64)


def fit_bias(weights: Grid, bias: Any, input_scale: Any) -> Grid:
    """`weights` with scales raised, by powers of two, where the bias would not fit 32 bits; itself where it fits.

    A dead channel has weights near 0 and so a tiny scale, but its bias is of normal size and often
    matters; its weights lose nothing by a coarser grid.

    Args:
        weights: grid of the weights, scale () or (channels,).
        bias: (channels,).
        input_scale: scale of the layer's input, ().
    """
    # Half of the 32-bit range is left for the products that the accumulator adds.
    least = np.abs(np.asarray(bias, np.float64)) / (np.float64(input_scale) * 2.0**30)
    if weights.axis is None:
        least = least.max(initial=0.0)
    elif weights.scale.ndim == 2:
        least = least[:, None]
    doublings = np.ceil(np.log2(np.maximum(least / weights.scale, 1.0)))
    if not doublings.any():
        return weights
    return replace(weights, scale=np.asarray(weights.scale * np.exp2(doublings), np.float32))
