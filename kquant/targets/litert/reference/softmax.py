"""SOFTMAX as the TFLite reference kernels compute it: in fixed point for 8 bits, from lookup tables for 16.

Q(n) below is an int32 with n integer bits, a sign, and 31 - n fractional bits; a product of Q(a) and Q(b) is Q(a + b).
Source of the 8-bit functions: gemmlowp's fixedpoint.h and tensorflow/lite/kernels/internal/reference/softmax.h.
"""

from __future__ import annotations

import math

import numpy as np

from kquant.targets.litert.arithmetic import (
    multiply_double_rounding,
    quantize_multiplier,
    rounding_divide_by_pot,
    saturate,
)
from kquant.targets.litert.arithmetic import saturating_rounding_doubling_high_mul as product
from kquant.targets.litert.reader import Operator
from kquant.targets.litert.reference.linear import Values
from kquant.targets.litert.tables import EXP, RECIPROCAL

_ONE = 2**31 - 1


def _q0(value: float) -> int:
    return round(value * 2.0**31)


def _shift_left(x: np.ndarray, bits: int) -> np.ndarray:
    return saturate(x << bits, np.dtype(np.int32)).astype(np.int64)


def _exp_near_zero(a: np.ndarray) -> np.ndarray:
    """exp(a) for a in [-1/4, 0), Q(0) to Q(0): a Taylor series of degree 4 around -1/8."""
    x = a + (1 << 28)
    x2 = product(x, x)
    x3, x4 = product(x2, x), product(x2, x2)
    cubic = product(rounding_divide_by_pot(x4, 2) + x3, _q0(1 / 3))
    series = x + rounding_divide_by_pot(cubic + x2, 1)
    center = _q0(math.exp(-1 / 8))
    return center + product(series, center)


def exp_on_negative_values(a: np.ndarray) -> np.ndarray:
    """exp(a) for a <= 0, int64 holding Q(5), to Q(0): quarters by a table of exp(-2^k), the rest by its series."""
    quarter = 1 << 24
    rest = (a & (quarter - 1)) - quarter
    result, whole = _exp_near_zero(rest << 5), rest - a
    for k in range(-2, 5):
        result = np.where(whole >> (26 + k) & 1, product(result, _q0(math.exp(-(2.0**k)))), result)
    return np.where(a == 0, _ONE, result)


def reciprocal_of_one_plus(a: np.ndarray) -> np.ndarray:
    """1 / (1 + a) for a in [0, 1], Q(0) to Q(0): three Newton steps for the reciprocal of (1 + a) / 2 in Q(2)."""
    half = (a + _ONE + 1) >> 1
    x = _q0(48 / 17 / 4) + product(half, _q0(-32 / 17 / 4))
    for _ in range(3):
        x = x + _shift_left(product(x, (1 << 29) - product(half, x)), 2)
    return _shift_left(x, 1)


def _softmax_8(op: Operator, x: Values) -> np.ndarray:
    out, value = op.outputs[0], np.asarray(x[0]).astype(np.int64)
    by = quantize_multiplier(min(float(op.option("beta", 1.0)) * float(op.given(0).s) * 2.0**26, 2.0**31 - 1))
    left = int(by.exponent)
    lowest = -int(31 * 2**26 // 2**left)  # below it the exponential counts as 0
    below = value - value.max(axis=-1, keepdims=True)
    scaled = product(np.maximum(below, lowest) << left, by.mantissa)
    exps = np.where(below >= lowest, exp_on_negative_values(scaled), 0)
    total = rounding_divide_by_pot(exps, 12).sum(axis=-1, keepdims=True)  # Q(12)
    headroom = leading_zeros(total)
    inverse = reciprocal_of_one_plus((total << headroom) - (1 << 31))
    y = rounding_divide_by_pot(product(inverse, exps), 12 - headroom + 31 - 8)
    return saturate(np.where(below >= lowest, y, 0) + np.iinfo(out.dtype).min, out.dtype)


def leading_zeros(x: np.ndarray) -> np.ndarray:
    """Zero bits above the highest set bit of a positive 32-bit word."""
    return 32 - np.frexp(x.astype(np.float64))[1].astype(np.int64)


def _lookup(table: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Linear interpolation in a 513-entry table at int16 positions."""
    index = 256 + (q >> 7)
    return table[index] + (((table[index + 1] - table[index]) * (q & 0x7F) + 64) >> 7)


def softmax_16(op: Operator, x: Values, reciprocals: np.ndarray = RECIPROCAL) -> np.ndarray:
    """Softmax from two interpolated tables: exp on [-10, 0] and 1 / (1 + x) on [0, 1], `reciprocals`."""
    value = np.asarray(x[0]).astype(np.int64)
    beta = np.float32(op.option("beta", 1.0))
    by = quantize_multiplier(np.float64(op.given(0).s * beta) / (10.0 / 65535.0))
    below = multiply_double_rounding(value - value.max(axis=-1, keepdims=True), by)
    exps = _lookup(EXP, np.clip(below + 32767, -32768, 32767))
    total = exps.sum(axis=-1, keepdims=True)
    headroom = leading_zeros(total)
    shifted = ((total << (headroom - 1)) + (1 << 13)) >> 14
    reciprocal = _lookup(reciprocals, np.clip(shifted - (1 << 15) - (1 << 16), -32768, 32767))
    right = 31 - headroom
    y = (exps * reciprocal + (np.int64(1) << (right - 1))) >> right
    return np.clip(y, 0, 32767).astype(np.int16)


def softmax(op: Operator, x: Values) -> np.ndarray:
    """SOFTMAX on the last axis."""
    return (softmax_16 if op.given(0).dtype == np.int16 else _softmax_8)(op, x)
