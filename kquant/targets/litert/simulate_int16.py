"""What LiteRT's int16 kernels compute, as functions of integer-valued tensors (see `simulate`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.graph.ir import Node
from kquant.graph.ops import compute
from kquant.grids.gradients import exact
from kquant.targets.litert.fixed_point import bit_length, multiplier, scale_twice, shift_right
from kquant.targets.litert.tables import EXP, RECIPROCAL, SIGMOID
from kquant.targets.operand import Operand

Tensor = Any


def _double(*scales: Tensor) -> tuple[Tensor, ...]:
    return tuple(tf.stop_gradient(tf.cast(s, tf.float64)) for s in scales)


def _integers(x: Operand) -> Tensor:
    return tf.cast(x.centered, tf.int64)


def _scaled(x: Tensor, ratio: Tensor) -> Tensor:
    return scale_twice(x, *multiplier(ratio))


def _result(ideal: Tensor, integers: Tensor) -> Tensor:
    return exact(ideal, tf.cast(integers, tf.float32))


def _sum(node: Node, x: Sequence[Operand], out: Operand) -> Tensor:
    """Both operands are brought to twice the larger scale with 15 more bits, and their sum to the output's."""
    sign = 1 if node.op == "add" else -1
    s_a, s_b, s_o = _double(x[0].scale, x[1].scale, out.scale)
    twice = 2.0 * tf.maximum(s_a, s_b)
    a, b = (_scaled(_integers(o) * (1 << 15), s / twice) for o, s in zip(x, (s_a, s_b), strict=True))
    total = _scaled(a + sign * b, twice / (float(1 << 15) * s_o))
    return _result((x[0].value + float(sign) * x[1].value) / out.scale, total)


def _mul(node: Node, x: Sequence[Operand], out: Operand) -> Tensor:
    (ratio,) = _double(x[0].scale * x[1].scale / out.scale)
    return _result(x[0].value * x[1].value / out.scale, _scaled(_integers(x[0]) * _integers(x[1]), ratio))


def _mean(node: Node, x: Sequence[Operand], out: Operand) -> Tensor:
    """The sum times (s_x / s_o) / N, N divided into the multiplier."""
    axes, keepdims = node.attrs["axes"], node.attrs["keepdims"]
    count = int(np.prod([x[0].centered.shape[a] for a in axes]))
    s_x, s_o = _double(x[0].scale, out.scale)
    mantissa, exponent = multiplier(s_x / s_o)
    shift = tf.minimum(tf.constant(min(count.bit_length() - 1, 32), tf.int64), 31 + exponent)
    mantissa = tf.bitwise.left_shift(mantissa, shift) // count
    total = scale_twice(tf.reduce_sum(_integers(x[0]), axes, keepdims), mantissa, exponent - shift)
    return _result(compute(node, [x[0].value]) / out.scale, total)


def requantize(node: Node, x: Sequence[Operand], out: Operand) -> Tensor:
    s_x, s_o = _double(x[0].scale, out.scale)
    return _result(x[0].value / out.scale, _scaled(_integers(x[0]), s_x / s_o))


def _clip(node: Node, x: Sequence[Operand], out: Operand) -> Tensor:
    return relu(node, x, out) if node.attrs["lo"] == 0 else requantize(node, x, out)


def relu(node: Node, x: Sequence[Operand], out: Operand) -> Tensor:
    """A change of grid with the scales divided in float32; the clamps follow."""
    (ratio,) = _double(x[0].scale / out.scale)
    return _result(x[0].value / out.scale, _scaled(_integers(x[0]), ratio))


def _leaky_relu(node: Node, x: Sequence[Operand], out: Operand) -> Tensor:
    above, below = _double(x[0].scale / out.scale, x[0].scale * np.float32(node.attrs["alpha"]) / out.scale)
    q = _integers(x[0])
    integers = tf.where(q >= 0, _scaled(q, above), _scaled(q, below))
    return _result(compute(node, [x[0].value]) / out.scale, integers)


