"""The reciprocal square root, of which normalizations consist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from kquant.graph.ir import Node
from kquant.graph.ops import compute
from kquant.targets.builtin import Builtin, Reference
from kquant.targets.kernel import Arithmetic, Kernel
from kquant.targets.litert.emitter import Emitter, Sink
from kquant.targets.litert.fixed_point import Tensor, integers, multiplier, scale_twice, shift_right, with_gradient_of
from kquant.targets.litert.reference import roots
from kquant.targets.operand import Call


def _ideal(call: Call) -> Tensor:
    """The real function in steps of the output; that of the first step for zero."""
    x = call.inputs[0]
    return compute(call.node, [tf.maximum(x.centered, 1.0) * x.scale]) / call.out.scale


def rsqrt_by_table(table: np.ndarray, dtype: tf.DType = tf.float32) -> Arithmetic:
    """2^20 / sqrt(q) from a table, times 1 / (sqrt(s_x) s_y), that in `dtype`; the largest integer for zero."""

    def arithmetic(call: Call) -> Tensor:
        x, out = call.inputs[0], call.out
        q = tf.cast(tf.maximum(x.centered, 0.0), tf.int32)
        unit = tf.sqrt(tf.cast(x.scale, dtype)) * tf.cast(out.scale, dtype)
        mantissa, exponent = multiplier(1.0 / tf.cast(unit, tf.float64))
        y = scale_twice(tf.gather(tf.constant(table), q), mantissa, exponent - roots.SHIFT)
        largest = tf.cast(2.0 ** (out.bits - 1) - 1.0 - out.zero_point, tf.int64)
        return with_gradient_of(_ideal(call), tf.where(q == 0, largest, y))

    return arithmetic


def _half_away(v: Tensor) -> Tensor:
    whole = tf.sign(v) * tf.floor(tf.abs(v))
    return whole + tf.where(tf.abs(v - whole) >= 0.5, tf.sign(v), 0.0)


def _table_16(s_in: Tensor, s_out: Tensor) -> Tensor:
    """`roots.table_16` on tensors."""
    low, high = s_in * -32768.0, s_in * 32767.0
    step = (high - low) / 512.0
    inverse = 65536.0 / (s_out * 32767.0 - s_out * -32768.0)

    def curve(v: Tensor) -> Tensor:
        # by way of float64, lest the graph optimizer takes the approximate reciprocal root
        root = tf.cast(tf.sqrt(tf.cast(tf.maximum(v, 1e-37), tf.float64)), tf.float32)
        real = tf.cast(1.0 / tf.cast(root, tf.float64), tf.float32)
        return tf.where(v <= 0, 32767.0 * s_out, real)

    i = tf.range(512, dtype=tf.float32)
    start = low + i * step
    ends = _half_away(curve(start) * inverse)
    error = _half_away((curve(low + (i + 1.0) * step) * inverse + ends) / 2.0)
    error -= _half_away(curve(start + step / 2.0) * inverse)
    samples = tf.concat([ends - _half_away(error / 2.0), _half_away(curve(high) * inverse)[None]], 0)
    return tf.cast(tf.clip_by_value(samples, -32768.0, 32767.0), tf.int64)


def _rsqrt_16(call: Call) -> Tensor:
    """Linear interpolation between 513 samples."""
    x, out = call.inputs[0], call.out
    table, q = _table_16(x.scale, out.scale), tf.maximum(integers(x), 0)
    low, high = tf.gather(table, 256 + q // 128), tf.gather(table, 257 + q // 128)
    y = low + shift_right((high - low) * (q % 128), tf.constant(7, tf.int64))
    return with_gradient_of(_ideal(call), y)


def _write_rsqrt(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    e.op("RSQRT", x, [out.tensor])


REFERENCE: Mapping[str, Arithmetic] = {}

KERNELS = (
    Kernel(
        op="rsqrt",
        arithmetic={8: rsqrt_by_table(roots.RECIPROCAL_ROOTS), 16: _rsqrt_16},
        write=_write_rsqrt,
        headroom={16: 1.125},
        operators={"RSQRT": Builtin(versions=(1, 2, 3), reference=Reference(compute=roots.rsqrt))},
    ),
)
