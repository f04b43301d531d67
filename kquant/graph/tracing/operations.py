"""Lowering of operations that are not layers: `x + y`, slicing, and `keras.ops`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from kquant.graph.ir import Node
from kquant.graph.tracing.builder import (
    Builder,
    NotLowered,
    as_array,
    lowers_op,
    pad,
    reshape,
    sample_constant,
    scale_offset,
    transpose,
)
from kquant.graph.tracing.functions import function
from kquant.graph.tracing.linear import from_2d, output_shape, pair, to_2d
from kquant.graph.tracing.selection import gather


def two_inputs(b: Builder, op: str, x: Any, y: Any, suffix: str = "") -> Node:
    """A binary operation of two tensors, or of a tensor and a constant."""
    if isinstance(x, Node) and isinstance(y, Node):
        if len(x.shape) != len(y.shape):
            raise NotLowered(f"ranks {len(x.shape)} and {len(y.shape)} broadcast against the batch")
        return b.emit(op, x, y, suffix=suffix)
    if not isinstance(x, Node):
        if op == "sub":
            return scale_offset(b, y, -1.0, x, suffix)
        x, y = y, x
    if op in ("add", "sub"):
        return scale_offset(b, x, 1.0, y if op == "add" else -as_array(y), suffix)
    if op == "mul":
        return scale_offset(b, x, y, 0.0, suffix)
    value = sample_constant(x, y)
    if value.size == 1:
        bound = float(value.reshape(()))
        lo, hi = (bound, None) if op == "maximum" else (None, bound)
        return b.emit("clip", x, lo=lo, hi=hi, suffix=suffix)
    return b.emit(op, x, b.const(value, y if isinstance(y, keras.Variable) else None), suffix=suffix)


def _binary(op: str) -> Any:
    return lambda b, operation, x1, x2: two_inputs(b, op, x1, x2)


for _name, _op in {
    "Add": "add",
    "Subtract": "sub",
    "Fmax": "maximum",
    "Fmin": "minimum",
}.items():
    lowers_op(_name)(_binary(_op))


@lowers_op("Divide", "TrueDivide")
def divide(b: Builder, op: Any, x1: Any, x2: Any) -> Node:
    """By a tensor: times its reciprocal."""
    if not isinstance(x2, Node):
        return scale_offset(b, x1, 1.0 / as_array(x2).astype(np.float64), 0.0)
    if not isinstance(x1, Node) and np.size(as_array(x1)) == 1:
        dividend = float(as_array(x1).reshape(()))
        return function(b, x2, lambda t: dividend / t)
    return two_inputs(b, "mul", x1, function(b, x2, lambda t: 1.0 / t, "reciprocal"))


@lowers_op("Negative")
def negative(b: Builder, op: Any, x: Node) -> Node:
    return scale_offset(b, x, -1.0, 0.0)


@lowers_op("Square")
def square(b: Builder, op: Any, x: Node) -> Node:
    return b.emit("mul", x, x)


@lowers_op("StopGradient")
def stop_gradient(b: Builder, op: Any, variable: Node) -> Node:
    return variable


def concat(b: Builder, tensors: Sequence[Any], axis: int, suffix: str = "") -> Node:
    """Concatenation along an axis other than the batch; constants (class tokens) are the same in all samples."""
    first = next((t for t in tensors if isinstance(t, Node)), None)
    if first is None:
        raise NotLowered("a concatenation of constants")
    axis %= len(first.shape)
    if axis == 0:
        raise NotLowered("it concatenates along the batch")
    tensors = [t if isinstance(t, Node) else _in_every_sample(b, first, t, axis) for t in tensors]
    return tensors[0] if len(tensors) == 1 else b.emit("concat", *tensors, axis=axis, suffix=suffix)


def _in_every_sample(b: Builder, like: Node, constant: Any, axis: int) -> Node:
    """A constant as a tensor with a batch, that of `like`: zero times one of its entries, plus the constant."""
    values = sample_constant(like, constant)
    if values.ndim != len(like.shape) - 1:
        raise NotLowered("a concatenation with a constant of fewer axes")
    zero = b.emit("mul", slice_axis(b, like, axis, 0, 1, "one"), b.const(np.float32(0)), suffix="zero")
    return b.emit("add", zero, b.const(values), suffix="constant")


@lowers_op("Concatenate")
def concatenate(b: Builder, op: Any, xs: Sequence[Any]) -> Node:
    return concat(b, xs, op.axis)


@lowers_op("Stack")
def stack(b: Builder, op: Any, x: Sequence[Any]) -> Node:
    if any(not isinstance(t, Node) for t in x):
        raise NotLowered("a stack with a constant")
    rank = len(x[0].shape) + 1
    axis = op.axis % rank
    shape = (*x[0].shape[:axis], 1, *x[0].shape[axis:])
    return concat(b, [reshape(b, t, shape, "expand") for t in x], axis if axis else rank)


def slice_axis(b: Builder, x: Node, axis: int, begin: int, end: int, suffix: str = "slice") -> Node:
    """x[begin:end] along one axis."""
    begins, ends = [0] * len(x.shape), list(x.shape)
    begins[axis], ends[axis], ends[0] = begin, end, None
    return b.emit("slice", x, begin=tuple(begins), end=tuple(ends), strides=(1,) * len(begins), suffix=suffix)


@lowers_op("Split")
def split(b: Builder, op: Any, x: Node) -> list[Node]:
    axis = op.axis % len(x.shape)
    size = x.shape[axis]
    if axis == 0 or size is None:
        raise NotLowered("it splits the batch")
    sections = op.indices_or_sections
    cuts = range(size // sections, size, size // sections) if isinstance(sections, int) else sections
    edges = [0, *(int(c) for c in cuts), size]
    return [slice_axis(b, x, axis, lo, hi) for lo, hi in itertools.pairwise(edges)]


@lowers_op("Unstack")
def unstack(b: Builder, op: Any, x: Node) -> list[Node]:
    axis = op.axis % len(x.shape)
    if axis == 0 and x.op == MOVED:
        return [_part_of_moved(b, x, k) for k in range(int(b.nodes[x.name].shape[x.attrs["axes"][0]] or 1))]
    size = x.shape[axis]
    if axis == 0 or size is None:
        raise NotLowered("it splits the batch")
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    return [reshape(b, slice_axis(b, x, axis, k, k + 1), shape) for k in range(size)]


@lowers_op("GetItem")
def get_item(b: Builder, op: Any, x: Node, key: Any) -> Node:
    """Basic indexing: slices, integers, newaxis and Ellipsis; the batch stays whole."""
    keys = list(key) if isinstance(key, (tuple, list)) else [key]
    if x.op == MOVED:
        if len(keys) > 1 or not isinstance(keys[0], (int, np.integer)):
            raise NotLowered("it indexes the batch")
        return _part_of_moved(b, x, int(keys[0]))
    if any(not (k is None or k is Ellipsis or isinstance(k, (slice, int, np.integer))) for k in keys):
        raise NotLowered("indexing with tensors or lists")
    indexed = sum(k is not None and k is not Ellipsis for k in keys)
    at = next((i for i, k in enumerate(keys) if k is Ellipsis), len(keys))
    keys[at : at + 1] = [slice(None)] * (len(x.shape) - indexed)
    if keys[0] != slice(None):
        raise NotLowered("it indexes the batch")
    begin: list[int] = []
    end: list[int | None] = []
    strides: list[int] = []
    shape: list[int | None] = []
    for k in keys:
        if k is None:
            shape.append(1)
            continue
        axis = len(begin)
        size = x.shape[axis]
        if isinstance(k, slice):
            lo, hi, step = (0, 0, 1) if size is None else k.indices(size)
            if step < 0:
                x = gather(b, x, axis, range(lo, hi, step), "turned")
                lo, hi, step = 0, int(x.shape[axis] or 0), 1
                size = hi
            shape.append(size if size is None else len(range(lo, hi, step)))
        else:
            lo = int(k) % int(size or 1)
            hi, step = lo + 1, 1
        begin.append(lo)
        end.append(None if axis == 0 else hi)
        strides.append(step)
    sliced = x
    whole = all(
        axis == 0 or (lo, hi, step) == (0, d, 1)
        for axis, (lo, hi, step, d) in enumerate(zip(begin, end, strides, x.shape, strict=True))
    )
    if not whole:
        sliced = b.emit("slice", x, begin=tuple(begin), end=tuple(end), strides=tuple(strides))
    return reshape(b, sliced, shape)


@lowers_op("Slice")
def slice_op(b: Builder, op: Any, inputs: Node, start_indices: Any) -> Node:
    if isinstance(start_indices, Node) or any(isinstance(s, Node) for s in start_indices):
        raise NotLowered("it slices at computed indices")
    begin = tuple(int(s) for s in start_indices)
    if begin[0] != 0:
        raise NotLowered("it slices the batch")
    sizes = zip(begin[1:], op.shape[1:], inputs.shape[1:], strict=True)
    end = (None, *(int(d or 0) if s == -1 else lo + int(s) for lo, s, d in sizes))
    return b.emit("slice", inputs, begin=begin, end=end, strides=(1,) * len(begin))


@lowers_op("Pad")
def pad_op(b: Builder, op: Any, x: Node, constant_values: Any = None) -> Node:
    pairs = list(op.pad_width) if len(op.pad_width) > 1 else list(op.pad_width) * len(x.shape)
    return pad(b, x, pairs, op.mode, 0.0 if constant_values is None else float(constant_values))


@lowers_op("Reshape", "Squeeze", "ExpandDims")
def reshape_op(b: Builder, op: Any, x: Node) -> Node:
    if x.op == MOVED:
        return x.with_(shape=b.scope.shapes[0]).with_attrs(then=b.scope.shapes[0][1:])
    return reshape(b, x, output_shape(b), "")


MOVED = "moved"  # a tensor whose batch is not in front; in no graph, since its parts are taken of what was transposed


@lowers_op("Transpose")
def transpose_op(b: Builder, op: Any, x: Node) -> Node:
    """Where another axis comes first ("three, batch, heads, ..."), the parts along it are still to be taken."""
    axes = tuple(op.axes if op.axes is not None else range(len(x.shape))[::-1])
    if axes[0] % len(x.shape) == 0 or x.op == MOVED:
        return transpose(b, x, axes, "")
    return Node(name=x.name, op=MOVED, shape=b.scope.shapes[0], attrs={"axes": tuple(a % len(x.shape) for a in axes)})


def check_moved(tensors: Sequence[Node], operation: Any = None) -> None:
    """Refuse what reads a tensor whose batch is not in front, but for what takes its parts.

    Raises:
        NotLowered: the operation cannot.
    """
    if any(t.op == MOVED for t in tensors) and type(operation).__name__ not in ("GetItem", "Unstack", "Reshape"):
        raise NotLowered("it reads a tensor whose batch is not in front")


def _part_of_moved(b: Builder, moved: Node, k: int) -> Node:
    """The k-th entry of the first axis of a tensor whose batch is not in front."""
    x, (first, *rest) = b.nodes[moved.name], moved.attrs["axes"]
    if rest[0] != 0:
        raise NotLowered("it moves the batch dimension")
    part = slice_axis(b, x, first, k % int(x.shape[first] or 1), k % int(x.shape[first] or 1) + 1, f"part_{k}")
    part = reshape(b, part, [d for axis, d in enumerate(x.shape) if axis != first])
    part = transpose(b, part, [a - (a > first) for a in rest], f"part_{k}_transposed")
    if (shape := moved.attrs.get("then")) is None:
        return part
    part = reshape(b, part, shape, f"part_{k}_reshaped")  # the batch and heads, say, as one axis
    if shape[0] not in (None, part.batch):
        raise NotLowered("it moves values across the batch")
    return part


@lowers_op("Swapaxes")
def swap_axes(b: Builder, op: Any, x: Node) -> Node:
    perm = list(range(len(x.shape)))
    perm[op.axis1], perm[op.axis2] = perm[op.axis2], perm[op.axis1]
    return transpose(b, x, perm, "")


@lowers_op("Moveaxis")
def move_axis(b: Builder, op: Any, x: Node) -> Node:
    # the axes of an array whose sizes are its axis numbers, moved, are the permutation
    perm = np.moveaxis(np.empty(range(len(x.shape))), op.source, op.destination).shape
    return transpose(b, x, perm, "")


def reduce(b: Builder, op: Any, x: Node, kind: str, suffix: str = "") -> Node:
    axes = op.axis if isinstance(op.axis, (list, tuple)) else [op.axis]
    if None in axes or 0 in [a % len(x.shape) for a in axes]:
        raise NotLowered("it reduces over the batch")
    positive = tuple(sorted(int(a) % len(x.shape) for a in axes))
    return b.emit(kind, x, axes=positive, keepdims=bool(op.keepdims), suffix=suffix)


@lowers_op("Mean")
def mean(b: Builder, op: Any, x: Node) -> Node:
    return reduce(b, op, x, "mean")


@lowers_op("Max", "Amax")
def reduce_max(b: Builder, op: Any, x: Node, **_: Any) -> Node:
    if getattr(op, "initial", None) is not None:
        raise NotLowered("a maximum with an initial value")
    return reduce(b, op, x, "reduce_max")


@lowers_op("Sum")
def reduce_sum(b: Builder, op: Any, x: Node) -> Node:
    """The mean times the number of elements."""
    y = reduce(b, op, x, "mean", suffix="mean")
    axes = [a % len(x.shape) for a in (op.axis if isinstance(op.axis, (list, tuple)) else [op.axis])]
    return scale_offset(b, y, float(np.prod([x.shape[a] for a in axes])), 0.0)


def max_pool(b: Builder, x: Node, pool_size: Any, strides: Any, padding: str) -> Node:
    """The maximum over windows of a sequence or an image."""
    return _pool(b, "max_pool2d", x, pool_size, strides, padding)


def average_pool(b: Builder, x: Node, pool_size: Any, strides: Any, padding: str) -> Node:
    """The average over windows of a sequence or an image."""
    return _pool(b, "avg_pool2d", x, pool_size, strides, padding)


def _pool(b: Builder, op: str, x: Node, pool_size: Any, strides: Any, padding: str) -> Node:
    rank = len(x.shape) - 2
    if rank not in (1, 2):
        raise NotLowered("pooling of volumes outside of a layer")
    size = pair(pool_size, rank)
    steps = size if strides is None else pair(strides, rank)
    y = b.emit(op, to_2d(b, x), pool_size=size, strides=steps, padding=padding)
    return from_2d(b, y, rank + 2)


@lowers_op("MaxPool", "AveragePool")
def pool_op(b: Builder, op: Any, inputs: Node) -> Node:
    pool = max_pool if type(op).__name__ == "MaxPool" else average_pool
    return pool(b, inputs, op.pool_size, op.strides, op.padding)


def resize(b: Builder, x: Node, size: Sequence[int], method: str) -> Node:
    """Resize an image the way tf.image.resize does: sample points at pixel centres."""
    if method not in ("nearest", "bilinear") or len(x.shape) != 4:
        raise NotLowered(f"resizing with {method!r}")
    return b.emit("resize", x, size=tuple(int(s) for s in size), method=method, half_pixel_centers=True)