def average(node: Node, x: Sequence[Operand], out: Operand) -> Tensor:
    """Average of the stored integers (zero point included), rounded half away from zero."""
    size, strides, padding = node.attrs["pool_size"], node.attrs["strides"], node.attrs["padding"].upper()
    ones = tf.ones((1, *x[0].centered.shape[1:3], 1))
    count = tf.nn.convolution(ones, tf.ones((*size, 1, 1)), strides=strides, padding=padding)
    mean = tf.nn.avg_pool2d(x[0].centered + x[0].zero_point, size, strides, padding)
    # in integers, since TensorFlow's graph optimizer makes a division by a constant a product with its reciprocal
    total, n = tf.cast(tf.round(mean * count), tf.int32), tf.cast(count, tf.int32)
    rounded = tf.sign(total) * ((tf.abs(total) + n // 2) // n)
    return exact(mean - x[0].zero_point, tf.cast(rounded, tf.float32) - x[0].zero_point)


def _resize(node: Node, x: Sequence[Operand], out: Operand) -> Tensor:
    """Nearest neighbour moves integers; bilinear weights have 10 bits, rounded half away from zero."""
    ideal = compute(node, [x[0].centered])
    if node.attrs["method"] == "nearest":
        return ideal
    total, half_pixel = _integers(x[0]), node.attrs["half_pixel_centers"]
    for axis, size in zip((1, 2), node.attrs["size"], strict=True):
        n = x[0].centered.shape[axis]
        scale = ((n << 10) + size // 2) // size
        positions = np.arange(size) * scale + ((scale // 2) - (1 << 9) if half_pixel else 0)
        low = np.maximum(positions >> 10, 0)
        high = np.minimum((positions + 1023) >> 10, n - 1)
        shape = [-1 if k == axis else 1 for k in range(4)]
        weight = (positions - (low << 10)).reshape(shape)
        total = tf.gather(total, low, axis=axis) * (1024 - weight) + tf.gather(total, high, axis=axis) * weight
    rounded = tf.sign(total) * shift_right(tf.abs(total), tf.constant(20, tf.int64))
    return _result(ideal, rounded)


def _softmax(node: Node, x: Sequence[Operand], out: Operand) -> Tensor:
    """Interpolated tables of exp and 1 / (1 + v), up to 9 LSB from the real function."""
    q, (s_x,) = _integers(x[0]), _double(x[0].scale)
    below = _scaled(q - tf.reduce_max(q, -1, keepdims=True), s_x / (10.0 / 65535.0))
    exps = _lookup(EXP, tf.clip_by_value(below + 32767, -32768, 32767))
    total = tf.reduce_sum(exps, -1, keepdims=True)
    headroom = 32 - bit_length(total)
    shifted = shift_right(tf.bitwise.left_shift(total, headroom - 1), tf.constant(14, tf.int64))
    reciprocal = _lookup(RECIPROCAL, tf.clip_by_value(shifted - (1 << 15) - (1 << 16), -32768, 32767))
    y = shift_right(exps * reciprocal, 31 - headroom)
    return _result(compute(node, [x[0].value]) / out.scale, tf.clip_by_value(y, 0, 32767))


def _lookup(table: np.ndarray, q: Tensor) -> Tensor:
    """Linear interpolation in a 513-entry table at int16 positions."""
    values, index = tf.constant(table), 256 + q // 128
    low, high = tf.gather(values, index), tf.gather(values, index + 1)
    return low + ((high - low) * (q % 128) + 64) // 128


def _sigmoid(x: Operand, bits: int, top: int) -> tuple[Tensor, Tensor]:
    """(position, sigmoid of its magnitude) from a table of sigmoid(i / 24), `bits` fractional bits between entries."""
    (factor,) = _double(x.scale * 4096.0 * 3.0)
    exponent = tf.bitwise.right_shift(tf.bitcast(factor, tf.int64), tf.constant(52, tf.int64)) - 1023
    shift = tf.clip_by_value(14 - exponent, 0, 31)
    unit = tf.bitwise.left_shift(tf.ones_like(shift), shift)
    by = tf.cast(factor * tf.cast(unit, tf.float64), tf.int64)
    q = shift_right(_integers(x) * by, shift)
    magnitude = tf.abs(q)
    index = tf.minimum(magnitude // (1 << bits), 254)
    low, high = tf.gather(tf.constant(SIGMOID), index), tf.gather(tf.constant(SIGMOID), index + 1)
    inside = low * (1 << bits) + (magnitude % (1 << bits)) * (high - low)
    return q, tf.where(magnitude // (1 << bits) >= 255, tf.constant(top, tf.int64), inside)


def _logistic(node: Node, x: Sequence[Operand], out: Operand) -> Tensor:
    q, y = _sigmoid(x[0], 9, 0x7FFF << 10)
    integers = tf.where(q >= 0, y + (1 << 9), (1 << 25) - y + (1 << 9) - 1) // (1 << 10)
    return _result(compute(node, [x[0].value]) / out.scale, integers)


def _tanh(node: Node, x: Sequence[Operand], out: Operand) -> Tensor:
    """tanh(x) = 2 sigmoid(2 x) - 1."""
    q, y = _sigmoid(x[0], 8, 0xFFFF << 8)
    integers = tf.where(q >= 0, y - (1 << 23) + (1 << 7), -y + (1 << 23) + (1 << 7) - 1) // (1 << 8)
    return _result(compute(node, [x[0].value]) / out.scale, integers)


SIMULATE_16: dict[str, Callable[[Node, Sequence[Operand], Operand], Tensor]] = {
    "add": _sum,
    "sub": _sum,
    "mul": _mul,
    "mean": _mean,
    "requantize": requantize,
    "clip": _clip,
    "leaky_relu": _leaky_relu,
    "avg_pool2d": average,
    "resize": _resize,
    "softmax": _softmax,
    "logistic": _logistic,
    "tanh": _tanh,
}
