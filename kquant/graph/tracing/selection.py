"""Lowering of operations that select entries along an axis: rows, reversals, repetitions, patches, lookups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kquant.graph.ir import Node
from kquant.graph.tracing.builder import Builder, NotLowered, as_array, axis_last, lowers_op, pad, reshape, transpose
from kquant.graph.tracing.linear import look_up, output_shape, pair


def gather(b: Builder, x: Node, axis: int, indices: Any, suffix: str = "") -> Node:
    """The entries of a tensor at constant places along an axis; negative places count from the end."""
    axis %= len(x.shape)
    size = x.shape[axis]
    if axis == 0 or size is None:
        raise NotLowered("it selects within the batch")
    places = [int(i) + size if i < 0 else int(i) for i in np.asarray(indices).reshape(-1)]
    if any(not 0 <= i < size for i in places):
        raise NotLowered(f"indices outside of an axis of {size}")
    return b.emit("gather", x, axis=axis, indices=tuple(places), suffix=suffix)


def _size(x: Node, axis: int | None) -> int:
    """Entries along an axis that is not the batch."""
    if axis is None or axis % len(x.shape) == 0:
        raise NotLowered("it moves values across the batch")
    return int(x.shape[axis] or 0)


@lowers_op("Take")
def take(b: Builder, op: Any, x: Any, indices: Any) -> Node:
    if isinstance(indices, Node) or not isinstance(x, Node):
        raise NotLowered("it selects at computed indices")
    axis, places = op.axis, np.asarray(indices)
    _size(x, axis)
    axis %= len(x.shape)
    return reshape(b, gather(b, x, axis, places), (*x.shape[:axis], *places.shape, *x.shape[axis + 1 :]))


@lowers_op("TakeAlongAxis")
def take_along_axis(b: Builder, op: Any, x: Any, indices: Any) -> Node:
    if not isinstance(x, Node) or op.axis is None or x.dtype != "float32":
        raise NotLowered("it selects from a constant, or in a flat tensor")
    if not isinstance(indices, Node):
        return _take_along_constants(b, x, op.axis % len(x.shape), as_array(indices))
    axis, rank = op.axis % len(x.shape), len(x.shape)
    if 0 < axis < rank - 1 and indices.shape[axis + 1 :] == (1,) * (rank - axis - 1):  # whole rows
        if indices.shape[1:axis] != x.shape[1:axis]:
            raise NotLowered(f"indices of shape {indices.shape} into shape {x.shape}")
        return b.emit("take_along", x, reshape(b, indices, indices.shape[: axis + 1]))
    there, back = axis_last(rank, axis)
    single = indices.shape[axis] == 1  # an axis of one entry moves by a reshape, of any type
    values = transpose(b, x, there, "last")
    places = (
        reshape(b, indices, [indices.shape[a] for a in there]) if single else transpose(b, indices, there, "places")
    )
    if values.shape[:-1] != places.shape[:-1]:
        raise NotLowered(f"indices of shape {indices.shape} into shape {x.shape}")
    taken = b.emit("take_along", values, places)
    return reshape(b, taken, indices.shape) if single else transpose(b, taken, back)


def _take_along_constants(b: Builder, x: Node, axis: int, places: np.ndarray) -> Node:
    """Each row at places of its own: those of all rows in a long one, side by side."""
    if axis == 0 or places.ndim != len(x.shape) or places.shape[0] != 1:
        raise NotLowered(f"indices of shape {places.shape} into shape {x.shape}")
    there, back = axis_last(len(x.shape), axis)
    values = transpose(b, x, there, "last")
    *rows, size = (int(d or 1) for d in values.shape[1:])
    places = np.broadcast_to(places.transpose(there)[0].astype(int) % size, (*rows, places.shape[axis]))
    alike = 0  # axes in front, along which the places are the same
    while alike < len(rows) and (places == places[:1]).all():
        places, alike = places[0], alike + 1
    count = math.prod(rows[alike:])
    long = reshape(b, values, (None, *rows[:alike], count * size), "rows")
    first = np.arange(count).reshape(*rows[alike:], 1) * size
    taken = gather(b, long, len(long.shape) - 1, places + first, "taken")
    return transpose(b, reshape(b, taken, (None, *rows, places.shape[-1]), "split"), back)


@lowers_op("BroadcastTo")
def broadcast_to(b: Builder, op: Any, x: Node) -> Node:
    """Axes of one entry repeat it."""
    shape = output_shape(b)
    if len(shape) != len(x.shape):
        raise NotLowered("it puts axes in front of the batch")
    for axis, (have, want) in enumerate(zip(x.shape[1:], shape[1:], strict=True), 1):
        if have != want:
            x = gather(b, x, axis, np.zeros(int(want or 1), int), f"axis_{axis}")
    return x


@lowers_op("Flip")
def flip(b: Builder, op: Any, x: Node) -> Node:
    axes = range(len(x.shape)) if op.axis is None else [op.axis] if isinstance(op.axis, int) else op.axis
    for axis in axes:
        x = gather(b, x, axis, np.arange(_size(x, axis))[::-1], "flip")
    return x


@lowers_op("Roll")
def roll(b: Builder, op: Any, x: Node) -> Node:
    axes = op.axis if isinstance(op.axis, tuple | list) else [op.axis]
    shifts = op.shift if isinstance(op.shift, tuple | list) else [op.shift] * len(axes)
    for axis, shift in zip(axes, shifts, strict=True):
        x = gather(b, x, axis, np.roll(np.arange(_size(x, axis)), int(shift)), "roll")
    return x


@lowers_op("Repeat")
def repeat(b: Builder, op: Any, x: Node) -> Node:
    return gather(b, x, op.axis, np.repeat(np.arange(_size(x, op.axis)), np.asarray(op.repeats)))


@lowers_op("Tile")
def tile(b: Builder, op: Any, x: Node) -> Node:
    counts = [op.repeats] if isinstance(op.repeats, int) else [int(r) for r in op.repeats]
    counts = [1] * (len(x.shape) - len(counts)) + counts
    if len(counts) != len(x.shape) or counts[0] != 1:
        raise NotLowered("it repeats the batch, or adds an axis")
    for axis, count in enumerate(counts[1:], 1):
        if count != 1:
            x = gather(b, x, axis, np.tile(np.arange(_size(x, axis)), count), "tile")
    return x


@lowers_op("ExtractPatches")
def extract_patches(b: Builder, op: Any, images: Node) -> Node:
    """Lines of the patches, then columns, then their values side by side."""
    if op.is_3d or op.data_format != "channels_last" or len(images.shape) != 4:
        raise NotLowered("patches of volumes, of one image, or with channels first")
    return patches(b, images, pair(op.size), pair(op.strides), pair(op.dilation_rate), op.padding)


def patches(b: Builder, x: Node, size: Sequence[int], strides: Sequence[int], dilation: Any, padding: str) -> Node:
    """Patches [batch, rows, columns, height * width * channels] of images."""
    counts = []
    for axis in (1, 2):
        length, k, s, d = int(x.shape[axis] or 0), size[axis - 1], strides[axis - 1], dilation[axis - 1]
        reach = (k - 1) * d + 1
        count = -(-length // s) if padding == "same" else (length - reach) // s + 1
        if (missing := (count - 1) * s + reach - length) > 0:
            pads = [(0, 0)] * 4
            pads[axis] = (missing // 2, missing - missing // 2)
            x = pad(b, x, pads, suffix=f"pad_{axis}")
        places = np.arange(count)[:, None] * s + np.arange(k) * d
        if places.size != x.shape[axis] or (np.diff(places.reshape(-1)) != 1).any():
            x = gather(b, x, axis, places, f"lines_{axis}")
        counts.append(count)
    (rows, columns), (h, w), channels = counts, size, int(x.shape[3] or 1)
    x = reshape(b, x, (None, rows, h, columns, w * channels))
    x = transpose(b, x, (0, 1, 3, 2, 4))
    return reshape(b, x, (None, rows, columns, h * w * channels), "")


@lowers_op("OneHot")
def one_hot(b: Builder, op: Any, x: Node) -> Node:
    """Rows of the identity."""
    if op.sparse or op.axis not in (-1, len(x.shape)) or (op.dtype and "float" not in str(op.dtype)):
        raise NotLowered("one-hot vectors of another type, or along another axis than the last")
    return look_up(b, x, np.eye(op.num_classes))


@lowers_op("DepthToSpace", "SpaceToDepth")
def rearrange(b: Builder, op: Any, x: Node) -> Node:
    """Blocks of pixels side by side in the channels, and back."""
    if op.data_format == "channels_first" or len(x.shape) != 4:
        raise NotLowered("blocks with channels first, or of one image")
    n, (height, width, channels) = int(op.block_size), (int(d or 0) for d in x.shape[1:])
    if type(op).__name__ == "DepthToSpace":
        split, whole = (height, width, n, n, channels // n**2), (height * n, width * n, channels // n**2)
    else:
        split, whole = (height // n, n, width // n, n, channels), (height // n, width // n, channels * n**2)
    return reshape(b, transpose(b, reshape(b, x, (None, *split)), (0, 1, 3, 2, 4, 5)), (None, *whole), "")
