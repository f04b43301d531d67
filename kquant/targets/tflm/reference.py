"""What TensorFlow Lite Micro's reference kernels compute differently from LiteRT's, in numpy, bit for bit.

| operator | LiteRT | TensorFlow Lite Micro |
| --- | --- | --- |
| FULLY_CONNECTED | one rounding | as a convolution: two roundings; a 16-bit mantissa for int16 data |
| MUL, RELU, LEAKY_RELU | the factor in float32 | the factor in float64 (seen in int16 data only) |
| RELU6 | requantizes | clamps on the grid of its input |
| SOFTMAX of int16 | table of 1 / (1 + x) from float64 | from float32 (2 of 513 entries differ by one) |
| RSQRT of int16 | interpolated table of 513 entries | in fixed point, as for int8, but the factor in float64 |

All others are LiteRT's. Found by comparing files of one operator with the interpreter of the package tflite-micro
(0.dev20261023); it has no GELU, no RELU_N1_TO_1 of its own, no int16 RESIZE_BILINEAR, and takes int4 weights in
CONV_2D and DEPTHWISE_CONV_2D of int8 data only.
"""

from __future__ import annotations

import numpy as np

from kquant.targets.litert.arithmetic import (
    Multiplier,
    activation_range,
    multiply_double_rounding,
    multiply_reduced,
    quantize_multiplier,
    round_half_away,
    saturate,
)
from kquant.targets.litert.reader import Operator
from kquant.targets.litert.reference import linear, roots, softmax
from kquant.targets.litert.reference.linear import Values
from kquant.targets.litert.tables import lut_513

_F = np.float32
RECIPROCAL_ROOTS = roots.reciprocal_roots(32767)
RECIPROCAL = lut_513(lambda v: _F(1) / (_F(1) + v), 0.0, 1.0, np.float32)


def fully_connected(op: Operator, x: Values) -> np.ndarray:
    """FULLY_CONNECTED: rounded as a convolution."""
    return linear.fully_connected(
        op, x, multiply_reduced if op.outputs[0].dtype == np.int16 else multiply_double_rounding
    )


def mul(op: Operator, x: Values) -> np.ndarray:
    """MUL: (q_a - z_a)(q_b - z_b) times s_a s_b / s_y."""
    a, b, out = op.given(0), op.given(1), op.outputs[0]
    if out.dtype == np.int32:
        return (np.asarray(x[0]) * np.asarray(x[1])).astype(np.int32)
    product = _offsets(op, x, 0) * _offsets(op, x, 1)
    y = multiply_double_rounding(product, quantize_multiplier(np.float64(a.s) * np.float64(b.s) / np.float64(out.s)))
    low, high = activation_range(op.option("fusedActivationFunction"), out.s, out.z, out.dtype)
    return np.clip(y + out.z, low, high).astype(out.dtype)


def relu(op: Operator, x: Values) -> np.ndarray:
    """RELU: rescale, then clamp at zero."""
    out = op.outputs[0]
    y = multiply_double_rounding(_offsets(op, x, 0), _ratio(op))
    return saturate(np.maximum(y, 0) + out.z, out.dtype)


def relu6(op: Operator, x: Values) -> np.ndarray:
    """RELU6: the integers of the input between those of 0 and 6, whatever the output's grid."""
    source = op.given(0)
    six = source.z + int(round_half_away(_F(6) / source.s))
    return np.clip(np.asarray(x[0]), source.z, min(six, np.iinfo(source.dtype).max)).astype(source.dtype)


def leaky_relu(op: Operator, x: Values) -> np.ndarray:
    """LEAKY_RELU: one multiplier for values >= 0, another for the rest."""
    offsets, out = _offsets(op, x, 0), op.outputs[0]
    above = multiply_double_rounding(offsets, _ratio(op))
    below = multiply_double_rounding(offsets, _ratio(op, float(_F(op.option("alpha", 0.0)))))
    return saturate(np.where(offsets >= 0, above, below) + out.z, out.dtype)


def softmax_(op: Operator, x: Values) -> np.ndarray:
    """SOFTMAX on the last axis."""
    return softmax.softmax_16(op, x, RECIPROCAL) if op.given(0).dtype == np.int16 else softmax.softmax(op, x)


def rsqrt(op: Operator, x: Values) -> np.ndarray:
    """RSQRT in fixed point."""
    if op.given(0).dtype != np.int16:
        return roots.rsqrt(op, x)
    unit = np.sqrt(np.float64(op.given(0).s)) * np.float64(op.outputs[0].s)
    return roots.by_table(op, _offsets(op, x, 0), RECIPROCAL_ROOTS, unit)


def _offsets(op: Operator, x: Values, position: int) -> np.ndarray:
    return np.asarray(x[position]).astype(np.int64) - op.given(position).z


def _ratio(op: Operator, factor: float = 1.0) -> Multiplier:
    """s_x times a factor / s_y."""
    return quantize_multiplier(np.float64(op.given(0).s) * factor / np.float64(op.outputs[0].s))


DIFFERENT = {
    "FULLY_CONNECTED": fully_connected,
    "MUL": mul,
    "RELU": relu,
    "RELU6": relu6,
    "LEAKY_RELU": leaky_relu,
    "SOFTMAX": softmax_,
    "RSQRT": rsqrt,
}
