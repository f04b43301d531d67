"""Lowering of layers and operations with weights: convolutions, dense, einsum, embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from kquant.graph.ir import Node, Shape
from kquant.graph.tracing.activations import activate
from kquant.graph.tracing.builder import (
    Builder,
    NotLowered,
    as_array,
    known_layers,
    lowers_layer,
    lowers_op,
    pad,
    reshape,
    scale_offset,
    without_batch,
)
from kquant.graph.tracing.training import constant_kernel, variables_of
from kquant.graph.training import UserWeight

L = keras.layers


def pair(value: int | Sequence[int], rank: int = 2) -> tuple[int, int]:
    """(height, width) of a setting; a one-dimensional operation gets height 1."""
    values = (value,) * rank if isinstance(value, int) else tuple(int(v) for v in value)
    if rank == 1:
        return (1, int(values[0]))
    return (int(values[0]), int(values[-1]))


def to_2d(b: Builder, x: Node) -> Node:
    """[B, L, C] as an image [B, 1, L, C]; an image stays."""
    return reshape(b, x, (None, 1, *x.shape[1:]), "expand") if len(x.shape) == 3 else x


def from_2d(b: Builder, x: Node, rank: int) -> Node:
    """Undo `to_2d` for a tensor of the original rank (batch and channels included)."""
    return reshape(b, x, (None, *x.shape[2:]), "squeeze") if rank == 3 else x


def causal(b: Builder, x: Node, padding: str, kernel: int, dilation: int) -> tuple[Node, str]:
    """Causal padding on the width of an image as a pad in front of a valid convolution."""
    if padding != "causal":
        return x, padding
    return pad(b, x, ((0, 0), (0, 0), ((kernel - 1) * dilation, 0), (0, 0)), suffix="pad"), "valid"


def bias_of(layer: Any, channels: int) -> np.ndarray:
    """The layer's bias, zeros where it has none."""
    return as_array(layer.bias) if layer.use_bias else np.zeros(channels, np.float32)


def convolve(
    b: Builder,
    x: Node,
    kernel: np.ndarray,
    bias: np.ndarray,
    strides: Any,
    padding: str,
    dilation: Any,
    variables: Mapping[str, Any] | None = None,
) -> Node:
    """Convolution of a sequence or an image with a Keras kernel [(h,) w, cin / groups, cout], as an image."""
    rank = kernel.ndim - 2
    if rank > 2:
        raise NotLowered("a three-dimensional convolution outside of a layer")
    if rank == 1:
        kernel = kernel[None]
    dilation = pair(dilation, rank)
    x, padding = causal(b, to_2d(b, x), padding, kernel.shape[1], dilation[1])
    return b.emit(
        "conv2d",
        x,
        weights={"kernel": kernel, "bias": bias},
        strides=pair(strides, rank),
        padding=padding,
        dilation=dilation,
        groups=x.shape[-1] // kernel.shape[2],
        variables=variables,
    )


def _depthwise(
    b: Builder,
    x: Node,
    kernel: np.ndarray,
    bias: np.ndarray,
    strides: Any,
    padding: str,
    dilation: Any,
    suffix: str = "",
    variables: Mapping[str, Any] | None = None,
) -> Node:
    """Depthwise convolution with a Keras kernel [(h,) w, c, multiplier], as an image."""
    rank = kernel.ndim - 2
    if rank == 1:
        kernel = kernel[None]
    dilation = pair(dilation, rank)
    x, padding = causal(b, to_2d(b, x), padding, kernel.shape[1], dilation[1])
    return b.emit(
        "depthwise_conv2d",
        x,
        suffix=suffix,
        weights={"kernel": kernel, "bias": bias},
        strides=pair(strides, rank),
        padding=padding,
        dilation=dilation,
        variables=variables,
    )


@lowers_layer(L.Conv1D, L.Conv2D)
def conv(b: Builder, layer: Any, x: Node) -> Node:
    y = convolve(
        b,
        x,
        as_array(layer.kernel),
        bias_of(layer, layer.filters),
        layer.strides,
        layer.padding,
        layer.dilation_rate,
        variables_of(layer),
    )
    return from_2d(b, activate(b, layer.activation, y), len(x.shape))


