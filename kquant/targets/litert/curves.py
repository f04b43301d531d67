"""Activation functions of 8 bits as LiteRT's own kernels compute them, on tensors.

Lookup tables of float32 functions, and the fixed-point formulas of HARD_SWISH and of the reference kernel of SOFTMAX.
`reference/activations.py` and `reference/softmax.py` hold the same on numpy arrays, with their sources. Q(n) below is
an integer with n integer bits, a sign, and 31 - n fractional bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import tensorflow as tf

from kquant.graph.ops import compute
from kquant.grids.gradients import exact
from kquant.targets.kernel import Arithmetic
from kquant.targets.litert.fixed_point import (
    Tensor,
    bit_length,
    divide_by_power,
    doubles,
    integers,
    multiplier,
    power,
    shift_right,
    with_gradient_of,
)
from kquant.targets.operand import Call

_ONE = 2**31 - 1


def _ideal(call: Call) -> Tensor:
    """The real function in steps of the output."""
    return compute(call.node, [call.inputs[0].value]) / call.out.scale


def table(curve: Callable[[Call, Tensor], Tensor]) -> Arithmetic:
    """A function of float32, rounded half away from zero: what the kernel's table of 256 entries holds.

    Args:
        curve: f(call, real values) -> float32.
    """

    def arithmetic(call: Call) -> Tensor:
        steps = curve(call, call.inputs[0].value) * (1.0 / call.out.scale)
        whole = tf.sign(steps) * tf.floor(tf.abs(steps))
        away = tf.where(tf.abs(steps - whole) >= 0.5, tf.sign(steps), 0.0)
        return exact(_ideal(call), whole + away)

    return arithmetic


def _wide(v: Tensor) -> Tensor:
    return tf.cast(v, tf.float64)


def _narrow(v: Tensor) -> Tensor:
    return tf.cast(v, tf.float32)


def _sigmoid(call: Call, v: Tensor) -> Tensor:
    return 1.0 / (1.0 + _narrow(tf.exp(-_wide(v))))


def _tanh(call: Call, v: Tensor) -> Tensor:
    return _narrow(tf.tanh(_wide(v)))


def _elu(call: Call, v: Tensor) -> Tensor:
    return tf.where(v < 0, _narrow(tf.math.expm1(tf.minimum(_wide(v), 0.0))), v)


def _gelu(call: Call, v: Tensor) -> Tensor:
    if not call.node.attrs["approximate"]:
        return 0.5 * v * _narrow(tf.math.erfc(-_wide(v) / math.sqrt(2)))
    inner = math.sqrt(2 / math.pi) * (v + 0.044715 * v * v * v)
    return 0.5 * v * (1.0 + _narrow(tf.tanh(_wide(inner))))


logistic, tanh, elu, gelu = table(_sigmoid), table(_tanh), table(_elu), table(_gelu)


def _half_width(real: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 factor with a mantissa of 15 bits: (mantissa, exponent)."""
    mantissa, exponent = multiplier(*doubles(real))
    short = tf.where(mantissa >= 0x7FFF7FFF, tf.constant(0x7FFF, tf.int64), (mantissa + (1 << 15)) // (1 << 16))
    return short, exponent


def _in_16_bits(x: Tensor) -> Tensor:
    return tf.clip_by_value(x, -32768, 32767)


def hard_swish(call: Call) -> Tensor:
    """x relu6(x + 3) / 6 in 16-bit fixed point."""
    x, fine = call.inputs[0], call.inputs[0].scale * (1 / 128)
    scale, scale_exponent = _half_width(fine / call.out.scale)
    gate_scale, gate_exponent = _half_width(fine / tf.constant(3 / 32768, tf.float32))
    high = integers(x) * (1 << 7)
    left, fifteen, zero = tf.maximum(gate_exponent, 0), tf.constant(15, tf.int64), tf.constant(0, tf.int64)
    gate = _in_16_bits(high * power(tf.maximum(left - 1, zero)))
    gate = shift_right(gate * gate_scale, fifteen)
    gate = _in_16_bits(gate * power(tf.minimum(left, 1)))
    gate = divide_by_power(gate, tf.maximum(-gate_exponent, zero))
    gate = (gate + (1 << 15)) // 2
    product = gate * shift_right(high * scale, fifteen)
    product = tf.sign(product) * (tf.abs(product) // (1 << 15))
    return with_gradient_of(_ideal(call), divide_by_power(product, tf.maximum(-scale_exponent, zero)))


def _q0(value: float) -> int:
    return round(value * 2.0**31)


def _product(a: Tensor, b: Tensor | int) -> Tensor:
    """Q(a) times Q(b) is Q(a + b), rounded half up."""
    return shift_right(a * b, tf.constant(31, tf.int64))


def _shift_left(x: Tensor, bits: int) -> Tensor:
    return tf.clip_by_value(x * (1 << bits), -(2**31), _ONE)


def _exp_near_zero(a: Tensor) -> Tensor:
    """exp(a) for a in [-1/4, 0), Q(0) to Q(0): a Taylor series of degree 4 around -1/8."""
    one, two = (tf.constant(k, tf.int64) for k in (1, 2))
    x = a + (1 << 28)
    x2 = _product(x, x)
    x3, x4 = _product(x2, x), _product(x2, x2)
    cubic = _product(divide_by_power(x4, two) + x3, _q0(1 / 3))
    center = _q0(math.exp(-1 / 8))
    return center + _product(x + divide_by_power(cubic + x2, one), center)


def _exp(a: Tensor) -> Tensor:
    """exp(a) for a <= 0, Q(5) to Q(0): quarters by a table of exp(-2^k), the rest by its series."""
    quarter = 1 << 24
    rest = a % quarter - quarter
    result, whole = _exp_near_zero(rest * (1 << 5)), rest - a
    for k in range(-2, 5):
        odd = (whole // (1 << (26 + k))) % 2 == 1
        result = tf.where(odd, _product(result, _q0(math.exp(-(2.0**k)))), result)
    return tf.where(a == 0, tf.constant(_ONE, tf.int64), result)


def _reciprocal_of_one_plus(a: Tensor) -> Tensor:
    """1 / (1 + a) for a in [0, 1], Q(0) to Q(0): three Newton steps for the reciprocal of (1 + a) / 2 in Q(2)."""
    half = (a + _ONE + 1) // 2
    x = _q0(48 / 17 / 4) + _product(half, _q0(-32 / 17 / 4))
    for _ in range(3):
        x = x + _shift_left(_product(x, (1 << 29) - _product(half, x)), 2)
    return _shift_left(x, 1)


def softmax(call: Call) -> Tensor:
    """Softmax on the last axis in fixed point (LiteRT's reference kernel); the grid is that of [0, 1)."""
    x = call.inputs[0]
    mantissa, left = multiplier(tf.minimum(doubles(x.scale)[0] * 2.0**26, 2.0**31 - 1))
    below = integers(x) - tf.reduce_max(integers(x), -1, keepdims=True)
    lowest = -(tf.constant(31 * 2**26, tf.int64) // power(left))  # below it the exponential counts as 0
    exps = _exp(_product(tf.maximum(below, lowest) * power(left), mantissa))
    exps = tf.where(below >= lowest, exps, tf.zeros_like(exps))
    total = tf.reduce_sum(divide_by_power(exps, tf.constant(12, tf.int64)), -1, keepdims=True)  # Q(12)
    headroom = 32 - bit_length(total)
    inverse = _reciprocal_of_one_plus(total * power(headroom) - (1 << 31))
    y = divide_by_power(_product(inverse, exps), 12 - headroom + 31 - 8)
    return with_gradient_of(_ideal(call), tf.where(below >= lowest, y, tf.zeros_like(y)))
