"""Lowering of linear maps along an axis with constant matrices, and of poolings that are such maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from kquant.graph.ir import Node
from kquant.graph.tracing.builder import (
    Builder,
    NotLowered,
    as_array,
    axis_last,
    known_layers,
    lowers_layer,
    lowers_op,
    transpose,
)
from kquant.graph.tracing.linear import pair
from kquant.graph.tracing.operations import concat, resize, slice_axis

L = keras.layers


def along(b: Builder, x: Node, axis: int, matrix: np.ndarray, suffix: str) -> Node:
    """The product of every line along an axis with a constant matrix [entries, entries of the output].

    A product of two tensors, one a constant, since constants keep 8 bits whatever those of the weights.
    """
    axis %= len(x.shape)
    if axis == 0 or len(x.shape) < 3:
        raise NotLowered("a linear map of the batch, or of a vector")
    there, back = axis_last(len(x.shape), axis)
    y = b.emit("batch_matmul", transpose(b, x, there, f"{suffix}_last"), b.const(matrix), suffix=suffix)
    return transpose(b, y, back, f"{suffix}_back")


def separable(b: Builder, x: Node, line: Callable[[Any, int], Any], size: tuple[int, ...]) -> Node:
    """A map of images or sequences that is linear along each of their axes.

    Args:
        b: the builder.
        x: [batch, places..., channels].
        line: f(array [1, entries, 1, channels], entries of the output) -> the map of one axis.
        size: of the output.
    """
    for axis, wanted in enumerate(size, 1):
        given = int(x.shape[axis] or 0)
        basis = keras.ops.convert_to_tensor(np.eye(given, dtype=np.float32)[None, :, None])  # a unit vector a channel
        matrix = as_array(line(basis, wanted))[0, :, 0].T
        if given != wanted or not np.array_equal(matrix, np.eye(given)):
            x = along(b, x, axis, matrix, f"axis_{axis}")
    return x


@lowers_op("Resize")
def resize_op(b: Builder, op: Any, images: Node) -> Node:
    if op.crop_to_aspect_ratio or op.pad_to_aspect_ratio:
        raise NotLowered("resizing that keeps the aspect ratio")
    return resize_image(b, images, op.size, op.interpolation, op.antialias)


def resize_image(b: Builder, x: Node, size: Any, method: str, antialias: bool) -> Node:
    """Resize with an operator of its own, or as a map along both axes."""
    if method == "nearest" or (method == "bilinear" and not antialias):
        return resize(b, x, size, method)
    if len(x.shape) != 4:
        raise NotLowered("resizing of one image")

    def line(basis: Any, wanted: int) -> Any:
        return keras.ops.image.resize(basis, (wanted, 1), method, antialias=antialias, data_format="channels_last")

    return separable(b, x, line, tuple(int(s) for s in size))


@lowers_op("Cumsum")
def cumulative_sum(b: Builder, op: Any, x: Node) -> Node:
    if op.axis is None:
        raise NotLowered("it sums over the batch")
    size = int(x.shape[op.axis] or 0)
    return along(b, x, op.axis, np.triu(np.ones((size, size))), "sum")


@lowers_op("AdaptiveAveragePool")
def adaptive_average(b: Builder, op: Any, inputs: Node) -> Node:
    return _adaptive(b, op, inputs)


@lowers_layer(*known_layers("AdaptiveAveragePooling1D", "AdaptiveAveragePooling2D"))
def adaptive_average_layer(b: Builder, layer: Any, inputs: Node) -> Node:
    return _adaptive(b, layer, inputs)


@lowers_op("AdaptiveMaxPool")
def adaptive_maximum(b: Builder, op: Any, inputs: Node) -> Node:
    return _adaptive(b, op, inputs, maximum=True)


@lowers_layer(*known_layers("AdaptiveMaxPooling1D", "AdaptiveMaxPooling2D"))
def adaptive_maximum_layer(b: Builder, layer: Any, inputs: Node) -> Node:
    return _adaptive(b, layer, inputs, maximum=True)


def _adaptive(b: Builder, op: Any, x: Node, maximum: bool = False) -> Node:
    """Output i of n is over the entries from floor(i size / n) to ceil((i + 1) size / n)."""
    rank = len(x.shape) - 2
    if rank not in (1, 2) or op.data_format == "channels_first":
        raise NotLowered("adaptive pooling of volumes, or with channels first")
    size = pair(op.output_size, rank)[-rank:]
    if maximum:
        return _adaptive_maximum(b, x, size)

    def average(basis: Any, wanted: int) -> Any:
        return keras.ops.adaptive_average_pool(basis, (wanted, 1), data_format="channels_last")

    return separable(b, x, average, size)


def _adaptive_maximum(b: Builder, x: Node, size: tuple[int, ...]) -> Node:
    for axis, wanted in enumerate(size, 1):
        given = int(x.shape[axis] or 0)
        ends = [(i * given // wanted, -(-(i + 1) * given // wanted)) for i in range(wanted)]
        windows = [slice_axis(b, x, axis, lo, hi, f"window_{axis}_{lo}") for lo, hi in ends]
        x = concat(b, [b.emit("reduce_max", w, axes=(axis,), keepdims=True, suffix="largest") for w in windows], axis)
    return x


@lowers_op("Sort")
def sort(b: Builder, op: Any, x: Node) -> Node:
    if op.axis is None or op.axis % len(x.shape) == 0:
        raise NotLowered("it sorts the batch")
    there, back = axis_last(len(x.shape), op.axis)
    x = transpose(b, x, there)
    count = int(x.shape[-1] or 1)
    falling = b.emit("top_k", x, k=count, suffix="falling")
    rising = b.emit("gather", falling, axis=len(x.shape) - 1, indices=tuple(range(count))[::-1])
    return transpose(b, rising, back, "transpose_back")
