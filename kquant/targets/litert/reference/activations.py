"""Activation functions, softmax apart, as the TFLite reference kernels compute them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from kquant.targets.litert.arithmetic import (
    Multiplier,
    multiply_double_rounding,
    quantize_multiplier,
    round_half_away,
    rounding_divide_by_pot,
    saturate,
)
from kquant.targets.litert.reader import Operator
from kquant.targets.litert.reference.linear import Compute, Values
from kquant.targets.litert.tables import SIGMOID

Curve = Callable[[np.ndarray], np.ndarray]
_F = np.float32


def _ratio(op: Operator, factor: float = 1.0) -> Multiplier:
    """s_x / s_y (times a factor on s_x), taken in float32 as these kernels do."""
    return quantize_multiplier(_F(op.given(0).s * _F(factor)) / op.outputs[0].s)


def _offsets(op: Operator, x: Values) -> np.ndarray:
    return np.asarray(x[0]).astype(np.int64) - op.given(0).z


def relu(low: float, high: float | None) -> Compute:
    """RELU and its bounded kin: rescale, then clamp to the quantized bounds."""

    def kernel(op: Operator, x: Values) -> np.ndarray:
        out = op.outputs[0]
        info = np.iinfo(out.dtype)
        bottom = max(info.min, out.z + int(round_half_away(_F(low) / out.s)))
        top = info.max if high is None else min(info.max, out.z + int(round_half_away(_F(high) / out.s)))
        return np.clip(multiply_double_rounding(_offsets(op, x), _ratio(op)) + out.z, bottom, top).astype(out.dtype)

    return kernel


def leaky_relu(op: Operator, x: Values) -> np.ndarray:
    """LEAKY_RELU: one multiplier for values >= 0, another for the rest."""
    offsets, out = _offsets(op, x), op.outputs[0]
    above = multiply_double_rounding(offsets, _ratio(op))
    below = multiply_double_rounding(offsets, _ratio(op, op.option("alpha", 0.0)))
    return saturate(np.where(offsets >= 0, above, below) + out.z, out.dtype)


def prelu(op: Operator, x: Values) -> np.ndarray:
    """PRELU: as LEAKY_RELU, the slope an integer tensor that broadcasts."""
    offsets, alpha, out = _offsets(op, x), op.given(1), op.outputs[0]
    above = multiply_double_rounding(offsets, _ratio(op))
    slopes = np.asarray(x[1]).astype(np.int64) - alpha.z
    below = multiply_double_rounding(offsets * slopes, _ratio(op, float(alpha.s)))
    return saturate(np.where(offsets >= 0, above, below) + out.z, out.dtype)


def _table(op: Operator, curve: Curve) -> np.ndarray:
    """The 256 outputs of an 8-bit function of float32, indexed by q - qmin."""
    source, out = op.given(0), op.outputs[0]
    info = np.iinfo(source.dtype)
    values = source.s * (np.arange(info.min, info.max + 1) - source.z).astype(_F)
    with np.errstate(over="ignore", under="ignore"):
        curved = curve(values).astype(_F)
    return saturate(round_half_away(curved * (_F(1) / out.s)).astype(np.int64) + out.z, out.dtype)


def _eight_bit(curve: Curve) -> Callable[[Operator, Values], np.ndarray]:
    def kernel(op: Operator, x: Values) -> np.ndarray:
        value = np.asarray(x[0])
        return _table(op, curve)[value.astype(np.int64) - np.iinfo(value.dtype).min]

    return kernel


def _sigmoid(v: np.ndarray) -> np.ndarray:
    return _F(1) / (_F(1) + np.exp(-v.astype(np.float64)).astype(_F))


def _tanh(v: np.ndarray) -> np.ndarray:
    return np.tanh(v.astype(np.float64))


def _elu(v: np.ndarray) -> np.ndarray:
    return np.where(v < 0, np.expm1(np.minimum(v.astype(np.float64), 0)), v)


elu = _eight_bit(_elu)  # ELU of 8 bits


def _gelu(v: np.ndarray) -> np.ndarray:
    erfc = np.array([math.erfc(-float(a) / math.sqrt(2)) for a in v])
    return _F(0.5) * v * erfc.astype(_F)


def _gelu_tanh(v: np.ndarray) -> np.ndarray:
    inner = _F(math.sqrt(2 / math.pi)) * (v + _F(0.044715) * v * v * v)
    return _F(0.5) * v * (_F(1) + np.tanh(inner.astype(np.float64)).astype(_F))


def gelu(op: Operator, x: Values) -> np.ndarray:
    """GELU of 8 bits, exact or by its tanh approximation."""
    return _eight_bit(_gelu_tanh if op.option("approximate", False) else _gelu)(op, x)


def _table_scale(op: Operator, shifts: tuple[int, ...]) -> tuple[int, int]:
    """(factor, right shift) that bring int16 inputs to the table's grid of 1 / (3 * 4096)."""
    scale = op.given(0).s
    log2 = np.log(scale) * (_F(1) / np.log(_F(2)))
    nearest = int(round_half_away(log2))
    if abs(log2 - _F(nearest)) < 1e-3 and 12 + nearest in shifts:
        return 3 << (12 + nearest), 0
    factor, shift = float(scale) * 4096.0 * 3.0, 0
    while factor <= 32767.0 / 2.0 and shift <= 30:
        factor, shift = factor * 2, shift + 1
    return int(factor), shift


