"""Arithmetic between tensors, requantization, pooling and means as the TFLite reference kernels compute them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kquant.errors import ExportError
from kquant.targets.litert.arithmetic import (
    Multiplier,
    activation_range,
    divide_half_away,
    fold_divisor,
    multiply_double_rounding,
    quantize_multiplier,
    round_half_away,
    saturate,
)
from kquant.targets.litert.reader import Operator, Tensor
from kquant.targets.litert.reference.linear import Compute, Multiply, Values, window


def _activate(op: Operator, y: np.ndarray) -> np.ndarray:
    out = op.outputs[0]
    low, high = activation_range(op.option("fusedActivationFunction"), out.s, out.z, out.dtype)
    return np.clip(y, low, high).astype(out.dtype)


def _centered(tensor: Tensor, value: np.ndarray | None) -> np.ndarray:
    if value is None:
        raise ExportError(f"tensor '{tensor.name}' has no value; feed it")
    return value.astype(np.int64) - tensor.z


def _power_of_two(scale: np.float32) -> bool:
    return bool(np.frexp(scale)[0] == 0.5)


def additive(sign: int) -> Compute:
    def kernel(op: Operator, x: Values) -> np.ndarray:
        """ADD or SUB: both operands on the grid 2 max(s_a, s_b) / 2^shift, then scaled to the output."""
        a, b, out = op.given(0), op.given(1), op.outputs[0]
        if out.dtype == np.int32:
            return (np.asarray(x[0]) + sign * np.asarray(x[1])).astype(np.int32)
        if out.dtype == np.int16 and op.option("potScaleInt16", True) and all(_power_of_two(t.s) for t in (a, b, out)):
            raise ExportError(f"{op}: kernels treat power-of-two scales apart; write the option potScaleInt16 as false")
        shift = 15 if out.dtype == np.int16 else 20
        widest = 2.0 * max(float(a.s), float(b.s))
        terms = []
        for tensor, value in ((a, x[0]), (b, x[1])):
            by = quantize_multiplier(float(tensor.s) / widest)
            terms.append(multiply_double_rounding(_centered(tensor, value) << shift, by))
        by = quantize_multiplier(widest / ((1 << shift) * float(out.s)))
        return _activate(op, multiply_double_rounding(terms[0] + sign * terms[1], by) + out.z)

    return kernel


def mul(op: Operator, x: Values) -> np.ndarray:
    """MUL: the product times s_a s_b / s_y, that factor in float32."""
    a, b, out = op.given(0), op.given(1), op.outputs[0]
    if out.dtype == np.int32:
        return (np.asarray(x[0]) * np.asarray(x[1])).astype(np.int32)
    by = quantize_multiplier(np.float32(a.s * b.s) / out.s)
    return _activate(op, multiply_double_rounding(_centered(a, x[0]) * _centered(b, x[1]), by) + out.z)


def pointwise(function: np.ufunc) -> Compute:
    """A function of the stored integers: MAXIMUM on one grid, comparisons, what makes one truth value of several."""
    return lambda op, x: function(*x)


def select(op: Operator, x: Values) -> np.ndarray:
    """SELECT_V2 of the stored integers."""
    return np.where(np.asarray(x[0]), np.asarray(x[1]), np.asarray(x[2]))


def requantize(op: Operator, value: np.ndarray, multiply: Multiply = multiply_double_rounding) -> np.ndarray:
    """Integers of the input's grid on the output's grid."""
    source, out = op.given(0), op.outputs[0]
    by = quantize_multiplier(np.float64(source.s) / np.float64(out.s))
    return saturate(multiply(_centered(source, value), by) + out.z, out.dtype)


def quantize(op: Operator, x: Values) -> np.ndarray:
    """QUANTIZE: round_half_away(x / s) + z from float, `requantize` from integers."""
    value, out = np.asarray(x[0]), op.outputs[0]
    if np.issubdtype(value.dtype, np.integer):
        return requantize(op, value)
    info = np.iinfo(out.dtype)
    with np.errstate(over="ignore"):
        ratio = value.astype(np.float32) / out.s
    return saturate(round_half_away(np.clip(ratio, -(2.0**30), 2.0**30)).astype(np.int64) + out.z, info.dtype)


def dequantize(op: Operator, x: Values) -> np.ndarray:
    """DEQUANTIZE: s (q - z) in float32; per channel along the tensor's axis; float16 is widened."""
    source, value = op.given(0), np.asarray(x[0])
    if source.scale.size == 0:
        return value.astype(np.float32)
    shape = [1] * value.ndim
    if source.scale.size > 1:
        shape[source.axis] = source.scale.size
    offset = value.astype(np.int64) - source.zero_point.reshape(shape if source.scale.size > 1 else ())
    scale = source.scale.reshape(shape) if source.scale.size > 1 else source.s
    return (offset.astype(np.float32) * scale).astype(np.float32)