@lowers_layer(L.DepthwiseConv1D, L.DepthwiseConv2D)
def depthwise_conv(b: Builder, layer: Any, x: Node) -> Node:
    kernel = as_array(layer.kernel)
    bias = bias_of(layer, kernel.shape[-2] * kernel.shape[-1])
    variables = variables_of(layer)
    y = _depthwise(b, x, kernel, bias, layer.strides, layer.padding, layer.dilation_rate, variables=variables)
    return from_2d(b, activate(b, layer.activation, y), len(x.shape))


def _separable(
    b: Builder,
    x: Node,
    kernels: tuple[np.ndarray, np.ndarray],
    bias: np.ndarray,
    strides: Any,
    pad: str,
    dil: Any,
    variables: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {}),
) -> Node:
    depthwise, pointwise = kernels
    zeros = np.zeros(depthwise.shape[-2] * depthwise.shape[-1], np.float32)
    y = _depthwise(b, x, depthwise, zeros, strides, pad, dil, suffix="depthwise", variables=variables[0])
    return convolve(b, y, pointwise.reshape(1, 1, *pointwise.shape[-2:]), bias, 1, "valid", 1, variables[1])


@lowers_layer(L.SeparableConv1D, L.SeparableConv2D)
def separable_conv(b: Builder, layer: Any, x: Node) -> Node:
    kernels = as_array(layer.depthwise_kernel), as_array(layer.pointwise_kernel)
    bias = layer.bias if layer.use_bias else None
    variables = ({"kernel": layer.depthwise_kernel, "bias": None}, {"kernel": layer.pointwise_kernel, "bias": bias})
    y = _separable(
        b,
        x,
        kernels,
        bias_of(layer, layer.filters),
        layer.strides,
        layer.padding,
        layer.dilation_rate,
        variables,
    )
    return from_2d(b, activate(b, layer.activation, y), len(x.shape))


