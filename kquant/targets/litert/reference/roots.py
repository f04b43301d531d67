"""RSQRT as the TFLite kernels compute it: in fixed point for 8 bits, from a lookup table for 16.

Source: GetInvSqrtQuantizedMultiplierExp in tensorflow/lite/kernels/internal/quantization_util.cc, and elementwise.cc.
"""

from __future__ import annotations

import numpy as np

from kquant.errors import ExportError
from kquant.targets.litert.arithmetic import (
    Multiplier,
    multiply_double_rounding,
    quantize_multiplier,
    round_half_away,
    rounding_divide_by_pot,
    saturate,
)
from kquant.targets.litert.reader import Operator
from kquant.targets.litert.reference.linear import Values

SHIFT = 20  # fractional bits of the table of reciprocal square roots
_F = np.float32


def _product(a: np.ndarray, b: np.ndarray | int) -> np.ndarray:
    """Fixed point: a b / 2^31, rounded half up."""
    return (a * b + (1 << 30)) >> 31


def reciprocal_roots(most: int) -> np.ndarray:
    """2^20 / sqrt(v) for v = 0 .. most, by five Newton steps in Q(3); 0 for v = 0."""
    v = np.arange(2, most + 1, dtype=np.int64)
    pairs = (31 - np.frexp(v)[1].astype(np.int64)) // 2 - 1
    half_input, x = rounding_divide_by_pot((v << (2 * pairs)) >> 1, 1), np.full_like(v, 1 << 28)
    for _ in range(5):
        cube = _product(_product(x, x), x) << 6  # Q(9) to Q(3)
        x = (_product(x, (1 << 28) + (1 << 27)) - _product(half_input, cube)) << 3  # Q(6) to Q(3)
    x = _product(x, 1518500250)  # sqrt(2) / 2 in Q(0)
    shift = 11 - pairs
    by = Multiplier(x << np.maximum(-shift, 0), SHIFT - np.maximum(shift, 0))
    roots = multiply_double_rounding(np.ones_like(v), by)
    return np.concatenate([np.asarray([0, 1 << SHIFT]), roots])


# for every distance of an int8 value from its zero point
RECIPROCAL_ROOTS = reciprocal_roots(255)


def rsqrt(op: Operator, x: Values) -> np.ndarray:
    """RSQRT; zero gives the largest integer.

    Raises:
        ExportError: a value is below zero, where the kernel fails.
    """
    source, out = op.given(0), op.outputs[0]
    value = np.asarray(x[0]).astype(np.int64) - source.z
    if value.min(initial=0) < 0:
        raise ExportError(f"{op}: RSQRT of a negative number fails on the target; keep its input above zero")
    if source.dtype == np.int16:
        return _interpolated(table_16(source.s, out.s), np.asarray(x[0]).astype(np.int64))
    return by_table(op, value, RECIPROCAL_ROOTS, np.float64(np.sqrt(source.s) * out.s))


def by_table(op: Operator, value: np.ndarray, table: np.ndarray, unit: np.float64) -> np.ndarray:
    """RSQRT of distances from the zero point, from `reciprocal_roots`; `unit` is sqrt(s_x) s_y."""
    out, by = op.outputs[0], quantize_multiplier(1.0 / unit)
    by = Multiplier(by.mantissa, by.exponent - SHIFT)
    y = multiply_double_rounding(table[value], by) + out.z
    return saturate(np.where(value == 0, np.iinfo(out.dtype).max, y), out.dtype)


def table_16(s_in: np.float32, s_out: np.float32) -> np.ndarray:
    """513 samples of the function, each corrected by half the error at its interval's middle, all in float32."""
    low, high = s_in * _F(-32768), s_in * _F(32767)
    step = _F((high - low) / _F(512))
    inverse = _F(65536) / _F(s_out * _F(32767) - s_out * _F(-32768))

    def curve(v: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(v <= 0, _F(32767) * s_out, _F(1) / np.sqrt(v)).astype(_F)

    i = np.arange(512).astype(_F)
    start = low + i * step
    ends = round_half_away(curve(start) * inverse)
    following = curve(low + (i + _F(1)) * step) * inverse
    middle = round_half_away(curve(start + step / _F(2)) * inverse)
    error = round_half_away((following + ends) / _F(2)) - middle
    last = round_half_away(curve(np.asarray([high])) * inverse)
    return np.clip(np.concatenate([ends - round_half_away(error / _F(2)), last]), -32768, 32767).astype(np.int64)


def _interpolated(table: np.ndarray, q: np.ndarray) -> np.ndarray:
    low, high = table[256 + (q >> 7)], table[257 + (q >> 7)]
    return saturate(low + (((high - low) * (q & 127) + 64) >> 7), np.dtype(np.int16))
