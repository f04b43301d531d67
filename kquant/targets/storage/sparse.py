"""Sparse tensors of a .tflite file: all axes but one are written out, along that one only what is not zero.

The format is TACO's (Kjolstad et al. 2017), as the schema's SparsityParameters hold it; with one compressed axis it is
CSR, whose rows are the places along the other axes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from kquant.errors import ExportError

Array = np.ndarray

_DENSE, _CSR = schema.DimensionType.DENSE, schema.DimensionType.SPARSE_CSR
_VECTORS = (
    (schema.SparseIndexVector.Uint8Vector, schema.Uint8VectorT, np.uint8),
    (schema.SparseIndexVector.Uint16Vector, schema.Uint16VectorT, np.uint16),
    (schema.SparseIndexVector.Int32Vector, schema.Int32VectorT, np.int32),
)


def encode(values: Array) -> tuple[Array, Any, int]:
    """The shortest sparse form of a tensor.

    Args:
        values: any shape of at least one axis.

    Returns:
        What is not zero, the schema.SparsityParametersT, and the bytes of both, but for the tables themselves.
    """
    return min((_along(values, axis) for axis in range(values.ndim)), key=lambda made: made[2])


def _along(values: Array, axis: int) -> tuple[Array, Any, int]:
    order = [k for k in range(values.ndim) if k != axis] + [axis]
    rows = values.transpose(order).reshape(-1, values.shape[axis])
    kept = rows != 0
    segments = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
    indices = np.nonzero(kept)[1]
    found, sparsity = rows[kept], schema.SparsityParametersT()
    sparsity.traversalOrder = order
    sparsity.dimMetadata = []
    size = found.nbytes
    for k in order:
        dimension = schema.DimensionMetadataT()
        dimension.format = _CSR if k == axis else _DENSE
        if k == axis:
            dimension.arraySegmentsType, dimension.arraySegments, in_segments = _vector(segments)
            dimension.arrayIndicesType, dimension.arrayIndices, in_indices = _vector(indices)
            size += in_segments + in_indices
        else:
            dimension.denseSize = values.shape[k]
        sparsity.dimMetadata.append(dimension)
    return found, sparsity, size


def _vector(numbers: Array) -> tuple[int, Any, int]:
    """Type, vector and bytes of numbers of at least 0, in the smallest type that holds them."""
    largest = int(numbers.max(initial=0))
    kind, vector, dtype = next(v for v in _VECTORS if largest <= np.iinfo(v[2]).max)
    made = vector()
    made.values = numbers.astype(dtype)
    return kind, made, made.values.nbytes


def decode(values: Array, shape: tuple[int, ...], sparsity: Any) -> Array:
    """The tensor of a sparse form.

    Args:
        values: what is not zero.
        shape: of the tensor.
        sparsity: a schema.SparsityParametersT.

    Raises:
        ExportError: it is of another form, or damaged.
    """
    order = [int(k) for k in sparsity.traversalOrder]
    formats = [d.format for d in sparsity.dimMetadata]
    if sorted(order) != list(range(len(shape))) or formats != [_DENSE] * (len(shape) - 1) + [_CSR]:
        raise ExportError("a sparse tensor has blocks, or compressed axes beside the last one: such are not read")
    last = sparsity.dimMetadata[-1]
    segments, indices = (np.asarray(v.values, np.int64) for v in (last.arraySegments, last.arrayIndices))
    in_order = tuple(shape[k] for k in order)
    rows = np.zeros((int(np.prod(in_order[:-1])), in_order[-1]), values.dtype)
    rows[np.repeat(np.arange(len(rows)), np.diff(segments)), indices] = values
    return rows.reshape(in_order).transpose(np.argsort(order))