def _transposed(
    b: Builder, x: Node, layer: Any, kernel: np.ndarray, bias: np.ndarray, strides: Any, padding: str, dilation: Any
) -> Node:
    """Transposed convolution with a Keras kernel [(h,) w, cout, cin], as an image.

    A dilated kernel is written out with its zeros. The output size is the one that Keras declares,
    which is where its output padding shows.
    """
    rank = kernel.ndim - 2
    shape = without_batch(b.scope.shapes[0])
    if rank == 1:
        kernel, shape = kernel[None], (None, 1, *shape[1:])
    strides = pair(strides, rank)
    kernel, gaps = dilate(kernel, pair(dilation, rank)), dilate(np.zeros_like(kernel), pair(dilation, rank), 1.0) > 0
    own = UserWeight.of(layer.kernel, kernel, b.scope.learns, **({"shape": kernel.shape} if gaps.any() else {}))
    x = to_2d(b, x)
    for axis in (1, 2):
        size, out, k, s = x.shape[axis], int(shape[axis] or 0), kernel.shape[axis - 1], strides[axis - 1]
        # the forward convolution of an `out` long line must have `size` positions, or the kernel does not exist
        if (-(-out // s) if padding == "same" else -(-(out - k + 1) // s)) != size:
            raise NotLowered(f"an output of {out} from {size} with kernel {k}, stride {s}, padding {padding!r}")
    return b.emit(
        "conv2d_transpose",
        x,
        shape=shape,
        weights={"kernel": kernel, "bias": bias},
        strides=strides,
        padding=padding,
        variables={**variables_of(layer), "kernel": replace(own, gaps=gaps if gaps.any() else None)},
    )


def dilate(kernel: np.ndarray, dilation: tuple[int, int], hole: float = 0.0) -> np.ndarray:
    """A kernel [h, w, ...] with dilation - 1 zeros, or other holes, between its taps."""
    (h, w), (dh, dw) = kernel.shape[:2], dilation
    if (dh, dw) == (1, 1):
        return kernel
    spread = np.full(((h - 1) * dh + 1, (w - 1) * dw + 1, *kernel.shape[2:]), hole, np.float32)
    spread[::dh, ::dw] = kernel
    return spread


@lowers_layer(L.Conv1DTranspose, L.Conv2DTranspose)
def conv_transpose(b: Builder, layer: Any, x: Node) -> Node:
    bias = bias_of(layer, layer.filters)
    y = _transposed(b, x, layer, as_array(layer.kernel), bias, layer.strides, layer.padding, layer.dilation_rate)
    return from_2d(b, activate(b, layer.activation, y), len(x.shape))


@lowers_op("Conv", "DepthwiseConv")
def conv_op(b: Builder, op: Any, inputs: Node, kernel: Any) -> Node:
    """keras.ops.conv and relatives with a constant kernel."""
    if isinstance(kernel, Node):
        raise NotLowered("its kernel is not a constant")
    array = as_array(kernel)
    emit = _depthwise if type(op).__name__ == "DepthwiseConv" else convolve
    channels = array.shape[-2] * array.shape[-1] if emit is _depthwise else array.shape[-1]
    zeros, variables = np.zeros(channels, np.float32), constant_kernel(kernel)
    y = emit(b, inputs, array, zeros, op.strides, op.padding, op.dilation_rate, variables=variables)
    return from_2d(b, y, len(inputs.shape))


@lowers_op("SeparableConv")
def separable_conv_op(b: Builder, op: Any, inputs: Node, depthwise_kernel: Any, pointwise_kernel: Any) -> Node:
    if isinstance(depthwise_kernel, Node) or isinstance(pointwise_kernel, Node):
        raise NotLowered("its kernels are not constants")
    kernels = as_array(depthwise_kernel), as_array(pointwise_kernel)
    bias = np.zeros(kernels[1].shape[-1], np.float32)
    variables = constant_kernel(depthwise_kernel), constant_kernel(pointwise_kernel)
    y = _separable(b, inputs, kernels, bias, op.strides, op.padding, op.dilation_rate, variables)
    return from_2d(b, y, len(inputs.shape))


@lowers_layer(L.Dense)
def dense(b: Builder, layer: Any, x: Node) -> Node:
    weights = {"kernel": as_array(layer.kernel), "bias": bias_of(layer, layer.units)}
    y = b.emit("dense", x, weights=weights, variables=variables_of(layer))
    return activate(b, layer.activation, y)


@lowers_layer(L.Embedding)
def embedding(b: Builder, layer: Any, ids: Node) -> Node:
    return look_up(b, ids, as_array(layer.embeddings), variables={"table": layer.embeddings})


def look_up(b: Builder, ids: Node, table: np.ndarray, **settings: Any) -> Node:
    """The rows of a table that integers choose."""
    return b.emit("embedding", ids, weights={"table": table}, **settings)


@lowers_layer(*known_layers("ReversibleEmbedding"))
def reversible_embedding(b: Builder, layer: Any, inputs: Node, reverse: bool = False) -> Node:
    """The rows of a table, or the product with it, transposed, perhaps bounded softly."""
    if not reverse:
        return embedding(b, layer, inputs)
    table = layer.embeddings if layer.tie_weights else layer.reverse_embeddings
    kernel = as_array(table).T if layer.tie_weights else as_array(table)
    order = (1, 0) if layer.tie_weights else None
    variables = {"kernel": UserWeight.of(table, kernel, b.scope.learns, order=order), "bias": None}
    weights = {"kernel": kernel, "bias": np.zeros(kernel.shape[1], np.float32)}
    y = b.emit("dense", inputs, weights=weights, variables=variables)
    if layer.logit_soft_cap is None:
        return y
    small = scale_offset(b, y, 1.0 / layer.logit_soft_cap, 0.0, "small")
    return scale_offset(b, b.emit("tanh", small, suffix="tanh"), layer.logit_soft_cap, 0.0, "capped")


def output_shape(b: Builder) -> Shape:
    """Shape of the operation's (first) output, as Keras declares it."""
    return without_batch(b.scope.shapes[0])
