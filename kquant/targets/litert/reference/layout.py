"""Operators that move values without arithmetic, and the resizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from kquant.errors import ExportError
from kquant.targets.litert.reader import Operator
from kquant.targets.litert.reference.linear import Values


def _ints(value: np.ndarray | Sequence[int] | None) -> list[int]:
    return [] if value is None else [int(v) for v in np.asarray(value).reshape(-1)]


def reshape(op: Operator, x: Values) -> np.ndarray:
    """RESHAPE: to the shape in the second input, or in the options."""
    value = np.asarray(x[0])
    shape = _ints(x[1]) if len(x) > 1 and x[1] is not None else _ints(op.option("newShape", None))
    known = math.prod(d for d in shape if d != -1)
    if (shape.count(-1) == 0 and known != value.size) or (-1 in shape and (known == 0 or value.size % known)):
        raise ExportError(
            f"{op}: {value.size} values do not fit the shape {shape}; feed the batch the file was made for"
        )
    return value.reshape(shape)


def squeeze(op: Operator, x: Values) -> np.ndarray:
    """SQUEEZE: the given axes, or every axis of length 1."""
    value, axes = np.asarray(x[0]), _ints(op.option("squeezeDims", None))
    return np.squeeze(value, tuple(axes)) if axes else np.squeeze(value)


def expand_dims(op: Operator, x: Values) -> np.ndarray:
    """EXPAND_DIMS."""
    return np.expand_dims(np.asarray(x[0]), _ints(x[1])[0])


def transpose(op: Operator, x: Values) -> np.ndarray:
    """TRANSPOSE."""
    return np.ascontiguousarray(np.transpose(np.asarray(x[0]), _ints(x[1])))


def slice_(op: Operator, x: Values) -> np.ndarray:
    """SLICE: begin and size; size -1 means all the rest."""
    return np.asarray(x[0])[
        tuple(slice(b, None if s == -1 else b + s) for b, s in zip(_ints(x[1]), _ints(x[2]), strict=True))
    ]


def strided_slice(op: Operator, x: Values) -> np.ndarray:
    """STRIDED_SLICE with all its masks, as numpy indexing."""
    begins, ends, strides = (_ints(v) for v in x[1:4])
    if op.option("offset", False):
        ends = [b + e for b, e in zip(begins, ends, strict=True)]

    def marked(mask: str, position: int) -> bool:
        return bool(op.option(mask) >> position & 1)

    index: list[slice | int | None] = []
    tail: list[slice | int | None] | None = None
    for i, (b, e, s) in enumerate(zip(begins, ends, strides, strict=True)):
        if marked("ellipsisMask", i):
            tail = []
            continue
        entry: slice | int | None
        if marked("newAxisMask", i):
            entry = None
        elif marked("shrinkAxisMask", i):
            entry = b
        else:
            entry = slice(None if marked("beginMask", i) else b, None if marked("endMask", i) else e, s)
        (index if tail is None else tail).append(entry)
    return np.asarray(x[0])[(*index, ..., *(tail or []))].copy()  # may have rank 0


def cast(op: Operator, x: Values) -> np.ndarray:
    """CAST."""
    return np.asarray(x[0]).astype(op.outputs[0].dtype)


def gather(op: Operator, x: Values) -> np.ndarray:
    """GATHER; batch dimensions are those in front of the axis of the indices."""
    value, indices, axis, batch = np.asarray(x[0]), np.asarray(x[1]), op.option("axis"), op.option("batchDims", 0)
    if not batch:
        return np.take(value, indices, axis=axis)
    if not batch == axis == indices.ndim - 1:
        raise ExportError(
            f"{op}: batch dimensions other than all in front of the axis are not in the integer reference"
        )
    return np.take_along_axis(value, indices.reshape(*indices.shape, *[1] * (value.ndim - indices.ndim)), axis)


def concatenation(op: Operator, x: Values) -> np.ndarray:
    """CONCATENATION of tensors on one grid."""
    return np.concatenate([np.asarray(v) for v in x], axis=op.option("axis"))


def pack(op: Operator, x: Values) -> np.ndarray:
    """PACK."""
    return np.stack([np.asarray(v) for v in x], axis=op.option("axis"))


def unpack(op: Operator, x: Values) -> tuple[np.ndarray, ...]:
    """UNPACK."""
    axis = op.option("axis")
    return tuple(np.moveaxis(np.asarray(x[0]), axis, 0))


def split(op: Operator, x: Values) -> tuple[np.ndarray, ...]:
    """SPLIT; inputs are the axis and the tensor."""
    return tuple(np.split(np.asarray(x[1]), len(op.outputs), axis=_ints(x[0])[0]))


def shape(op: Operator, x: Values) -> np.ndarray:
    """SHAPE."""
    return np.asarray(np.asarray(x[0]).shape, op.outputs[0].dtype)


def pad(op: Operator, x: Values) -> np.ndarray:
    """PAD with the output's zero point; PADV2 with its third input."""
    fill = np.asarray(x[2]).reshape(-1)[0] if len(x) > 2 and x[2] is not None else op.outputs[0].z
    return np.pad(np.asarray(x[0]), np.asarray(x[1]).astype(np.int64), constant_values=fill)


