"""Uniform affine quantization: range -> parameters -> integers -> values, as pure numpy functions.

Section 2.2 of the white paper (arXiv 2106.08295), eq. 4-8:  x ~ scale * (q - zero_point),
q = clamp(round(x / scale) + zero_point, qmin, qmax), rounding half to even, in float32.
"""

from __future__ import annotations

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
    """An integer grid: x ~ scale * (q - zero_point) with q an integer in [qmin, qmax].

    Attributes:
        scale: float32 > 0, shape () per tensor or (channels,) per channel.
        zero_point: int32, shape of `scale`.
        qmin: smallest integer of the grid, as stored on the target.
        qmax: largest integer of the grid.
        axis: the axis that `scale` runs along; None per tensor.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    qmin: int
    qmax: int
    axis: int | None = None

    @property
    def bits(self) -> int:
        """How many bits an integer of the grid takes."""
        return (self.qmax - self.qmin).bit_length()

    @property
    def container(self) -> int:
        """Bits of the integer type that stores the grid as an activation: 8 or 16."""
        return 8 if self.qmin >= -128 and self.qmax <= 127 else 16


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
    scale = _valid_scale(raw, spec.power_of_two)
    if spec.symmetric:
        zero_point = np.full(scale.shape, 0 if spec.signed else qmin, np.int32)
    else:
        zero_point = np.clip(np.rint(qmin - low / scale.astype(np.float64)), qmin, qmax).astype(np.int32)
    return Grid(scale, np.asarray(zero_point), qmin, qmax, axis)


def _valid_scale(raw: Array, power_of_two: bool) -> Array:
    used = raw > 0
    fallback = raw.max() if used.any() else 1.0
    scale = np.clip(np.where(used, raw, fallback), _MIN_SCALE, np.finfo(np.float32).max).astype(np.float32)
    if power_of_two:
        mantissa, exponent = np.frexp(scale.astype(np.float64))
        exact = np.ldexp(1.0, exponent - (mantissa == 0.5))
        scale = np.minimum(exact, _MAX_SCALE).astype(np.float32)
    return np.asarray(scale)


def _along(values: Array, axis: int | None, ndim: int) -> Array:
    """Per-channel values shaped to broadcast against a tensor of `ndim` axes."""
    if axis is None:
        return values
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def _steps(x: Any, q: Grid) -> tuple[Array, Array, Array]:
    """(quantized x less the zero point, scale and zero point shaped to broadcast), float32."""
    x = np.asarray(x, np.float32)
    scale, zero = _along(q.scale, q.axis, x.ndim), _along(q.zero_point, q.axis, x.ndim)
    with np.errstate(over="ignore"):  # a quotient beyond float32 is clamped as any other
        steps = np.asarray(x / scale)
    np.rint(steps, out=steps)
    # Clamping before the zero point is added keeps every sum exact.
    np.maximum(steps, (q.qmin - zero).astype(np.float32), out=steps)
    np.minimum(steps, (q.qmax - zero).astype(np.float32), out=steps)
    return steps, scale, zero


def quantize(x: Any, q: Grid) -> Array:
    """clamp(round(x / scale) + zero_point, qmin, qmax) as int32 (eq. 4), in float32, half to even.

    Args:
        x: finite numbers of any shape; per channel, `q.axis` has one entry per channel.
        q: the grid.
    """
    steps, _, zero = _steps(x, q)
    return np.asarray(steps.astype(np.int32) + zero)


def dequantize(ints: Any, q: Grid) -> Array:
    """scale * (ints - zero_point) as float32 (eq. 5)."""
    ints = np.asarray(ints).astype(np.int32)
    scale, zero = _along(q.scale, q.axis, ints.ndim), _along(q.zero_point, q.axis, ints.ndim)
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
    """`weights` with scales raised, by powers of two, where the bias would not fit 32 bits.

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
    doublings = np.ceil(np.log2(np.maximum(least / weights.scale, 1.0)))
    return replace(weights, scale=np.asarray(weights.scale * np.exp2(doublings), np.float32))
