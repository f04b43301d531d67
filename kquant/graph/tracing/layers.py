"""Lowering of layers without kernels: normalization, merging, pooling, padding, resizing, reshaping."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from kquant.graph.ir import Node
from kquant.graph.tracing.builder import (
    Builder,
    NotLowered,
    affine,
    as_array,
    lowers_layer,
    pad,
    reshape,
    scale_offset,
    transpose,
)
from kquant.graph.tracing.linear import from_2d, output_shape, pair, to_2d
from kquant.graph.tracing.maps import resize_image
from kquant.graph.tracing.operations import average_pool, concat, max_pool, resize, slice_axis, two_inputs
from kquant.graph.training import UserWeight

L = keras.layers

GLOBAL_MEANS = (L.GlobalAveragePooling1D, L.GlobalAveragePooling2D, L.GlobalAveragePooling3D)
GLOBAL_MAXIMA = (L.GlobalMaxPooling1D, L.GlobalMaxPooling2D, L.GlobalMaxPooling3D)


@lowers_layer(
    L.Dropout,
    L.SpatialDropout1D,
    L.SpatialDropout2D,
    L.SpatialDropout3D,
    L.AlphaDropout,
    L.GaussianDropout,
    L.GaussianNoise,
    L.ActivityRegularization,
    L.Identity,
    L.RandomFlip,
    L.RandomRotation,
    L.RandomTranslation,
    L.RandomZoom,
    L.RandomContrast,
    L.RandomBrightness,
)
def no_operation(b: Builder, layer: Any, x: Any) -> Any:
    return x


@lowers_layer(L.BatchNormalization)
def batch_normalization(b: Builder, layer: Any, inputs: Node, mask: Any = None) -> Node:
    """gamma * (x - mean) / sqrt(var + epsilon) + beta with the moving statistics.

    In inference the output has mean beta and standard deviation |gamma| on the training
    distribution; they are kept as the node's `stats`.
    """
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    if len(axes) != 1:
        raise NotLowered(f"batch normalization over the axes {axes}")
    mean, variance = as_array(layer.moving_mean), as_array(layer.moving_variance)
    gamma = as_array(layer.gamma) if layer.scale else np.ones_like(mean)
    beta = as_array(layer.beta) if layer.center else np.zeros_like(mean)
    scale = gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + layer.epsilon)
    stats = {"mean": beta, "std": np.abs(gamma)}
    return affine(b, inputs, scale, beta - mean * scale, axes[0], stats, _of_norm(b, layer, gamma))


def _of_norm(b: Builder, layer: Any, gamma: np.ndarray) -> dict[str, UserWeight]:
    """The weights of a normalization that trains; one that is frozen stays at its running statistics, as in Keras."""
    learns = b.scope.learns
    scale = UserWeight.of(layer.gamma if layer.scale else None, gamma, learns)
    offset = UserWeight.of(layer.beta if layer.center else None, gamma, learns)
    momentum = float(layer.momentum) if learns else None
    if b.training and (scale.asked or offset.asked):
        warnings.warn(
            f"Layer {b.scope.origin!r}: regularizers and constraints of gamma and beta are left out, since training "
            "has these as parts of other weights.",
            stacklevel=2,
        )
    return {
        "scale": replace(scale, regularizer=None, constraint=None, momentum=momentum),
        "offset": replace(offset, regularizer=None, constraint=None),
    }


@lowers_layer(L.Rescaling)
def rescaling(b: Builder, layer: Any, x: Node) -> Node:
    return scale_offset(b, x, layer.scale, layer.offset)


@lowers_layer(L.Normalization)
def normalization(b: Builder, layer: Any, x: Node) -> Node:
    """(x - mean) / max(std, epsilon), or its inverse."""
    mean = as_array(layer.mean).astype(np.float64)
    std = np.maximum(np.sqrt(as_array(layer.variance).astype(np.float64)), keras.backend.epsilon())
    if layer.invert:
        return scale_offset(b, x, std, mean)
    return scale_offset(b, x, 1.0 / std, -mean / std)


def merge(b: Builder, op: str, tensors: Sequence[Any]) -> Node:
    """A chain of binary operations; lower ranks get axes after the batch, as Keras does."""
    rank = max(len(x.shape) for x in tensors)
    result = _expanded(b, tensors[0], rank)
    for k, x in enumerate(tensors[1:], 2):
        suffix = "" if k == len(tensors) else f"{op}_{k - 1}"
        result = two_inputs(b, op, result, _expanded(b, x, rank), suffix=suffix)
    return result


def _expanded(b: Builder, x: Node, rank: int) -> Node:
    return reshape(b, x, (None, *(1,) * (rank - len(x.shape)), *x.shape[1:]))


@lowers_layer(L.Add, L.Subtract, L.Multiply, L.Maximum, L.Minimum)
def merge_layer(b: Builder, layer: Any, inputs: Sequence[Any]) -> Node:
    bases = {L.Add: "add", L.Subtract: "sub", L.Multiply: "mul", L.Maximum: "maximum", L.Minimum: "minimum"}
    return merge(b, next(op for cls, op in bases.items() if isinstance(layer, cls)), inputs)


@lowers_layer(L.Average)
def average(b: Builder, layer: Any, inputs: Sequence[Any]) -> Node:
    """The sum, scaled by a constant."""
    total = merge(b, "add", inputs)
    return scale_offset(b, total, 1.0 / len(inputs), 0.0, suffix="scale")


@lowers_layer(L.Concatenate)
def concatenate(b: Builder, layer: Any, inputs: Sequence[Any]) -> Node:
    return concat(b, inputs, layer.axis)


@lowers_layer(L.MaxPooling1D, L.MaxPooling2D, L.AveragePooling1D, L.AveragePooling2D)
def pooling(b: Builder, layer: Any, x: Node) -> Node:
    pool = max_pool if isinstance(layer, (L.MaxPooling1D, L.MaxPooling2D)) else average_pool
    return pool(b, x, layer.pool_size, layer.strides, layer.padding)


@lowers_layer(*GLOBAL_MEANS, *GLOBAL_MAXIMA)
def global_pooling(b: Builder, layer: Any, inputs: Node, mask: Any = None) -> Node:
    if mask is not None:
        raise NotLowered("pooling with a mask")
    is_mean = isinstance(layer, GLOBAL_MEANS)
    axes = tuple(range(1, len(inputs.shape) - 1))
    return b.emit("mean" if is_mean else "reduce_max", inputs, axes=axes, keepdims=bool(layer.keepdims))


@lowers_layer(L.ZeroPadding1D, L.ZeroPadding2D, L.ZeroPadding3D)
def zero_padding(b: Builder, layer: Any, x: Node) -> Node:
    pairs = [layer.padding] if len(x.shape) == 3 else list(layer.padding)
    return pad(b, x, [(0, 0), *pairs, (0, 0)])


@lowers_layer(L.Cropping1D, L.Cropping2D, L.Cropping3D)
def cropping(b: Builder, layer: Any, x: Node) -> Node:
    pairs = [layer.cropping] if len(x.shape) == 3 else list(layer.cropping)
    begin = (0, *(int(lo) for lo, _ in pairs), 0)
    sizes = zip(x.shape[1:-1], pairs, strict=True)
    end = (None, *(int(d or 0) - int(hi) for d, (_, hi) in sizes), x.shape[-1])
    return b.emit("slice", x, begin=begin, end=end, strides=(1,) * len(begin))


@lowers_layer(L.UpSampling1D, L.UpSampling2D)
def up_sampling(b: Builder, layer: Any, x: Node) -> Node:
    method = getattr(layer, "interpolation", "nearest")
    image = to_2d(b, x)
    if len(x.shape) == 3:
        factors = (1, layer.size if isinstance(layer.size, int) else layer.size[0])
    else:
        factors = pair(layer.size)
    size = tuple(int(d or 0) * f for d, f in zip(image.shape[1:3], factors, strict=True))
    return from_2d(b, resize(b, image, size, method), len(x.shape))


@lowers_layer(L.Resizing)
def resizing(b: Builder, layer: Any, x: Node) -> Node:
    if layer.crop_to_aspect_ratio or layer.pad_to_aspect_ratio:
        raise NotLowered("resizing that keeps the aspect ratio")
    return resize_image(b, x, (layer.height, layer.width), layer.interpolation, getattr(layer, "antialias", False))


@lowers_layer(L.CenterCrop)
def center_crop(b: Builder, layer: Any, data: Node) -> Node:
    sizes = [int(d or 0) for d in data.shape[1:3]]
    wanted = (layer.height, layer.width)
    if len(data.shape) != 4 or any(size < crop for size, crop in zip(sizes, wanted, strict=True)):
        raise NotLowered("a crop that is larger than the image, or of one image")
    for axis, (size, crop) in enumerate(zip(sizes, wanted, strict=True), 1):
        if size != crop:
            start = (size - crop) // 2
            data = slice_axis(b, data, axis, start, start + crop, f"crop_{axis}")
    return data


@lowers_layer(L.SpectralNormalization)
def spectral_normalization(b: Builder, layer: Any, inputs: Node) -> Node:
    """The layer within, whose weight training has normalized."""
    return b.trace_function(b, layer.layer, [inputs])[0]


@lowers_layer(L.Reshape, L.Flatten)
def reshape_layer(b: Builder, layer: Any, x: Node) -> Node:
    return reshape(b, x, output_shape(b), "")


@lowers_layer(L.Permute)
def permute(b: Builder, layer: Any, x: Node) -> Node:
    return transpose(b, x, (0, *layer.dims), "")


@lowers_layer(L.RepeatVector)
def repeat_vector(b: Builder, layer: Any, x: Node) -> Node:
    row = reshape(b, x, (None, 1, *x.shape[1:]), "expand")
    return row if layer.n == 1 else concat(b, [row] * layer.n, 1)