def _pool(op: Operator, value: np.ndarray, fill: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The strided view of the padded input behind each place in the window, and how many places lie inside."""
    kh, kw, sh, sw = (op.option(k, 1) for k in ("filterHeight", "filterWidth", "strideH", "strideW"))
    rows = window(value.shape[1], kh, sh, 1, op.option("padding"))
    columns = window(value.shape[2], kw, sw, 1, op.option("padding"))

    def views(array: np.ndarray, filler: int) -> list[np.ndarray]:
        array = np.pad(array, ((0, 0), rows[1:], columns[1:], (0, 0)), constant_values=filler)
        return [
            array[:, i : i + (rows[0] - 1) * sh + 1 : sh, j : j + (columns[0] - 1) * sw + 1 : sw]
            for i in range(kh)
            for j in range(kw)
        ]

    inside = np.ones((1, *value.shape[1:3], 1), np.int64)
    return views(value, fill), sum(views(inside, 0), np.zeros((), np.int64))


def average_pool_2d(op: Operator, x: Values) -> np.ndarray:
    """AVERAGE_POOL_2D: the integer mean of the places inside the image, halves away from zero."""
    views, count = _pool(op, np.asarray(x[0]).astype(np.int64), 0)
    return _activate(op, divide_half_away(sum(views[1:], views[0]), count))


def max_pool_2d(op: Operator, x: Values) -> np.ndarray:
    """MAX_POOL_2D of the stored integers."""
    value = np.asarray(x[0])
    views, _ = _pool(op, value, int(np.iinfo(value.dtype).min))
    return _activate(op, np.maximum.reduce(views))


def axes_of(axis: np.ndarray | None, rank: int) -> tuple[int, ...]:
    """The distinct axes a reduction names, counted from the front."""
    return tuple(sorted({int(a) % rank for a in np.asarray(axis).reshape(-1)}))


def _same_grid(a: Tensor, b: Tensor) -> bool:
    return a.s == b.s and a.z == b.z


def mean(op: Operator, x: Values) -> np.ndarray:
    """MEAN: the sum of q - z times (s_x / s_y) / count, count folded into the multiplier."""
    source, out, value = op.given(0), op.outputs[0], np.asarray(x[0])
    axes, keep = axes_of(x[1], value.ndim), bool(op.option("keepDims", False))
    count = int(np.prod([value.shape[a] for a in axes], dtype=np.int64))
    by: Multiplier = fold_divisor(quantize_multiplier(np.float64(source.s) / np.float64(out.s)), count)
    total = _centered(source, value).sum(axis=axes, keepdims=keep)
    return saturate(multiply_double_rounding(total, by) + out.z, out.dtype)


def place(function: Callable[..., np.ndarray]) -> Compute:
    """ARG_MAX or ARG_MIN: the first place of the extreme."""
    return lambda op, x: function(np.asarray(x[0]), axis=int(np.asarray(x[1]).reshape(()))).astype(np.int32)


def top_k(op: Operator, x: Values) -> tuple[np.ndarray, np.ndarray]:
    """TOPK_V2: the largest of the last axis and their places; of equal ones the first comes first."""
    value, k = np.asarray(x[0]), int(np.asarray(x[1]).reshape(()))
    places = np.argsort(-value.astype(np.float64), axis=-1, kind="stable")[..., :k]
    return np.take_along_axis(value, places, -1), places.astype(np.int32)


def reduce_extremum(function: np.ufunc) -> Compute:
    """REDUCE_MAX or REDUCE_MIN of the stored integers."""

    def kernel(op: Operator, x: Values) -> np.ndarray:
        value = np.asarray(x[0])
        return function.reduce(value, axis=axes_of(x[1], value.ndim), keepdims=bool(op.option("keepDims", False)))

    return kernel