def mirror_pad(op: Operator, x: Values) -> np.ndarray:
    """MIRROR_PAD: mode 0 leaves the edge out, mode 1 repeats it."""
    mode: Literal["symmetric", "reflect"] = "symmetric" if op.option("mode") else "reflect"
    return np.pad(np.asarray(x[0]), np.asarray(x[1]).astype(np.int64), mode=mode)


def _nearest(op: Operator, size: int, wanted: int) -> np.ndarray:
    align, half = bool(op.option("alignCorners", False)), bool(op.option("halfPixelCenters", False))
    corners = align and wanted > 1
    scale = np.float32(size - 1) / np.float32(wanted - 1) if corners else np.float32(size) / np.float32(wanted)
    position = (np.arange(wanted).astype(np.float32) + np.float32(0.5 if half else 0.0)) * scale
    index = np.floor(position + np.float32(0.5)) if align else np.floor(position)
    return np.clip(index.astype(np.int64), 0, size - 1)


def resize_nearest_neighbor(op: Operator, x: Values) -> np.ndarray:
    """RESIZE_NEAREST_NEIGHBOR."""
    value, (height, width) = np.asarray(x[0]), _ints(x[1])
    return value[:, _nearest(op, value.shape[1], height)][:, :, _nearest(op, value.shape[2], width)]


def _linear(op: Operator, size: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Neighbours below and above, and the position from the lower one, in 1 / 1024 of a pixel."""
    corners = bool(op.option("alignCorners", False)) and wanted > 1
    span, over = (size - 1, wanted - 1) if corners else (size, wanted)
    scale = ((span << 10) + over // 2) // over
    position = np.arange(wanted, dtype=np.int64) * scale
    if op.option("halfPixelCenters", False):
        position = position + scale // 2 - (1 << 9)
    low = np.maximum(position >> 10, 0)
    return low, np.minimum((position + 1023) >> 10, size - 1), position - (low << 10)


def resize_bilinear(op: Operator, x: Values) -> np.ndarray:
    """RESIZE_BILINEAR with 10-bit weights, rounded half away from zero at 20 bits."""
    value, (height, width) = np.asarray(x[0]).astype(np.int64), _ints(x[1])
    top, bottom, down = _linear(op, value.shape[1], height)
    left, right, across = _linear(op, value.shape[2], width)
    down, across = down[:, None, None], across[:, None]

    def row(lines: np.ndarray) -> np.ndarray:
        return lines[:, :, left] * (1024 - across) + lines[:, :, right] * across

    total = row(value[:, top]) * (1024 - down) + row(value[:, bottom]) * down
    rounded = (np.abs(total) + (1 << 19)) >> 20
    return np.where(total < 0, -rounded, rounded).astype(op.outputs[0].dtype)
