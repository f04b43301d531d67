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

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
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
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    clip: tuple[Any, Any] = (None, None),
    fixed_zero_point: bool = False,
    levels: Sequence[Tensor] = (),
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
        fixed_zero_point: no gradient to `zero_point` is needed.
        levels: the allowed integers less the zero point, where they are not all of qmin to qmax: see `nearest`. Then
            y is scale times the nearest level, "inside" is between the outermost ones, and there is no `clip`.
    """
    if levels:
        return _fake_quant_levels(x, scale, levels)

    @tf.custom_gradient
    def quantized(x: Tensor, scale: Tensor, zero_point: Tensor) -> Any:  # few operations: each costs memory in a graph
        ends = qmin - zero_point, qmax - zero_point
        bounds = [b if b is None or np.any(b) else 0.0 for b in clip]
        at = [None if b is None else tf.round(tf.constant(b, tf.float32) / scale) if np.any(b) else 0.0 for b in bounds]
        low = ends[0] if at[0] is None else tf.maximum(ends[0], at[0])
        high = ends[1] if at[1] is None else tf.minimum(ends[1], at[1])
        rounded = tf.round(x / scale)
        clamped = tf.clip_by_value(rounded, low, high)
        y = clamped * scale

        def gradient(dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            # what lacks dy is computed in the forward pass: a layer keeps `inside` and one tensor of floats
            inside = clamped == rounded
            # scale dy/dscale = y - rest; zero_point has a say where nothing follows x or a bound
            rest, follows = tf.where(inside, x, 0.0), inside
            for bound, level, end, is_low in zip(bounds, at, (low, high), (True, False), strict=True):
                if bound is None or (fixed_zero_point and not np.any(bound)):
                    continue  # a bound of zero, as in ReLU, is no part of dy/dscale
                beyond = rounded < low if is_low else rounded > high
                by_bound = beyond & (end == level)  # unless the grid ends before the bound
                rest, follows = tf.where(by_bound, bound, rest), follows | by_bound
            by_scale = _reduced(dy * (y - rest), scale) / scale
            by_zero_point = None
            if not fixed_zero_point:
                by_zero_point = _reduced(tf.where(follows, 0.0, -dy * scale), zero_point)
            # at once: put off until the layers before have their gradients, it would keep dy of all of them
            with tf.control_dependencies([by_scale]):
                return tf.where(inside, dy, 0.0), by_scale, by_zero_point

        return y, gradient

    return quantized(x, scale, zero_point)


def nearest(steps: Tensor, levels: Sequence[Tensor]) -> Tensor:
    """The nearest of some levels, the lower one of two that are equally near; see `grid.nearest`."""
    found = tf.zeros_like(steps) + levels[0]
    for lower, upper in itertools.pairwise(levels):
        found = tf.where(steps > (lower + upper) / 2, upper, found)
    return found


def _fake_quant_levels(x: Tensor, scale: Tensor, levels: Sequence[Tensor]) -> Tensor:
    """scale * nearest(x / scale, levels), with the gradients of `fake_quant`."""

    @tf.custom_gradient
    def quantized(x: Tensor, scale: Tensor) -> Any:
        steps = x / scale
        y = nearest(steps, levels) * scale
        inside = (steps >= levels[0]) & (steps <= levels[-1])

        def gradient(dy: Tensor) -> tuple[Tensor, Tensor]:
            by_scale = _reduced(dy * (y - tf.where(inside, x, 0.0)), scale) / scale
            return tf.where(inside, dy, 0.0), by_scale

        return y, gradient

    return quantized(x, scale)


def _reduced(dy: Tensor, parameter: Tensor) -> Tensor:
    """The sum of `dy` over the axes along which `parameter` was broadcast."""
    if parameter.shape.rank == 0:
        return tf.reduce_sum(dy)
    missing = dy.shape.rank - parameter.shape.rank
    ones = [missing + k for k, size in enumerate(parameter.shape) if size == 1]
    total = tf.reduce_sum(dy, [*range(missing), *ones])
    return tf.reshape(total, parameter.shape) if ones else total


def relative_scale(base: Tensor, log_scale: Tensor, rate: float, g: Tensor, largest: float) -> Tensor:
    """base * exp(rate * log_scale), the exponent within +-largest; d/dlog_scale = g / scale, also beyond.

    A step of plain gradient descent changes log_scale so that the scale moves as far as it does by a step on the
    scale itself whose gradient is scaled by g (LSQ, section 2.2), to first order, times `rate`. Computed in float64
    and rounded once, to float32.
    """

    @tf.custom_gradient
    def scale(log_scale: Tensor) -> Any:
        exponent = tf.clip_by_value(rate * tf.cast(log_scale, tf.float64), -largest, largest)
        value = tf.cast(tf.cast(base, tf.float64) * tf.exp(exponent), tf.float32)
        return value, lambda dy: dy * (g / value)

    return scale(tf.convert_to_tensor(log_scale))


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
