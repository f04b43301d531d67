"""Quantization operations with their gradients, forward and gradient side by side.

`fake_quant` has the gradients of section 4.1 of the white paper with respect to values, scale and zero point; what
is put in for scale and zero point makes it one of the published methods:

    STE         constants
    LSQ         `scaled_gradient(scale, 1 / sqrt(N Q_p))`                          Esser et al. 2020, arXiv 1902.08153
    LSQ+        LSQ, and a zero point `round_ste(offset)`                          Bhalgat et al. 2020, 2004.09576
    min/max     `grid_of_range(low, high)`                                         white paper, section 4.1
    TQT         `power_of_two(log2_scale)`                                         Jain et al. 2019, 1903.08066

Everything is float32 arithmetic without reductions in the forward direction, so it is the same in eager, graph and
XLA execution.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

Tensor = Any


@tf.custom_gradient
def round_ste(x: Tensor) -> Tensor:
    """round(x), half to even; d/dx = 1 (straight-through estimator, Bengio et al. 2013)."""
    return tf.round(x), lambda dy: dy


def exact(ideal: Tensor, computed: Tensor) -> Tensor:
    """The value of `computed` with the gradient of `ideal`.

    For kernels whose integer arithmetic has no useful gradient: `ideal` is the real-valued function
    and `computed` is what the target computes, within a rounding of it.
    """

    @tf.custom_gradient
    def pick(i: Tensor, c: Tensor) -> Tensor:
        return tf.identity(c), lambda dy: (dy, None)

    return pick(ideal, tf.stop_gradient(computed))


def fake_quant(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, clip: tuple[Any, Any] = (None, None)
) -> Tensor:
    """Quantize to a grid and back: y = scale * (clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point).

    Eq. 4-7 of the white paper, round half to even. With q = round(x / scale) + zero_point, the gradients are

        dy/dx           1 where qmin <= q <= qmax, else 0
        dy/dscale       round(x / scale) - x / scale inside, qmin - zero_point below, qmax - zero_point above
        dy/dzero_point  0 inside, -scale outside

    A fused activation, a clamp of real values, is taken over by the clamp of integers: a bound b counts as
    round(b / scale), and where it is what clamps, dy/dscale is that less b / scale and dy/dzero_point is 0.

    Args:
        x: float32 values.
        scale: positive, of a shape that broadcasts against x: () or e.g. [1, 1, 1, channels].
        zero_point: integer-valued, of the shape of `scale`.
        qmin, qmax: the smallest and largest integer of the grid.
        clip: (lo, hi), each None, a number, or one for every entry of the last axis.
    """
    lo, hi = (None if b is None else tf.constant(b, tf.float32) for b in clip)

    def edges(scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        low, high = qmin - zero_point, qmax - zero_point
        low = low if lo is None else tf.maximum(low, tf.round(lo / scale))
        return low, high if hi is None else tf.minimum(high, tf.round(hi / scale))

    @tf.custom_gradient
    def quantized(x: Tensor, scale: Tensor, zero_point: Tensor) -> Any:
        y = tf.clip_by_value(tf.round(x / scale), *edges(scale, zero_point)) * scale

        def gradient(dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            ratio = x / scale
            low, high = edges(scale, zero_point)
            inside = tf.clip_by_value(ratio, low - 0.5, high + 0.5) == ratio
            dx = tf.where(inside, dy, 0.0)
            by_scale = dy * y - dx * x  # times scale
            by_zero_point = (dx - dy) * scale
            for bound, edge, beyond in ((lo, low, ratio < low), (hi, high, ratio > high)):
                if bound is not None:  # the activation clamps, unless the grid ends before its bound
                    by_bound = beyond & ~inside & (edge == tf.round(bound / scale))
                    by_scale -= tf.where(by_bound, dy * bound, 0.0)
                    by_zero_point = tf.where(by_bound, 0.0, by_zero_point)
            return dx, _reduced(by_scale, scale) / scale, _reduced(by_zero_point, zero_point)

        return y, gradient

    return quantized(x, scale, zero_point)


def _reduced(dy: Tensor, parameter: Tensor) -> Tensor:
    """The sum of `dy` over the axes along which `parameter` was broadcast."""
    missing = dy.shape.rank - parameter.shape.rank
    ones = [missing + k for k, size in enumerate(parameter.shape) if size == 1]
    return tf.reshape(tf.reduce_sum(dy, [*range(missing), *ones]), parameter.shape)


def scaled_gradient(x: Tensor, factor: float | Tensor) -> Tensor:
    """x; its gradient is multiplied by `factor` (LSQ's g = 1 / sqrt(N Q_p), section 2.2)."""

    @tf.custom_gradient
    def identity(x: Tensor) -> Any:
        return tf.identity(x), lambda dy: dy * factor

    return identity(x)


def power_of_two(log2_scale: Tensor) -> Tensor:
    """2^ceil(log2_scale), within the normal float32 numbers; d/dlog2_scale = scale ln 2, straight through the ceil.

    TQT, eq. 7.
    """

    @tf.custom_gradient
    def power(exponent: Tensor) -> Any:
        whole = tf.cast(tf.clip_by_value(tf.math.ceil(exponent), -126.0, 127.0), tf.int32)
        scale = tf.cast(tf.bitcast(tf.bitwise.left_shift(whole + 127, 23), tf.float32), exponent.dtype)
        return scale, lambda dy: dy * scale * 0.6931471805599453

    return power(log2_scale)


def grid_of_range(low: Tensor, high: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the range [low, high], low <= 0 <= high (white paper, eq. 7 and section 4.1).

    scale = (high - low) / (qmax - qmin), zero_point = clamp(round(qmin - low / scale)); gradients by the chain rule
    through both, straight through the round.
    """
    scale = (high - low) / float(qmax - qmin)
    zero_point = round_ste(qmin - low / scale)
    return scale, tf.clip_by_value(zero_point, float(qmin), float(qmax))


def checked_loss(loss: Tensor, message: str) -> Tensor:
    """The loss; no gradient of it is computed, and so no variable changed, where it is NaN or infinite.

    Raises:
        tf.errors.InvalidArgumentError: in the backward pass, with `message` (not under XLA, which cannot).
    """

    @tf.custom_gradient
    def identity(x: Tensor) -> Any:
        def gradient(dy: Tensor) -> Tensor:
            with tf.control_dependencies([tf.debugging.assert_all_finite(x, message)]):
                return tf.identity(dy)

        return tf.identity(x), gradient

    return identity(loss)
