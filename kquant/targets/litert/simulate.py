"""What the target's kernels compute, as functions of integer-valued tensors.

Every function maps operands to the integers q - zero_point of the output, rounded but not clamped.
int8 follows XNNPACK, LiteRT's default kernels on CPUs: products are scaled in float32 and rounded
half to even, additions use 20-bit fixed-point multipliers. int16 follows LiteRT's own kernels
(`simulate_int16`). What has no entry is the real function, rounded: a lookup table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.graph.ir import Node
from kquant.graph.ops import compute
from kquant.grids.gradients import exact, round_ste
from kquant.targets.litert.fixed_point import multiplier, scale_twice
from kquant.targets.litert.simulate_int16 import SIMULATE_16, average, relu, requantize
from kquant.targets.operand import Operand

Tensor = Any


def _pow2(exponent: Tensor) -> Tensor:
    """2 ** exponent for an int32 tensor, exact."""
    return tf.bitcast(tf.bitwise.left_shift(exponent + 127, 23), tf.float32)


def _sum(node: Node, x: Sequence[Operand], out: Operand) -> Tensor:
    """a * (s_a / s_o) +- b * (s_b / s_o) with multipliers of 20 bits, rounded half up (XNNPACK)."""
    sign = 1.0 if node.op == "add" else -1.0
    ideal = (x[0].value + sign * x[1].value) / out.scale
    ratio_a, ratio_b = x[0].scale / out.scale, x[1].scale / out.scale
    exponent = tf.bitwise.right_shift(tf.bitcast(tf.maximum(ratio_a, ratio_b), tf.int32), 23) - 127
    unit = _pow2(20 - exponent)
    m_a, m_b = (tf.cast(tf.round(r * unit), tf.float64) for r in (ratio_a, ratio_b))
    acc = tf.cast(x[0].centered, tf.float64) * m_a + sign * tf.cast(x[1].centered, tf.float64) * m_b
    return exact(ideal, tf.cast(tf.floor(acc / tf.cast(unit, tf.float64) + 0.5), tf.float32))


def _mul(node: Node, x: Sequence[Operand], out: Operand) -> Tensor:
    return round_ste(x[0].centered * x[1].centered * (x[0].scale * x[1].scale / out.scale))


def _mean(node: Node, x: Sequence[Operand], out: Operand) -> Tensor:
    """Integer sum, then one float32 scale s_x / s_o / N; halves to even of the stored integer (XNNPACK)."""
    count = float(np.prod([x[0].centered.shape[a] for a in node.attrs["axes"]]))
    total = tf.reduce_sum(x[0].centered, node.attrs["axes"], node.attrs["keepdims"])
    # float64 for a float32 quotient that does not depend on how the graph optimizer writes the division
    ratio = tf.cast(tf.cast(x[0].scale / out.scale, tf.float64) / count, tf.float32)
    return round_ste(total * ratio + out.zero_point) - out.zero_point


def _requantize(node: Node, x: Sequence[Operand], out: Operand) -> Tensor:
    """A change of grid: between int8 grids with a multiplier of 8 bits, rounded half up (XNNPACK)."""
    if node.attrs["input_bits"] > 8:
        return requantize(node, x, out)
    return _scale_8_bits(x[0].centered, x[0].scale / out.scale)


def _clip(node: Node, x: Sequence[Operand], out: Operand) -> Tensor:
    """RELU is LiteRT's own kernel; other bounds are a change of grid in front of MAXIMUM and MINIMUM."""
    return relu(node, x, out) if node.attrs["lo"] == 0 else _scale_8_bits(x[0].centered, x[0].scale / out.scale)


def _leaky_relu(node: Node, x: Sequence[Operand], out: Operand) -> Tensor:
    """One multiplier for either sign, of 8 bits for int8 (XNNPACK)."""
    centered, ratio, alpha = x[0].centered, x[0].scale / out.scale, np.float32(node.attrs["alpha"])
    return tf.where(centered >= 0, _scale_8_bits(centered, ratio), _scale_8_bits(centered, ratio * alpha))


def prelu(x: Operand, alpha: Operand, out: Operand) -> Tensor:
    """Products of input and slope brought to the output's grid (LiteRT's own kernel)."""
    ratios = (x.scale / out.scale, x.scale * alpha.scale / out.scale)
    by_one, by_slope = (multiplier(tf.stop_gradient(tf.cast(r, tf.float64))) for r in ratios)
    q, slope = tf.cast(x.centered, tf.int64), tf.cast(alpha.centered, tf.int64)
    above, below = scale_twice(q, *by_one), scale_twice(q * slope, *by_slope)
    ideal = tf.where(x.centered >= 0, x.value, x.value * alpha.value) / out.scale
    return exact(ideal, tf.cast(tf.where(q >= 0, above, below), tf.float32))


def _scale_8_bits(centered: Tensor, ratio: Tensor) -> Tensor:
    """(x * round(256 ratio) + 128) >> 8."""
    return exact(centered * ratio, tf.floor((centered * tf.round(256.0 * ratio) + 128.0) / 256.0))


def _resize(node: Node, x: Sequence[Operand], out: Operand) -> Tensor:
    """Nearest neighbour moves integers; bilinear weights have 11 bits, rounded half up (XNNPACK)."""
    ideal = compute(node, [x[0].centered])
    return ideal if node.attrs["method"] == "nearest" else exact(ideal, _interpolate(node, x[0].centered))


def _interpolate(node: Node, x: Tensor) -> Tensor:
    total = tf.cast(x, tf.float64)
    for axis, size in zip((1, 2), node.attrs["size"], strict=True):
        n, positions = np.float32(x.shape[axis]), np.arange(size, dtype=np.float32)
        ratio = n / np.float32(size)
        positions = (
            (positions + np.float32(0.5)) * ratio - np.float32(0.5)
            if node.attrs["half_pixel_centers"]
            else (positions * ratio)
        )
        positions = np.clip(positions, 0, n - 1).astype(np.float32)
        low = positions.astype(np.int64)
        high = np.minimum(low + 1, x.shape[axis] - 1)
        shape = [-1 if k == axis else 1 for k in range(4)]
        weight = np.rint((positions - low.astype(np.float32)) * np.float32(2048)).astype(np.float64).reshape(shape)
        total = tf.gather(total, low, axis=axis) * (2048 - weight) + tf.gather(total, high, axis=axis) * weight
    return tf.cast(tf.floor(total / 2.0**22 + 0.5), tf.float32)


SIMULATE: dict[str, Callable[[Node, Sequence[Operand], Operand], Tensor]] = {
    "add": _sum,
    "sub": _sum,
    "mul": _mul,
    "mean": _mean,
    "requantize": _requantize,
    "clip": _clip,
    "leaky_relu": _leaky_relu,
    "resize": _resize,
    "avg_pool2d": average,
}


def simulate(node: Node, operands: Sequence[Operand], out: Operand, weights: Mapping[str, Tensor]) -> Tensor:
    """Integers q - zero_point of the node's output, before any clamp.

    Args:
        node: an operation that is not linear, without a fused activation.
        operands: its inputs.
        out: the grid of its output.
        weights: its weights as real numbers.
    """
    table = SIMULATE_16 if out.bits > 8 else SIMULATE
    if node.op in table:
        return table[node.op](node, operands, out)
    # the real function of the dequantized operands, rounded: what a lookup table holds
    return round_ste(compute(node, [o.value for o in operands], weights) * (1.0 / out.scale))
