"""What the optimized kernels, which run without delegates, compute differently from the reference kernels.

They round the right shift halves up, fold zero points into biases, and take the softmax in float32. They stand in for
the reference kernels in files with an operator version that those lack (DEPTHWISE_CONV_2D with int4 weights). Not
covered: LOGISTIC and TANH of int16 at a power-of-two scale, FULLY_CONNECTED of int16 without a bias and with one weight
scale, and the last bit of DEQUANTIZE.
"""

from __future__ import annotations

import numpy as np

from kquant.targets.litert.arithmetic import (
    Multiplier,
    multiply_double_rounding,
    multiply_double_rounding_up,
    quantize_multiplier,
    saturate,
)
from kquant.targets.litert.arithmetic import multiply_single_rounding as single
from kquant.targets.litert.reader import Operator
from kquant.targets.litert.reference import elementwise, linear
from kquant.targets.litert.reference import softmax as reference_softmax
from kquant.targets.litert.reference.elementwise import axes_of, requantize
from kquant.targets.litert.reference.linear import Values

_F = np.float32


def conv_2d(op: Operator, x: Values) -> np.ndarray:
    """CONV_2D: halves up, but for grouped convolutions."""
    grouped = np.asarray(x[0]).shape[-1] != np.asarray(x[1]).shape[-1]
    return linear.conv_2d(op, x, multiply_double_rounding if grouped else multiply_double_rounding_up)


def depthwise_conv_2d(op: Operator, x: Values) -> np.ndarray:
    """Whole blocks of 8 channels are vectorized and round halves up, the rest rounds them away from zero."""
    channels = op.outputs[0].shape[-1]
    blocked = np.arange(channels) < channels - channels % 8

    def multiply(acc: np.ndarray, by: Multiplier) -> np.ndarray:
        return np.where(blocked, multiply_double_rounding_up(acc, by), multiply_double_rounding(acc, by))

    return linear.depthwise_conv_2d(op, x, multiply)


def fully_connected(op: Operator, x: Values) -> np.ndarray:
    """FULLY_CONNECTED: halves up, but for int16 data with a bias."""
    wide_with_bias = op.outputs[0].dtype == np.int16 and len(x) > 2 and x[2] is not None
    return linear.fully_connected(op, x, single if wide_with_bias else multiply_double_rounding_up)


def mean(op: Operator, x: Values) -> np.ndarray:
    """Over height and width of 8-bit images the zero points and 1 / count go into a bias and a float32 factor."""
    source, out, value = op.given(0), op.outputs[0], np.asarray(x[0])
    spatial = value.ndim == 4 and axes_of(x[1], 4) == (1, 2) and op.option("keepDims", False)
    if not spatial or out.dtype == np.int16:
        return elementwise.mean(op, x)
    shift = _F(_F(source.z) * source.s) / out.s
    bias = out.z - int(shift + _F(0.5 if shift > 0 else -0.5))
    by = quantize_multiplier(source.s / (_F(value.shape[1] * value.shape[2]) * out.s))
    total = value.astype(np.int64).sum(axis=(1, 2), keepdims=True)
    return saturate(multiply_double_rounding_up(total, by) + bias, out.dtype)


def quantize(op: Operator, x: Values) -> np.ndarray:
    """QUANTIZE: a reciprocal and halves to even from float; between 8-bit grids halves up in whole blocks of 16."""
    value, out = np.asarray(x[0]), op.outputs[0]
    if np.issubdtype(value.dtype, np.integer):
        if value.dtype.itemsize != 1 or out.dtype.itemsize != 1:
            return requantize(op, value, multiply_double_rounding)
        flat = value.reshape(-1)  # whole blocks of 16 are vectorized and round halves up
        blocked = np.arange(flat.size) < flat.size - flat.size % 16
        up, away = (requantize(op, flat, m) for m in (multiply_double_rounding_up, multiply_double_rounding))
        return np.where(blocked, up, away).reshape(value.shape)
    ratio = np.rint(value.astype(_F) * (_F(1) / out.s))
    return saturate(np.clip(ratio, -(2.0**30), 2.0**30).astype(np.int64) + out.z, out.dtype)


def softmax(op: Operator, x: Values) -> np.ndarray:
    """Softmax with a table of exp(-s beta d) in float32, summed in order in float32."""
    if op.given(0).dtype == np.int16:
        return reference_softmax.softmax(op, x)
    source, out, value = op.given(0), op.outputs[0], np.asarray(x[0]).astype(np.int64)
    falling = -(source.s * _F(op.option("beta", 1.0)))
    table = np.exp((falling * np.arange(256).astype(_F)).astype(np.float64)).astype(_F)
    exps = table[value.max(axis=-1, keepdims=True) - value]
    total = np.cumsum(exps, axis=-1, dtype=_F)[..., -1:]  # cumsum adds in order, sum adds in pairs
    y = np.floor(exps * (_F(1) / (total * out.s)) + _F(0.5)).astype(np.int64)
    return saturate(y + out.z, out.dtype)