def _interpolated(x: np.ndarray, bits: int, top: int) -> np.ndarray:
    """The sigmoid table between its entries at |x| / 2^bits, with `bits` more fractional bits; `top` beyond its end."""
    magnitude = np.abs(x)
    index = np.minimum(magnitude >> bits, 254)
    low, high = SIGMOID[index], SIGMOID[index + 1]
    inside = (low << bits) + (magnitude & ((1 << bits) - 1)) * (high - low)
    return np.where(magnitude >> bits >= 255, top, inside)


def _sixteen_bit_input(op: Operator, x: Values, shifts: tuple[int, ...]) -> np.ndarray:
    factor, shift = _table_scale(op, shifts)
    return (np.asarray(x[0]).astype(np.int64) * factor + ((1 << shift) >> 1)) >> shift


def logistic(op: Operator, x: Values) -> np.ndarray:
    """LOGISTIC: a table of 256 for 8 bits; for 16 bits a table of sigmoid(i / 24), interpolated."""
    if op.given(0).dtype != np.int16:
        return _eight_bit(_sigmoid)(op, x)
    q = _sixteen_bit_input(op, x, (0,))
    y = _interpolated(q, 9, 0x7FFF << 10)
    return (np.where(q >= 0, y + (1 << 9), (1 << 25) - y + (1 << 9) - 1) >> 10).astype(np.int16)


def tanh(op: Operator, x: Values) -> np.ndarray:
    """TANH: as LOGISTIC, by tanh(x) = 2 sigmoid(2 x) - 1."""
    if op.given(0).dtype != np.int16:
        return _eight_bit(_tanh)(op, x)
    q = _sixteen_bit_input(op, x, (0, 1))
    y = _interpolated(q, 8, 0xFFFF << 8)
    return (np.where(q >= 0, y - (1 << 23) + (1 << 7), -y + (1 << 23) + (1 << 7) - 1) >> 8).astype(np.int16)


def _doubling_high_mul(a: np.ndarray, b: int) -> np.ndarray:
    """a * b / 2^15 of int16 values, rounded to nearest, halves up; b >= 0."""
    return (a * b + (1 << 14)) >> 15


def hard_swish(op: Operator, x: Values) -> np.ndarray:
    """HARD_SWISH of 8 bits: x relu6(x + 3) / 6 in 16-bit fixed point."""
    source, out = op.given(0), op.outputs[0]
    fine = _F(1 / 128) * source.s

    def half_width(real: np.float32) -> tuple[int, int]:
        by = quantize_multiplier(real)
        mantissa = int(by.mantissa)
        return (0x7FFF if mantissa >= 0x7FFF7FFF else (mantissa + (1 << 15)) >> 16), int(by.exponent)

    scale_mantissa, scale_exponent = half_width(fine / out.s)
    gate_mantissa, gate_exponent = half_width(fine / _F(3 / 32768))
    hires = _offsets(op, x) << 7
    scaled = _doubling_high_mul(hires, scale_mantissa)
    gate = hires
    if gate_exponent > 0:
        gate = saturate(gate << (gate_exponent - 1), np.dtype(np.int16)).astype(np.int64)
    gate = _doubling_high_mul(gate, gate_mantissa)
    if gate_exponent > 0:
        gate = saturate(gate << 1, np.dtype(np.int16)).astype(np.int64)
    gate = rounding_divide_by_pot(gate, max(-gate_exponent, 0))
    gate = (gate + (1 << 15)) >> 1
    product = gate * scaled
    product = np.where(product < 0, -(-product >> 15), product >> 15)  # C division truncates
    return saturate(rounding_divide_by_pot(product, -scale_exponent) + out.z, out.dtype)
