"""Requantization, accumulator * multiplier, as the different kernels of the target round it.

On tensors, for the simulation; `arithmetic.py` holds the same formulas on numpy arrays, for the
reference. Accumulators are integer-valued float32; products of 31-bit multipliers need int64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from kquant.grids.gradients import exact, round_ste
from kquant.targets.operand import Operand

Tensor = Any
Requantize = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (acc, s_x, s_w, s_y) -> integers


def doubles(*scales: Tensor) -> tuple[Tensor, ...]:
    """Scales in float64, without a gradient."""
    return tuple(tf.stop_gradient(tf.cast(s, tf.float64)) for s in scales)


def integers(x: Operand) -> Tensor:
    """The integers of an operand, int64."""
    return tf.cast(x.centered, tf.int64)


def scaled(x: Tensor, ratio: Tensor) -> Tensor:
    """x * ratio for int64 and a float64 factor: `scale_twice` with the factor's multiplier."""
    y = _scaled_by(x, ratio)
    y.set_shape(tf.broadcast_static_shape(x.shape, ratio.shape))
    return y


@tf.function(autograph=False, input_signature=[tf.TensorSpec(None, tf.int64), tf.TensorSpec(None, tf.float64)])
def _scaled_by(x: Tensor, ratio: Tensor) -> Tensor:
    return scale_twice(x, *multiplier(ratio))


def with_gradient_of(ideal: Tensor, result: Tensor) -> Tensor:
    """Integers (int64) as float32, with the gradient of the real function."""
    return exact(ideal, tf.cast(result, tf.float32))


def in_float32(acc: Tensor, s_x: Tensor, s_w: Tensor, s_y: Tensor) -> Tensor:
    """round(acc * (s_x s_w / s_y)) in float32, half to even: XNNPACK."""
    return round_ste(acc * (s_x * s_w / s_y))


def double_rounding(half_away: bool | Tensor) -> Requantize:
    """Rounded at 31 fractional bits and again at the right shift, halves away from zero or up: LiteRT's own kernels."""
    return lambda acc, s_x, s_w, s_y: _scaled(
        acc, s_x, s_w, s_y, lambda a, mantissa, exponent: scale_twice(a, mantissa, exponent, half_away)
    )


def single_rounding(acc: Tensor, s_x: Tensor, s_w: Tensor, s_y: Tensor) -> Tensor:
    """One rounding, halves away from zero: fully connected layers with int16 activations."""

    def scale(a: Tensor, mantissa: Tensor, exponent: Tensor) -> Tensor:
        return tf.sign(a) * shift_right(tf.abs(a) * mantissa, 31 - exponent)

    return _scaled(acc, s_x, s_w, s_y, scale)


def reduced(acc: Tensor, s_x: Tensor, s_w: Tensor, s_y: Tensor) -> Tensor:
    """One rounding with a multiplier of 16 bits: convolutions with int16 activations."""

    def scale(a: Tensor, mantissa: Tensor, exponent: Tensor) -> Tensor:
        short = tf.where(mantissa >= 0x7FFF0000, tf.constant(0x7FFF, tf.int64), (mantissa + (1 << 15)) // (1 << 16))
        return shift_right(a * short, 15 - exponent)

    return _scaled(acc, s_x, s_w, s_y, scale)


def _scaled(acc: Tensor, s_x: Tensor, s_w: Tensor, s_y: Tensor, scale: Callable[..., Tensor]) -> Tensor:
    """What `scale(acc, mantissa, exponent)` makes of the accumulator, with the gradient of the real product."""
    s_x, s_w, s_y = (tf.cast(s, tf.float64) for s in (s_x, s_w, s_y))
    real = s_x * s_w / s_y
    ideal = tf.cast(acc, tf.float32) * tf.cast(real, tf.float32)
    return exact(ideal, tf.cast(scale(tf.cast(acc, tf.int64), *multiplier(tf.stop_gradient(real))), tf.float32))


def scale_twice(x: Tensor, mantissa: Tensor, exponent: Tensor, half_away: bool | Tensor = True) -> Tensor:
    """x * mantissa * 2^(exponent - 31), rounded halves up at 31 fractional bits, and again at the right shift.

    Where `half_away` is true the second rounding takes halves away from zero, elsewhere up.
    """
    high = shift_right((x * power(tf.maximum(exponent, 0))) * mantissa, tf.constant(31, tf.int64))
    right = tf.maximum(-exponent, 0)
    away = divide_by_power(high, right)
    return away if half_away is True else tf.where(half_away, away, shift_right(high, right))


def multiplier(real: Tensor) -> tuple[Tensor, Tensor]:
    """A float64 factor as mantissa * 2^(exponent - 31), the mantissa of 31 bits rounded half up; 0 below 2^-32."""
    bits = tf.bitcast(real, tf.int64)
    exponent = tf.bitwise.right_shift(bits, tf.constant(52, tf.int64)) - 1022
    fraction = tf.bitcast(tf.bitwise.bitwise_or(bits & ((1 << 52) - 1), tf.constant(1022 << 52, tf.int64)), tf.float64)
    mantissa = tf.cast(tf.floor(fraction * 2.0**31 + 0.5), tf.int64)
    carried = mantissa >= (1 << 31)
    mantissa, exponent = tf.where(carried, mantissa // 2, mantissa), exponent + tf.cast(carried, tf.int64)
    vanishes = exponent < -31
    return tf.where(vanishes, tf.zeros_like(mantissa), mantissa), tf.where(vanishes, tf.zeros_like(exponent), exponent)


def power(exponent: Tensor) -> Tensor:
    """2^exponent for an int64 exponent >= 0."""
    return tf.bitwise.left_shift(tf.ones_like(exponent), exponent)


def shift_right(x: Tensor, shift: Tensor) -> Tensor:
    """x / 2^shift, rounded half up."""
    half = power(shift) // 2
    x = x + half
    return tf.bitwise.right_shift(x, tf.broadcast_to(shift, tf.shape(x)))


def divide_by_power(x: Tensor, shift: Tensor) -> Tensor:
    """x / 2^shift, rounded half away from zero."""
    return tf.sign(x) * shift_right(tf.abs(x), shift)


def bit_length(x: Tensor) -> Tensor:
    """Bits of a positive int64."""
    return tf.bitwise.right_shift(tf.bitcast(tf.cast(x, tf.float64), tf.int64), tf.constant(52, tf.int64)) - 1022
