"""Convolutions and fully connected layers as the TFLite reference kernels compute them.

Accumulators are exact: a matrix product runs in float32 while every sum of |x| |w| stays below 2^24 and in float64
below 2^53, so that the order of its additions cannot matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kquant.errors import ExportError
from kquant.targets.litert.arithmetic import (
    Multiplier,
    activation_range,
    multiply_double_rounding,
    multiply_reduced,
    multiply_single_rounding,
    quantize_multiplier,
)
from kquant.targets.litert.reader import Operator

Values = Sequence[np.ndarray | None]
Compute = Callable[[Operator, Values], np.ndarray | tuple[np.ndarray, ...]]
Multiply = Callable[[np.ndarray, Multiplier], np.ndarray]


def _value(op: Operator, x: Values, position: int) -> np.ndarray:
    value = x[position] if position < len(x) else None
    if value is None:
        raise ExportError(f"{op}: input {position} is absent; write the file again")
    return value


def window(size: int, filter_size: int, stride: int, dilation: int, padding: int) -> tuple[int, int, int]:
    """Output length, and zeros before and after, of a sliding window; padding 0 is SAME, 1 is VALID."""
    effective = (filter_size - 1) * dilation + 1
    if padding == 1:
        return max((size - effective) // stride + 1, 0), 0, 0
    out = -(-size // stride)
    total = max((out - 1) * stride + effective - size, 0)
    return out, total // 2, total - total // 2


def _exact_dtype(x: np.ndarray, w: np.ndarray, terms: int) -> type[np.floating]:
    """The narrowest float type in which a sum of `terms` products of the integers is exact."""
    bound = max(int(np.abs(x).max(initial=0)), 1) * max(int(np.abs(w).max(initial=0)), 1) * terms
    return np.float32 if bound < 1 << 24 else np.float64


def _padded(x: np.ndarray, rows: tuple[int, int, int], columns: tuple[int, int, int]) -> np.ndarray:
    return np.pad(x, ((0, 0), rows[1:], columns[1:], (0, 0)))


def _taps(op: Operator, x: np.ndarray, kh: int, kw: int) -> tuple[list[tuple[int, int, np.ndarray]], tuple[int, int]]:
    """The strided view of the padded input behind each filter element: (row, column, view), and the output size."""
    sh, sw = op.option("strideH", 1), op.option("strideW", 1)
    dh, dw = op.option("dilationHFactor", 1), op.option("dilationWFactor", 1)
    rows = window(x.shape[1], kh, sh, dh, op.option("padding"))
    columns = window(x.shape[2], kw, sw, dw, op.option("padding"))
    x = _padded(x, rows, columns)
    views = [
        (i, j, x[:, i * dh : i * dh + (rows[0] - 1) * sh + 1 : sh, j * dw : j * dw + (columns[0] - 1) * sw + 1 : sw])
        for i in range(kh)
        for j in range(kw)
    ]
    return views, (rows[0], columns[0])


def _effective(op: Operator, data: int, filters: int) -> Multiplier:
    """s_x * s_w / s_y per output channel, in float64."""
    scales = op.given(filters).scale.astype(np.float64)
    return quantize_multiplier(np.float64(op.given(data).s) * scales / np.float64(op.outputs[0].s))


def _biased(op: Operator, total: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    if bias is None:
        return total
    if op.outputs[0].dtype == np.int16 and bias.dtype != np.int64:
        raise ExportError(f"{op}: kernels of int16 data misread a {bias.dtype} bias; write it as int64")
    return total + bias


def _clamped(op: Operator, y: np.ndarray) -> np.ndarray:
    out = op.outputs[0]
    low, high = activation_range(op.option("fusedActivationFunction"), out.s, out.z, out.dtype)
    return np.clip(y + out.z, low, high).astype(out.dtype)


def _finish(
    op: Operator,
    accumulator: np.ndarray,
    bias: np.ndarray | None,
    by: Multiplier,
    multiply: Multiply = multiply_double_rounding,
) -> np.ndarray:
    """Bias, scale, zero point and activation of a convolution; int16 data has its own scaling."""
    total = _biased(op, accumulator.astype(np.int64), bias)
    return _clamped(op, (multiply_reduced if op.outputs[0].dtype == np.int16 else multiply)(total, by))


def conv_2d(op: Operator, x: Values, multiply: Multiply = multiply_double_rounding) -> np.ndarray:
    """CONV_2D; x [n, h, w, cin], filter [cout, kh, kw, cin / groups]."""
    data = _value(op, x, 0).astype(np.int32) - op.given(0).z
    w = _value(op, x, 1)
    cout, kh, kw, depth = w.shape
    if data.shape[-1] % depth or cout % (data.shape[-1] // depth):
        raise ExportError(f"{op}: a filter {w.shape} does not fit {data.shape[-1]} input channels")
    groups = data.shape[-1] // depth
    exact = _exact_dtype(data, w, kh * kw * depth)
    views, (height, width) = _taps(op, data.astype(exact), kh, kw)
    n = data.shape[0]
    total = np.zeros((groups, n * height * width, cout // groups), exact)
    kernel = w.astype(exact).reshape(groups, cout // groups, kh, kw, depth)
    for i, j, view in views:
        columns = view.reshape(-1, groups, depth).transpose(1, 0, 2)
        total += columns @ kernel[:, :, i, j].transpose(0, 2, 1)
    accumulator = total.transpose(1, 0, 2).reshape(n, height, width, cout)
    return _finish(op, accumulator, x[2] if len(x) > 2 else None, _effective(op, 0, 1), multiply)


def depthwise_conv_2d(op: Operator, x: Values, multiply: Multiply = multiply_double_rounding) -> np.ndarray:
    """DEPTHWISE_CONV_2D; x [n, h, w, c], filter [1, kh, kw, c * multiplier]."""
    data = _value(op, x, 0).astype(np.int32) - op.given(0).z
    w = _value(op, x, 1)
    _, kh, kw, cout = w.shape
    channels = data.shape[-1]
    if op.outputs[0].dtype == np.int16 and op.given(1).type == "INT4":
        raise ExportError(f"{op}: kernels misread int4 depthwise weights under int16 data; store the weights as int8")
    if cout % channels:
        raise ExportError(f"{op}: {cout} filters do not divide into {channels} input channels")
    exact = _exact_dtype(data, w, kh * kw)
    kernel = w[0].astype(exact).reshape(kh, kw, channels, cout // channels)
    views, (height, width) = _taps(op, data.astype(exact), kh, kw)
    total = np.zeros((data.shape[0], height, width, channels, cout // channels), exact)
    for i, j, view in views:
        total += view[..., None] * kernel[i, j]
    accumulator = total.reshape(data.shape[0], height, width, cout)
    return _finish(op, accumulator, x[2] if len(x) > 2 else None, _effective(op, 0, 1), multiply)


def transpose_conv(op: Operator, x: Values) -> np.ndarray:
    """TRANSPOSE_CONV; inputs output_shape [4], filter [cout, kh, kw, cin], x [n, h, w, cin], optional bias."""
    w, data = _value(op, x, 1), _value(op, x, 2).astype(np.int32) - op.given(2).z
    _, height, width, _ = (int(d) for d in _value(op, x, 0))
    n, h, v, depth = data.shape
    cout, kh, kw, _ = w.shape
    sh, sw = op.option("strideH", 1), op.option("strideW", 1)
    top = window(height, kh, sh, 1, op.option("padding"))[1]
    left = window(width, kw, sw, 1, op.option("padding"))[1]
    exact = _exact_dtype(data, w, kh * kw * depth)
    flat, kernel = data.astype(exact).reshape(-1, depth), w.astype(exact)
    total = np.zeros((n, max((h - 1) * sh + kh, top + height), max((v - 1) * sw + kw, left + width), cout), exact)
    for i in range(kh):
        for j in range(kw):
            product = (flat @ kernel[:, i, j].T).reshape(n, h, v, cout)
            total[:, i : i + (h - 1) * sh + 1 : sh, j : j + (v - 1) * sw + 1 : sw] += product
    accumulator = total[:, top : top + height, left : left + width]
    return _finish(op, accumulator, x[3] if len(x) > 3 else None, _effective(op, 2, 1))


def fully_connected(op: Operator, x: Values, multiply: Multiply = multiply_single_rounding) -> np.ndarray:
    """FULLY_CONNECTED; x [..., cin], filter [cout, cin]."""
    if op.option("weightsFormat"):
        raise ExportError(f"{op}: shuffled weights are not supported; convert without that option")
    w = _value(op, x, 1).astype(np.int32) - op.given(1).z
    data = _value(op, x, 0)
    shape = (*data.shape[:-1], w.shape[0]) if op.option("keepNumDims", False) else (-1, w.shape[0])
    data = data.astype(np.int32).reshape(-1, w.shape[1]) - op.given(0).z
    exact = _exact_dtype(data, w, w.shape[1])
    total = (data.astype(exact) @ w.astype(exact).T).astype(np.int64)
    total = _biased(op, total, x[2] if len(x) > 2 else None)
    return _clamped(op, multiply(total, _effective(op, 0, 1))).reshape(shape)
