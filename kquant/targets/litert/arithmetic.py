"""Fixed-point primitives of the TFLite kernels, as pure numpy functions on integers.

A real multiplier M > 0 is stored as (m, e) with M ~ m * 2^(e - 31) and 2^30 <= m < 2^31. The kernels differ in how
they round x * M: `multiply_double_rounding` (convolutions, element-wise operations, requantization),
`multiply_single_rounding` (fully connected), `multiply_reduced` (convolutions of int16 data).
Source: tensorflow/lite/kernels/internal (quantization_util, common) and gemmlowp's fixed point.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np


class Activation(IntEnum):
    """Fused activations, numbered as in the schema."""

    NONE = 0
    RELU = 1
    RELU_N1_TO_1 = 2
    RELU6 = 3


# the real numbers that they clamp to
REAL_BOUNDS: dict[Activation, tuple[float | None, float | None]] = {
    Activation.NONE: (None, None),
    Activation.RELU: (0.0, None),
    Activation.RELU_N1_TO_1: (-1.0, 1.0),
    Activation.RELU6: (0.0, 6.0),
}


@dataclass(frozen=True, eq=False)
class Multiplier:
    """A real factor in fixed point: mantissa * 2^(exponent - 31), int64 arrays of one shape.

    Attributes:
        mantissa: 0, or an integer in [2^30, 2^31).
        exponent: the power of two.
    """

    mantissa: np.ndarray
    exponent: np.ndarray


def quantize_multiplier(real: np.ndarray | np.floating | float) -> Multiplier:
    """Write a factor >= 0 with a 31-bit mantissa, rounding half away from zero; below 2^-32 it becomes 0.

    Args:
        real: factors, any shape; converted to float64.
    """
    fraction, exponent = np.frexp(np.asarray(real, np.float64))
    mantissa = np.floor(fraction * 2.0**31 + 0.5).astype(np.int64)
    exponent = exponent.astype(np.int64)
    carried = mantissa == 1 << 31
    mantissa, exponent = np.where(carried, 1 << 30, mantissa), exponent + carried
    vanishes = exponent < -31
    return Multiplier(np.where(vanishes, 0, mantissa), np.where(vanishes, 0, exponent))


def rounding_divide_by_pot(x: np.ndarray, exponent: np.ndarray | int) -> np.ndarray:
    """x / 2^exponent, rounded to nearest with halves away from zero; exponent >= 0."""
    exponent = np.asarray(exponent, np.int64)
    half = (np.int64(1) << exponent) >> 1
    return (x + half - ((x < 0) & (exponent > 0))) >> exponent


def saturating_rounding_doubling_high_mul(a: np.ndarray, b: np.ndarray | int) -> np.ndarray:
    """a * b / 2^31 rounded to nearest, halves up, for int32 values with b >= 0 (where nothing saturates)."""
    return (a.astype(np.int64) * b + (1 << 30)) >> 31


def _high_product(x: np.ndarray, by: Multiplier) -> np.ndarray:
    """x * M for an int32 x before the right shift; the left shift of a factor above 1 wraps in 32 bits."""
    shifted = np.left_shift(x.astype(np.int32), np.maximum(by.exponent, 0).astype(np.int32))
    return saturating_rounding_doubling_high_mul(shifted, by.mantissa)


def multiply_double_rounding(x: np.ndarray, by: Multiplier) -> np.ndarray:
    """x * M for an int32 x, rounded at 31 fractional bits and again, half away from zero, at the right shift."""
    return rounding_divide_by_pot(_high_product(x, by), np.maximum(-by.exponent, 0))


def multiply_double_rounding_up(x: np.ndarray, by: Multiplier) -> np.ndarray:
    """As `multiply_double_rounding`, but the second rounding takes halves up: the optimized kernels' way."""
    shift = np.maximum(-by.exponent, 0)
    return (_high_product(x, by) + ((np.int64(1) << shift) >> 1)) >> shift


def multiply_single_rounding(x: np.ndarray, by: Multiplier) -> np.ndarray:
    """x * M with one rounding, halves away from zero: +-((|x| m + 2^(30 - e)) >> (31 - e)); |x| < 2^32, e <= 30."""
    shift = 31 - by.exponent
    magnitude = (np.abs(x.astype(np.int64)) * by.mantissa + (np.int64(1) << (shift - 1))) >> shift
    return np.where(x < 0, -magnitude, magnitude)


def multiply_reduced(x: np.ndarray, by: Multiplier) -> np.ndarray:
    """x * M for a 64-bit x of at most 48 bits, with the mantissa rounded to 16 bits: (x r + 2^(14 - e)) >> (15 - e)."""
    reduced = np.where(by.mantissa >= 0x7FFF0000, 0x7FFF, (by.mantissa + (1 << 15)) >> 16)
    shift = 15 - by.exponent
    return (x.astype(np.int64) * reduced + (np.int64(1) << (shift - 1))) >> shift


def fold_divisor(by: Multiplier, count: int) -> Multiplier:
    """The multiplier of a mean, M / count: the mantissa is scaled up by 2^s and divided, truncating.

    Args:
        by: one multiplier, shape ().
        count: the number of elements averaged, > 0.
    """
    shift = min(count.bit_length() - 1, 32, 31 + int(by.exponent))
    mantissa = (int(by.mantissa) << shift) // count
    return Multiplier(np.asarray(mantissa, np.int64), np.asarray(int(by.exponent) - shift, np.int64))


def round_half_away(x: np.ndarray | np.floating) -> np.ndarray:
    """C's round(): to the nearest integer, halves away from zero, in the precision of x."""
    whole = np.trunc(x)
    return whole + np.where(np.abs(x - whole) >= 0.5, np.sign(x), 0).astype(x.dtype)


def divide_half_away(x: np.ndarray, count: np.ndarray | int) -> np.ndarray:
    """x / count for integers with count > 0, rounded to nearest with halves away from zero."""
    quotient = (np.abs(x) + np.asarray(count) // 2) // count
    return np.where(x < 0, -quotient, quotient)


def saturate(y: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """y limited to the range of an integer type."""
    info = np.iinfo(dtype)
    return np.clip(y, info.min, info.max).astype(dtype)


def activation_range(activation: int, scale: np.float32, zero_point: int, dtype: np.dtype) -> tuple[int, int]:
    """The integers that a fused activation clamps to.

    Args:
        activation: a value of `Activation`.
        scale: float32 scale of the output.
        zero_point: zero point of the output.
        dtype: integer type of the output.

    Returns:
        Smallest and largest integer: bound / scale in float32, rounded half away from zero, within the type's range.

    Raises:
        ValueError: the activation is not one of `Activation`.
    """
    info = np.iinfo(dtype)
    low, high = REAL_BOUNDS[Activation(activation)]

    def quantize(bound: float) -> int:
        return zero_point + int(round_half_away(np.float32(bound) / np.float32(scale)))

    return (
        int(info.min) if low is None else max(int(info.min), quantize(low)),
        int(info.max) if high is None else min(int(info.max), quantize(high)),
    )


def unpack(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Integers of 4 or 2 bits, two's complement, packed low bits of a byte first.

    Args:
        data: uint8, the packed bytes.
        bits: width of one value, 2 or 4.
        count: how many values there are.

    Returns:
        int8, shape (count,).
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    fields = ((data[:, None] >> shifts) & ((1 << bits) - 1)).reshape(-1)[:count].astype(np.int8)
    return np.where(fields >= 1 << (bits - 1), fields - (1 << bits), fields).astype(np.int8)
