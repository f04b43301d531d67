"""Lowering of three-dimensional layers: images, one for every depth, in the first axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from kquant.graph.ir import Node
from kquant.graph.tracing.activations import activate
from kquant.graph.tracing.builder import Builder, NotLowered, as_array, lowers_layer, pad, reshape, transpose
from kquant.graph.tracing.linear import bias_of
from kquant.graph.tracing.operations import average_pool, concat, max_pool, resize

L = keras.layers


def _triple(value: int | Sequence[int]) -> tuple[int, int, int]:
    values = (value,) * 3 if isinstance(value, int) else tuple(int(v) for v in value)
    return values[0], values[1], values[2]


def _images(b: Builder, x: Node) -> Node:
    """[B, D, H, W, C] as [B D, H, W, C]."""
    return reshape(b, x, (None, *x.shape[2:]), "images")


def _volume(b: Builder, images: Node, depth: int) -> Node:
    """Undo `_images`."""
    return reshape(b, images, (None, depth, *images.shape[1:]), "volume")


def _window(size: int, taps: int, stride: int, dilation: int, padding: str) -> tuple[int, int, int]:
    """Positions of a window along an axis, and zeros before and after."""
    reach = (taps - 1) * dilation + 1
    if padding == "valid":
        return (size - reach) // stride + 1, 0, 0
    count = -(-size // stride)
    missing = max(0, (count - 1) * stride + reach - size)
    return count, missing // 2, missing - missing // 2


@lowers_layer(L.Conv3D)
def conv3d(b: Builder, layer: Any, x: Node) -> Node:
    """An image convolution on the depths under the kernel, side by side as channels."""
    kernel = as_array(layer.kernel)  # [kd, kh, kw, cin / groups, cout]
    strides, dilation = _triple(layer.strides), _triple(layer.dilation_rate)
    taps, cout = kernel.shape[0], kernel.shape[-1]
    if layer.groups != 1 and taps > 1:
        raise NotLowered("a three-dimensional convolution in groups, over several depths")
    count, before, after = _window(int(x.shape[1] or 0), taps, strides[0], dilation[0], layer.padding)
    x = pad(b, x, ((0, 0), (before, after), (0, 0), (0, 0), (0, 0)), suffix="pad")
    depths = [_depths(b, x, k * dilation[0], count, strides[0]) for k in range(taps)]
    beside = depths[0] if taps == 1 else concat(b, depths, -1, "depths")
    y = b.emit(
        "conv2d",
        _images(b, beside),
        weights={
            "kernel": np.concatenate(list(kernel), axis=2),
            "bias": bias_of(layer, cout),
        },
        strides=strides[1:],
        padding=layer.padding,
        dilation=dilation[1:],
        groups=layer.groups,
    )
    return _volume(b, activate(b, layer.activation, y), count)


def _depths(b: Builder, x: Node, first: int, count: int, stride: int) -> Node:
    """Every `stride`-th depth from `first` on, `count` of them."""
    if first == 0 and stride == 1 and count == x.shape[1]:
        return x
    rest = (0,) * (len(x.shape) - 2)
    stop = first + (count - 1) * stride + 1
    end, strides = (None, stop, *x.shape[2:]), (1, stride, *(1 for _ in rest))
    return b.emit("slice", x, begin=(0, first, *rest), end=end, strides=strides, suffix=f"depth_{first}")


@lowers_layer(L.Conv3DTranspose)
def conv3d_transpose(b: Builder, layer: Any, x: Node) -> Node:
    """A transposed image convolution for every depth of a kernel that does not overlap itself, side by side."""
    kernel = as_array(layer.kernel)  # [kd, kh, kw, cout, cin]
    strides, taps, cout = _triple(layer.strides), kernel.shape[0], kernel.shape[3]
    if taps != strides[0] or _triple(layer.dilation_rate) != (1, 1, 1):
        raise NotLowered(f"a transposed convolution of {taps} depths with stride {strides[0]}")
    depth, out = int(x.shape[1] or 0), b.scope.shapes[0]
    for axis in (2, 3):
        size, line = kernel.shape[axis - 1], int(out[axis] or 0)
        positions = (
            -(-line // strides[axis - 1]) if layer.padding == "same" else -(-(line - size + 1) // strides[axis - 1])
        )
        if positions != x.shape[axis]:
            raise NotLowered(f"an output of {line} from {x.shape[axis]} with kernel {size}")
    y = b.emit(
        "conv2d_transpose",
        _images(b, x),
        shape=(None, *out[2:4], taps * cout),
        weights={
            "kernel": kernel.transpose(1, 2, 0, 3, 4).reshape(*kernel.shape[1:3], taps * cout, -1),
            "bias": np.tile(bias_of(layer, cout), taps),
        },
        strides=strides[1:],
        padding=layer.padding,
    )
    y = activate(b, layer.activation, y)
    y = reshape(b, y, (None, depth, *out[2:4], taps * cout), "volume")
    y = reshape(b, y, (None, depth, int(out[2] or 0) * int(out[3] or 0), taps, cout), "taps")
    y = transpose(b, y, (0, 1, 3, 2, 4), "depths")
    return reshape(b, y, (None, depth * taps, *out[2:4], cout), "whole")


@lowers_layer(L.MaxPooling3D, L.AveragePooling3D)
def pooling3d(b: Builder, layer: Any, x: Node) -> Node:
    """Over the places, and then over the depths."""
    pool = max_pool if isinstance(layer, L.MaxPooling3D) else average_pool
    size, strides = _triple(layer.pool_size), _triple(layer.strides)
    depth = int(x.shape[1] or 0)
    y = pool(b, _images(b, x), size[1:], strides[1:], layer.padding)
    height, width, channels = y.shape[1:]
    y = reshape(b, y, (None, depth, int(height or 0) * int(width or 0), channels), "lines")
    y = pool(b, y, (size[0], 1), (strides[0], 1), layer.padding)
    return reshape(b, y, (None, y.shape[1], height, width, channels), "volume")


@lowers_layer(L.UpSampling3D)
def up_sampling3d(b: Builder, layer: Any, x: Node) -> Node:
    """Nearest neighbours, over the places and then over the depths."""
    depths, rows, columns = _triple(layer.size)
    depth, height, width, channels = (int(d or 0) for d in x.shape[1:])
    y = resize(b, _images(b, x), (height * rows, width * columns), "nearest")
    y = reshape(b, y, (None, depth, height * rows * width * columns, channels), "lines")
    y = resize(b, y, (depth * depths, height * rows * width * columns), "nearest")
    return reshape(b, y, (None, depth * depths, height * rows, width * columns, channels), "volume")
